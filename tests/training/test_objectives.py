"""The loss is the same by logits and from what enters the head; it does not depend on how rows are divided."""

import contextlib

import pytest
import torch
from transformers import CohereConfig, CohereForCausalLM, Gemma2Config, Gemma2ForCausalLM, LlamaConfig, LlamaForCausalLM

import lorakit
from lorakit import LoRAConfig
from lorakit.core import cross_entropy
from lorakit.data.batches import collate
from lorakit.training.loop import accumulate, ready
from lorakit.training.objectives import Predictions, losses_by_example, mean_loss
from lorakit.training.optim import make_scaler
from lorakit.training.recomputing import checkpoint_activations
from tiny_models import SMALL, tiny_llama


class Row:
    def __init__(self, ids, trained):
        self.ids, self.trained, self.origin = ids, trained, None


def test_mean_loss_is_per_token_over_all_rows_however_they_are_divided():
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, vocab_size=97
    )
    model = LlamaForCausalLM(config)
    rows = [
        Row(torch.randint(0, 97, (n,)).tolist(), [False] + [i % 3 > 0 for i in range(n - 1)]) for n in (4, 9, 30, 17)
    ]
    expected, tokens = 0.0, 0
    model.eval()
    with torch.no_grad():
        for row in rows:
            logits = model(input_ids=torch.tensor([row.ids])).logits[0]
            losses = torch.nn.functional.cross_entropy(logits[:-1], torch.tensor(row.ids[1:]), reduction="none")
            mask = torch.tensor(row.trained[1:])
            expected, tokens = expected + float(losses[mask].sum()), tokens + int(mask.sum())
    model.train()
    for limit in (1, 20, 1000):
        loss, counted = mean_loss(model, rows, micro_batch_tokens=limit)
        assert counted == tokens
        assert abs(loss - expected / tokens) < 1e-5
    assert model.training
    with pytest.raises(ValueError, match="no labelled token"):
        mean_loss(model, [Row([1, 2], [False, False])])


MODELS = {
    "llama: fused with its head": (lambda: LlamaForCausalLM(LlamaConfig(**SMALL)), True),
    "gemma2: capped logits": (lambda: Gemma2ForCausalLM(Gemma2Config(**SMALL, final_logit_softcapping=0.5)), False),
    "cohere: scaled logits": (lambda: CohereForCausalLM(CohereConfig(**SMALL)), False),
}


def rows_that_share(*lengths):
    """Rows that begin alike; the last tokens of what they share are trained, and predict for several."""
    generator = torch.Generator().manual_seed(1)
    begin = torch.randint(3, 97, (12,), generator=generator).tolist()
    ids = [begin + torch.randint(3, 97, (n,), generator=generator).tolist() for n in lengths]
    return [Row(row, [place >= 9 for place in range(len(row))]) for row in ids]


def with_updates(model):
    """Its adapter's tensors, attached with an update that is not zero."""
    return list(lorakit.attach(model, LoRAConfig(r=4, init="random")).trainable_tensors().values())


def by_model_itself(model, rows):
    """Sum of token losses from the logits of each whole row alone, by torch."""
    total = 0.0
    for row in rows:
        logits = model(input_ids=torch.tensor([row.ids])).logits[0, :-1]
        targets = [token if flag else -100 for token, flag in zip(row.ids, row.trained, strict=True)][1:]
        total = total + torch.nn.functional.cross_entropy(
            logits, torch.tensor(targets), ignore_index=-100, reduction="sum"
        )
    return total


@pytest.mark.parametrize(("make", "has_head"), MODELS.values(), ids=MODELS)
def test_loss_and_gradient_are_those_of_the_models_own_logits(make, has_head, monkeypatch):
    monkeypatch.setattr(cross_entropy, "_AT_ONCE", 7 * 97 * 8)  # several chunks
    torch.manual_seed(0)
    model = make().double()  # norms and attention still round to fp32 inside
    tensors = with_updates(model)
    rows = rows_that_share(4, 9, 30, 17)
    with ready(model, 60) as share:
        batch = collate(rows, range(4), share=share)
        assert batch.source is not None
        predictions = Predictions.of(model, batch)
        assert (predictions.head is not None) == has_head
        loss = predictions.loss_sum()
        gradients = torch.autograd.grad(loss, tensors)
    expected = by_model_itself(model, rows)
    torch.testing.assert_close(loss, expected, rtol=1e-6, atol=0)
    for one, other in zip(gradients, torch.autograd.grad(expected, tensors), strict=True):
        assert (one - other).norm() <= 2e-5 * other.norm()
    losses = losses_by_example(model, rows, micro_batch_tokens=60)
    for row, (one, tokens) in zip(rows, losses, strict=True):
        assert one == pytest.approx(by_model_itself(model, [row]).item(), rel=1e-5)
        assert tokens == sum(row.trained)


def train_ten_steps(dtype, prepare, checkpointing=False):
    """Losses of ten steps on rows that share, in two micro-batches each."""
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**SMALL)).to(dtype)
    tensors = with_updates(model)
    if checkpointing:
        checkpoint_activations(model, on=True)
    rows = rows_that_share(4, 9, 30, 17)
    optimizer = torch.optim.AdamW(tensors, lr=1e-3)
    losses = []
    with ready(model, 60) as share, prepare(model):
        for step in range(10):
            scaler = make_scaler(dtype, torch.device("cpu"))
            losses.append(accumulate(model, rows, [[0, 1], [2, 3]], scaler, 0, step, share=share))
            optimizer.step()
            optimizer.zero_grad()
    return losses


@contextlib.contextmanager
def head_that_runs(model):
    """A hook that does nothing, for which the head has to run."""
    hook = model.lm_head.register_forward_hook(lambda module, args, output: None)
    yield
    hook.remove()


@pytest.mark.parametrize("checkpointing", [False, True], ids=["kept", "checkpointing"])
@pytest.mark.parametrize(
    ("dtype", "tolerance"),
    [(torch.float64, 1e-8), (torch.float32, 1e-5), (torch.bfloat16, 2e-3)],
    ids=["fp64", "fp32", "bf16"],
)
def test_training_goes_the_same_way_with_and_without_logits(dtype, tolerance, checkpointing, monkeypatch):
    monkeypatch.setattr(cross_entropy, "_AT_ONCE", 11 * 97 * torch.empty(0, dtype=dtype).element_size())
    fused = train_ten_steps(dtype, lambda model: contextlib.nullcontext(), checkpointing)
    by_logits = train_ten_steps(dtype, head_that_runs, checkpointing)
    assert fused == pytest.approx(by_logits, rel=tolerance)
    assert fused[-1] < 0.99 * fused[0]


def test_the_scale_of_fp16_is_multiplied_in():
    model = tiny_llama(vocabulary=97)
    tensors = with_updates(model)
    rows = rows_that_share(4, 9)
    found = []
    for scale in (1.0, 2.0**16):
        scaler = torch.amp.GradScaler("cpu", init_scale=scale)
        with ready(model, 60) as share:
            accumulate(model, rows, [[0, 1]], scaler, 0, 0, share=share)
        found.append([tensor.grad / scale for tensor in tensors])
        for tensor in tensors:
            tensor.grad = None
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other)
