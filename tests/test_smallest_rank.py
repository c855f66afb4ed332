"""The smallest rank that held-out rows cannot tell from the whole, on a tiny model whose answer is known."""

import math
from dataclasses import replace

import pytest
import torch

import lorakit
from lorakit.adapter.compress import compress
from lorakit.data.chat import ChatFormat
from lorakit.data.sources import read_rows
from lorakit.errors import ConfigError, DataError, NonFiniteLossError
from lorakit.evaluation import encoded
from lorakit.models import stop_ids
from lorakit.smallest_rank import _first_accepted, paired_difference, smallest_rank
from lorakit.training.objectives import losses_by_example, mean_loss
from tiny_models import byte_tokenizer, tiny_llama
from tiny_subjects import conversation, write_jsonl


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    path = tmp_path_factory.mktemp("rows") / "rows.jsonl"
    return read_rows(write_jsonl(path, [conversation(i, answer="blue" * (1 + i % 3)) for i in range(12)]))


@pytest.fixture(scope="module")
def subject():
    tokenizer = byte_tokenizer()
    return tiny_llama(vocabulary=len(tokenizer)), tokenizer


@pytest.fixture(scope="module")
def adapter(subject, rows):
    """Of rank 8, of which two directions were trained on the rows and six do next to nothing."""
    model, tokenizer = subject
    handle = lorakit.attach(model, lorakit.LoRAConfig(r=2, alpha=2.0))
    examples = encoded(ChatFormat(tokenizer, stop_ids(model, tokenizer), 1024, "auto"), rows)
    optimiser = torch.optim.Adam(handle.trainable_parameters(), lr=0.03)
    for _ in range(8):
        for example in examples:
            labels = [token if on else -100 for token, on in zip(example.ids, example.trained, strict=True)]
            model(input_ids=torch.tensor([example.ids]), labels=torch.tensor([labels])).loss.backward()
        optimiser.step()
        optimiser.zero_grad()
    value = handle.extract()
    handle.detach()
    generator = torch.Generator().manual_seed(0)
    for path, f in value.factors.items():
        A = torch.cat([f.A, torch.randn(6, f.A.shape[1], generator=generator)])
        B = torch.cat([f.B, torch.randn(f.B.shape[0], 6, generator=generator) * 1e-7], dim=1)
        value.factors[path] = replace(f, A=A, B=B, alpha=8.0)
    return replace(value, config=replace(value.config, r=8, alpha=8.0))


def test_the_rank_that_does_something_is_found(subject, adapter, rows):
    tried = []
    search = smallest_rank(adapter, data=rows, model=subject, on_trial=tried.append)
    assert search.best.rank == 2
    assert {trial.rank for trial in search.trials} == {trial.rank for trial in tried}
    assert len(tried) <= 3
    assert [t.rank for t in search.trials] == sorted(t.rank for t in tried)
    assert all(trial.within_noise == (trial.rank >= 2) for trial in search.trials)
    assert search.best.parameters * 4 == search.parameters
    assert search.to_dict()["best"]["rank"] == 2
    evaluated = lorakit.evaluate(data=rows, model=subject, adapters=[adapter, search.best.truncated.adapter])
    assert evaluated[0].scores["loss"] == pytest.approx(search.loss, rel=1e-5)
    assert evaluated[1].scores["loss"] == pytest.approx(search.best.loss, rel=1e-5)


def test_by_energy_it_is_found_too(subject, adapter, rows):
    search = smallest_rank(adapter, data=rows, model=subject, by="energy")
    assert search.best.energy is not None
    assert search.best.parameters <= search.parameters // 4
    assert search.best.within_noise


def test_an_adapter_that_needs_all_it_has_stays(subject, adapter, rows):
    needed = compress(adapter, rank=2).adapter
    search = smallest_rank(needed, data=rows, model=subject)
    assert search.best is None
    assert [trial.rank for trial in search.trials] == [1]
    assert smallest_rank(compress(adapter, rank=1).adapter, data=rows, model=subject).trials == ()


def test_losses_by_example_add_up_to_the_mean_loss(subject, rows):
    model, tokenizer = subject
    examples = encoded(ChatFormat(tokenizer, stop_ids(model, tokenizer), 1024, "auto"), rows)
    for budget in (50, 4096):
        each = losses_by_example(model, examples, micro_batch_tokens=budget)
        loss, tokens = mean_loss(model, examples, micro_batch_tokens=budget)
        assert sum(count for _, count in each) == tokens
        assert math.fsum(s for s, _ in each) / tokens == pytest.approx(loss, rel=1e-6)
    alone = [losses_by_example(model, [example])[0] for example in examples]
    assert [s for s, _ in each] == pytest.approx([s for s, _ in alone], rel=1e-5)


def test_the_difference_is_taken_in_pairs():
    full = [(10.0, 5), (2.0, 1), (30.0, 10)]
    own = [(10.5, 5), (2.1, 1), (31.0, 10)]
    difference, error = paired_difference(own, full)
    assert difference == pytest.approx(1.6 / 16)
    assert error == pytest.approx(0, abs=1e-12)  # every row is worse by the same per token
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(4000, generator=generator).tolist()
    full = [(5.0, 2)] * 4000
    difference, error = paired_difference([(5.0 + d, 2) for d in noise], full)
    assert error == pytest.approx(1 / math.sqrt(4000) / 2, rel=0.05)
    assert abs(difference) < 3 * error


def test_bisection_asks_little_and_finds_the_first():
    for first in range(9):
        asked = []
        found = _first_accepted(8, lambda place, first=first, asked=asked: asked.append(place) or place >= first)
        assert found == (first if first < 8 else None)
        assert len(asked) <= 4
        assert len(set(asked)) == len(asked)
    assert _first_accepted(0, lambda place: True) is None


def test_what_cannot_be_searched_says_why(subject, adapter, rows):
    with pytest.raises(DataError, match="1 rows"):
        smallest_rank(adapter, data=rows, model=subject, limit=1)
    with pytest.raises(ConfigError, match="rank or energy"):
        smallest_rank(adapter, data=rows, model=subject, by="size")
    with pytest.raises(ConfigError, match="standard errors"):
        smallest_rank(adapter, data=rows, model=subject, noise=-1.0)
    path, f = next(iter(adapter.factors.items()))
    broken = replace(adapter, factors={**adapter.factors, path: replace(f, B=f.B * float("nan"))})
    with pytest.raises(NonFiniteLossError):
        smallest_rank(broken, data=rows, model=subject)
    assert not any("lorakit" in key for key in subject[0].state_dict())
