"""The loop's parts: the plan, the token-weighted step, seeds, and what stops it."""

import math

import pytest
import torch

from lorakit.adapter.attach import attach
from lorakit.adapter.config import LoRAConfig
from lorakit.data.chat import Example
from lorakit.data.sources import Origin
from lorakit.errors import NonFiniteLossError, RunError
from lorakit.files import JsonLines
from lorakit.training.checkpoint import Cursor
from lorakit.training.loop import (
    MOST_SKIPPED_STEPS,
    Plan,
    accumulate,
    check_gradient,
    keep_metrics,
    ready,
    restore_tensors,
    seeded,
)
from lorakit.training.optim import make_scaler
from tiny_models import tiny_llama
from tiny_runs import configured

CPU = torch.device("cpu")


def examples(lengths):
    """Rows of random tokens; of each, a number of last tokens that grows with the row is trained."""
    found = []
    for line, length in enumerate(lengths, 1):
        ids = torch.randint(0, 256, (length,), generator=torch.Generator().manual_seed(line)).tolist()
        first = max(1, length - line)
        found.append(Example(ids, [place >= first for place in range(length)], Origin("rows.jsonl", line)))
    return found


@pytest.fixture
def adapted():
    """A tiny model with an adapter whose update is not zero."""
    return with_update(LoRAConfig(r=4))


def with_update(config):
    model = tiny_llama()
    tensors = attach(model, config).trainable_tensors()
    with torch.no_grad():
        for name, tensor in tensors.items():
            if name.endswith(".B"):
                tensor.copy_(torch.randn(tensor.shape, generator=torch.Generator().manual_seed(len(name))) / 10)
    return model, tensors


def gradients(tensors):
    found = {name: tensor.grad.clone() for name, tensor in tensors.items()}
    for tensor in tensors.values():
        tensor.grad = None
    return found


def test_plan_goes_through_epochs_and_starts_anywhere(settings):
    rows = examples([5, 9, 7, 12, 6, 8, 20])
    plan = Plan.of(configured(settings, "unused", max_steps=9, batch_size=3), rows)
    steps = plan.steps(0)
    straight = [next(steps) for _ in range(9)]
    for first in range(9):
        assert next(plan.steps(first)) == straight[first]
    for epoch in range(3):
        seen = [i for step in straight[3 * epoch : 3 * epoch + 3] for micro_batch in step for i in micro_batch]
        assert sorted(seen) == list(range(7))
    assert straight[:3] != straight[3:6]


def test_a_step_is_the_mean_over_its_tokens_however_divided(adapted):
    """The trap of trl#2175: a mean of means would weigh a row of 2 trained tokens like one of 9."""
    model, tensors = adapted
    rows = examples([5, 30, 7, 12, 25, 8, 9, 16, 40])
    scaler = make_scaler(torch.float32, CPU)

    def run(micro_batches):
        with ready(model, 40) as share:
            assert share
            loss = accumulate(model, rows, micro_batches, scaler, 0, 0, share=share)
        return loss, gradients(tensors)

    whole_loss, whole = run([list(range(9))])
    for micro_batches in ([[i] for i in range(9)], [[0, 2, 5], [6, 3, 7, 4], [1], [8]]):
        loss, parts = run(micro_batches)
        assert loss == pytest.approx(whole_loss, rel=1e-6)
        for name in tensors:
            torch.testing.assert_close(parts[name], whole[name], rtol=1e-4, atol=5e-6)

    model.train()
    sums, count = 0.0, 0
    for row in rows:
        logits = model(torch.tensor([row.ids])).logits[0, :-1]
        targets = torch.tensor([token if flag else -100 for token, flag in zip(row.ids, row.trained, strict=True)][1:])
        sums = sums + torch.nn.functional.cross_entropy(logits, targets, ignore_index=-100, reduction="sum")
        count += int((targets >= 0).sum())
    plain = sums / count
    plain.backward()
    assert whole_loss == pytest.approx(plain.item(), rel=1e-6)
    for name, gradient in gradients(tensors).items():
        torch.testing.assert_close(whole[name], gradient, rtol=1e-4, atol=5e-6)


