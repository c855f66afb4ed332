"""What a plan says is what a run takes: traced without numbers, held against the same run with them."""

import pytest
import torch
from transformers import Gemma2Config, Gemma2ForCausalLM, LlamaConfig, LlamaForCausalLM, Qwen3Config, Qwen3ForCausalLM

from lorakit import LoRAConfig, attach
from lorakit.core import cross_entropy
from lorakit.data.batches import collate
from lorakit.data.chat import Example
from lorakit.data.sources import Origin
from lorakit.fusion import fused
from lorakit.packing import packed_attention
from lorakit.training.objectives import Predictions
from lorakit.training.planning import checkpoint_activations
from lorakit.training.trace import _Allocations, trace_evaluation, trace_step
from tiny_models import SMALL

MODELS = {
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**SMALL)),
    "qwen3": lambda: Qwen3ForCausalLM(Qwen3Config(**SMALL)),
}


def rows(*lengths):
    """Rows of which the last half is trained."""
    return [
        Example([(7 * k + i) % 90 for i in range(n)], [i >= n // 2 for i in range(n)], Origin("a", k + 1))
        for k, n in enumerate(lengths)
    ]


def with_numbers(model, batch, *, backward):
    """(peak, kept) of the same micro-batch, counted while it is really computed."""
    with (
        torch.set_grad_enabled(backward),
        fused(model),
        packed_attention(model, 100) as packs,
        _Allocations([*model.parameters(), *model.buffers()], "cpu") as allocations,
    ):
        assert packs
        loss = Predictions.of(model, batch).loss_sum()
        kept = allocations.live
        if backward:
            loss.backward()
    return allocations.peak, kept


@pytest.mark.parametrize("make", MODELS.values(), ids=MODELS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_trace_counts_what_a_step_allocates(make, dtype, checkpointing):
    batch = collate(rows(60, 90, 40, 75), range(4))
    found = []
    for device in ("cpu", "meta"):
        torch.manual_seed(0)
        model = make().to(dtype)
        attach(model, LoRAConfig(r=4))
        checkpoint_activations(model, on=checkpointing)
        if device == "meta":
            traced = trace_step(model.to("meta"), batch)
            found.append((traced.peak, traced.kept))
        else:
            with packed_attention(model, 100):  # the probe, once
                pass
            found.append(with_numbers(model.train(), batch, backward=True))
    (peak, kept), (traced_peak, traced_kept) = found
    assert traced_peak == pytest.approx(peak, rel=0.03)
    assert traced_kept == pytest.approx(kept, rel=0.03)


def test_a_long_row_is_traced_with_the_fused_attention_it_gets():
    batch = collate(rows(300, 20), range(2))
    found = []
    for device in ("cpu", "meta"):
        torch.manual_seed(0)
        model = MODELS["llama"]()
        attach(model, LoRAConfig(r=4))
        if device == "meta":
            found.append(trace_step(model.to("meta"), batch).peak)
        else:
            with packed_attention(model, 300):
                pass
            found.append(with_numbers(model.train(), batch, backward=True)[0])
    assert found[1] == pytest.approx(found[0], rel=0.05)


def test_evaluation_keeps_nothing_and_takes_less():
    model = MODELS["llama"]()
    attach(model, LoRAConfig(r=4))
    batch = collate(rows(60, 90, 40, 75), range(4))
    peak, _ = with_numbers(model.eval(), batch, backward=False)
    traced = trace_evaluation(model.to("meta"), batch)
    assert traced.peak == pytest.approx(peak, rel=0.03)
    assert traced.peak < trace_step(model, batch).peak


def test_the_logits_of_a_large_vocabulary_are_never_there_at_once(monkeypatch):
    """Llama's step holds a chunk of them; with capped logits, all."""
    monkeypatch.setattr(cross_entropy, "_AT_ONCE", 1 << 20)
    monkeypatch.setattr(cross_entropy, "_CHUNK", 1 << 14)
    batch = collate(rows(60, 90, 40, 75), range(4))
    settings = {**SMALL, "vocab_size": 50_000}
    step, evaluation = {}, {}
    for name, make in {
        "llama": lambda: LlamaForCausalLM(LlamaConfig(**settings)),
        "gemma2": lambda: Gemma2ForCausalLM(Gemma2Config(**settings)),
    }.items():
        model = make()
        attach(model, LoRAConfig(r=4))
        step[name] = trace_step(model.to("meta"), batch)
        evaluation[name] = trace_evaluation(model, batch)
    whole = len(batch.targets) * 50_000 * 4
    assert step["gemma2"].logits == whole
    assert step["gemma2"].peak > whole
    for traced in (step["llama"], evaluation["llama"]):
        assert 0 < traced.logits <= 1 << 20
        assert traced.peak < whole / 2
    assert step["llama"].peak >= step["llama"].kept + step["llama"].logits