def test_dropout_differs_by_step_and_micro_batch_and_repeats():
    model, tensors = with_update(LoRAConfig(r=4, dropout=0.5))
    rows, scaler = examples([20]), make_scaler(torch.float32, CPU)

    def losses(step, seed=0):
        found = [accumulate(model, rows, [[0]] * count, scaler, seed, step) for count in (1, 2)]
        gradients(tensors)
        return found

    (first, both), again, next_step, other_seed = losses(3), losses(3), losses(4), losses(3, seed=1)
    assert again == [first, both]
    assert both != first  # the mean over two micro-batches of the same row: the second one draws otherwise
    assert next_step[0] != first
    assert other_seed[0] != first


def test_mode_is_restored(adapted):
    model, _ = adapted
    for training in (True, False):
        model.train(training)
        accumulate(model, examples([5, 6]), [[0], [1]], make_scaler(torch.float32, CPU), 0, 0)
        assert model.training is training
        assert all(module.training is training for module in model.modules())


def test_draws_depend_on_the_numbers_alone():
    def draw(*numbers):
        with seeded(CPU, *numbers):
            return torch.rand(4)

    torch.manual_seed(3)
    first = draw(0, 1, 2)
    state = torch.get_rng_state()
    torch.rand(100)
    assert torch.equal(draw(0, 1, 2), first)
    different = [draw(0, 1, 3), draw(0, 2, 2), draw(1, 1, 2), draw(0, 12), draw(1, 2)]
    assert not any(torch.equal(first, other) for other in different)
    torch.set_rng_state(state)
    expected = torch.rand(2)
    torch.set_rng_state(state)
    draw(5, 5)
    assert torch.equal(torch.rand(2), expected)


def test_non_finite_loss_names_the_rows_of_its_micro_batch():
    """A token whose embedding is NaN (untied here) spoils the micro-batch with the row that has it, and no other."""
    model = tiny_llama(tie_word_embeddings=False)
    attach(model, LoRAConfig(r=2))
    rows = examples([6, 7, 8, 9])
    rows[2].ids[3] = 260
    with torch.no_grad():
        model.model.embed_tokens.weight[260] = math.nan
    with pytest.raises(NonFiniteLossError) as caught:
        accumulate(model, rows, [[0, 1], [2, 3]], make_scaler(torch.float32, CPU), 0, 41)
    message = str(caught.value)
    assert "nan at step 42" in message
    assert "rows.jsonl:3" in message
    assert "rows.jsonl:4" in message
    assert "rows.jsonl:1" not in message


def test_non_finite_gradient_stops_unless_the_scaler_handles_it():
    rows = examples([5, 6])
    with pytest.raises(NonFiniteLossError, match=r"gradient is not finite at step 8(.|\n)*rows\.jsonl:2"):
        check_gradient(math.inf, Cursor(step=7), make_scaler(torch.float32, CPU), rows, [[0], [1]])
    scaler, cursor = make_scaler(torch.float16, CPU), Cursor(step=7)
    for _ in range(MOST_SKIPPED_STEPS):
        check_gradient(math.inf, cursor, scaler, rows, [[0], [1]])
    with pytest.raises(NonFiniteLossError, match="21 steps in a row"):
        check_gradient(math.inf, cursor, scaler, rows, [[0], [1]])
    check_gradient(1.0, cursor, scaler, rows, [[0], [1]])
    assert cursor.skipped_in_a_row == 0


def test_tensors_of_another_adapter_are_refused(adapted):
    _, tensors = adapted
    saved = {name: tensor.detach().clone() for name, tensor in tensors.items()}
    name = next(iter(saved))
    with pytest.raises(RunError, match="another adapter"):
        restore_tensors(tensors, {**saved, "x.A": saved[name]})
    with pytest.raises(RunError, match="has shape"):
        restore_tensors(tensors, {**saved, name: saved[name][:, :2]})


def test_metrics_are_cut_to_the_cursor(tmp_path):
    metrics = JsonLines(tmp_path / "metrics.jsonl")
    for step in range(5):
        metrics.append({"step": step})
    with metrics.path.open("a") as file:
        file.write('{"step": 5, "lo')
    keep_metrics(metrics, Cursor(step=3, metric_rows=3))
    assert metrics.path.read_text() == '{"step": 0}\n{"step": 1}\n{"step": 2}\n'
    with pytest.raises(RunError, match="holds 3 rows"):
        keep_metrics(metrics, Cursor(step=4, metric_rows=4))
