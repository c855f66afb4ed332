"""What a plan says is what a run takes: traced without numbers, held against the same run with them."""

import contextlib

import pytest
import torch
from transformers import (
    BloomConfig,
    BloomForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    GPTJConfig,
    GPTJForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MambaConfig,
    MambaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from lorakit import LoRAConfig, TrainConfig, attach
from lorakit.core import cross_entropy
from lorakit.data.batches import collate
from lorakit.data.chat import Example
from lorakit.data.sources import Origin
from lorakit.fusion import fused
from lorakit.packing import packed_attention
from lorakit.training.objectives import Predictions
from lorakit.training.planning import Planner
from lorakit.training.recomputing import checkpoint_activations
from lorakit.training.trace import AsOnDevices, _Allocations, trace_evaluation, trace_step
from tiny_models import SMALL, tiny_llama

FIVE = {**SMALL, "num_hidden_layers": 5}  # of which a trace runs three
GPT = {"n_layer": 3, "n_embd": 32, "n_head": 4, "n_positions": 512, "vocab_size": 97}
IDS = {"bos_token_id": 1, "eos_token_id": 2}
MODELS = {
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**SMALL)),
    "llama of 5": lambda: LlamaForCausalLM(LlamaConfig(**FIVE)),
    "qwen3 of 5": lambda: Qwen3ForCausalLM(Qwen3Config(**FIVE)),
    "mistral, sliding window": lambda: MistralForCausalLM(MistralConfig(**FIVE, sliding_window=16)),
    "gpt2, dropout": lambda: GPT2LMHeadModel(GPT2Config(**GPT, **IDS)),
}
ROW_BY_ROW = {
    "gptj": lambda: GPTJForCausalLM(GPTJConfig(**GPT, **IDS, rotary_dim=4)),
    "bloom": lambda: BloomForCausalLM(BloomConfig(n_layer=3, hidden_size=32, n_head=4, vocab_size=97)),
    "mamba": lambda: MambaForCausalLM(MambaConfig(hidden_size=16, num_hidden_layers=3, vocab_size=97)),
}


def rows(*lengths):
    """Rows of which the last half is trained."""
    return [
        Example([(7 * k + i) % 90 for i in range(n)], [i >= n // 2 for i in range(n)], Origin("a", k + 1))
        for k, n in enumerate(lengths)
    ]


def counted(model, batch, longest, *, backward):
    """(peak, kept) of a micro-batch, counted while it is really computed, and whether the model packs."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    for parameter in trained:
        parameter.grad = torch.zeros_like(parameter)
    known = [*model.parameters(), *model.buffers(), *(parameter.grad for parameter in trained)]
    with packed_attention(model, longest):  # the probe, once
        pass
    with (
        torch.set_grad_enabled(backward),
        fused(model),
        packed_attention(model, longest) as packs,
        _Allocations(known, "cpu") as allocations,
    ):
        predictions = Predictions.of(model, batch)
        logits = predictions.logits_nbytes if predictions.head is None else 0
        loss = predictions.loss_sum()
        del predictions
        kept = allocations.live - logits
        if backward:
            loss.backward()
    return allocations.peak, kept, packs


def both(make, lengths, *, dtype=torch.float32, checkpointing=False):
    """A step counted on the CPU, and traced."""
    batch = collate(rows(*lengths), range(len(lengths)))
    found = []
    for device, again in (("cpu", contextlib.nullcontext), ("meta", AsOnDevices)):
        torch.manual_seed(0)
        model = make().to(dtype)
        attach(model, LoRAConfig(r=4))
        checkpoint_activations(model, on=checkpointing, again=again)
        if device == "cpu":
            found.append(counted(model.train(), batch, max(lengths), backward=True))
        else:
            model = model.to("meta")
            with packed_attention(model, max(lengths)) as packs:
                pass
            traced = trace_step(model, batch, max(lengths))
            found.append((traced.peak, traced.kept, packs))
    return found


@pytest.mark.parametrize("lengths", [(60, 90, 40, 75), (300, 20)], ids=["short", "long"])
@pytest.mark.parametrize("make", MODELS.values(), ids=MODELS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_trace_counts_what_a_step_allocates(make, lengths, dtype, checkpointing):
    (peak, kept, packs), (traced_peak, traced_kept, taken_to_pack) = both(
        make, lengths, dtype=dtype, checkpointing=checkpointing
    )
    assert packs
    assert taken_to_pack
    assert traced_peak == pytest.approx(peak, rel=0.02)
    assert traced_kept == pytest.approx(kept, rel=0.03)


@pytest.mark.parametrize("make", ROW_BY_ROW.values(), ids=ROW_BY_ROW)
@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_model_that_does_not_pack_is_traced_row_by_row(make, checkpointing):
    (peak, kept, packs), (traced_peak, traced_kept, taken_to_pack) = both(make, (40, 25), checkpointing=checkpointing)
    assert not packs
    assert not taken_to_pack
    assert traced_peak == pytest.approx(peak, rel=0.02)
    assert traced_kept == pytest.approx(kept, rel=0.03)


def test_evaluation_keeps_nothing_and_takes_less():
    model = MODELS["llama of 5"]()
    attach(model, LoRAConfig(r=4))
    batch = collate(rows(60, 90, 40, 75), range(4))
    peak, _, _ = counted(model.eval(), batch, 100, backward=False)
    traced = trace_evaluation(model.to("meta"), batch, 100)
    assert traced.peak == pytest.approx(peak, rel=0.02)
    assert traced.peak < trace_step(model, batch, 100).peak


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
        step[name] = trace_step(model.to("meta"), batch, 100)
        evaluation[name] = trace_evaluation(model, batch, 100)
    whole = len(batch.targets) * 50_000 * 4
    assert step["gemma2"].logits == whole
    assert step["gemma2"].peak > whole
    for traced in (step["llama"], evaluation["llama"]):
        assert 0 < traced.logits <= 1 << 20
        assert traced.peak < whole / 2
    assert step["llama"].peak >= step["llama"].kept + step["llama"].logits


@pytest.fixture(scope="module")
def planned(tmp_path_factory):
    """A planner of a config with changes: steps of rows of 20 to 400 tokens."""
    folder = tmp_path_factory.mktemp("base")
    tiny_llama(hidden_size=64, intermediate_size=192, num_hidden_layers=4, context=512).save_pretrained(folder)

    def make(train=rows(*range(20, 420, 20)), valid=rows(40), **changes):  # noqa: B008
        settings = {"model": str(folder), "data": "none", "dtype": "fp32", "device": "cuda", "lora": {"r": 4}}
        settings |= {"quantize": "none", **changes}
        return Planner(TrainConfig.from_dict(settings), train, valid)

    return make


def test_auto_takes_as_many_rows_at_once_as_memory_holds(planned):
    planner = planned(batch_size="auto", gradient_checkpointing="off")
    whole = planner.chosen(None)
    assert (whole.rows, whole.micro_batches) == (16, 1)
    tight = planner.chosen(int(0.6 * whole.peak + 0.4 * planner.process))
    assert tight.peak < whole.peak
    assert tight.rows < 16
    assert tight.micro_batches > 1
    assert not tight.gradient_checkpointing
    config = tight.applied(planner.config)
    assert (config.batch_size, config.rows_per_step, config.gradient_checkpointing) == (16, 16, "off")
    assert config.micro_batch_tokens == tight.micro_batch_tokens


def test_on_a_cpu_auto_takes_no_more_at_once_than_the_default(planned):
    assert planned(batch_size="auto").chosen(None).micro_batch_tokens > 1000
    assert planned(batch_size="auto", micro_batch_tokens=1000, device="cpu").chosen(None).micro_batch_tokens == 1000


def test_an_evaluation_takes_no_more_than_a_step(planned):
    """With steps of one short row, evaluations are divided; no further than memory asks, or than their rows allow."""
    many = rows(*[100] * 40)
    for checkpointing in ("off", "on"):
        planner = planned(rows(*[100] * 4), many, batch_size=1, gradient_checkpointing=checkpointing)
        asked = planner.asked()
        memory = planner.memory(asked.micro_batch_tokens, checkpointing=asked.gradient_checkpointing)
        assert 0 < memory.evaluation <= memory.training
        assert 100 <= asked.eval_batch_tokens < asked.micro_batch_tokens
        assert asked.applied(planner.config).evaluation_tokens == asked.eval_batch_tokens
    whole = planned(rows(*[100] * 40), many, batch_size=40, gradient_checkpointing="off")
    assert whole.asked().eval_batch_tokens == 4096
    assert planned(rows(20), many, eval_batch_tokens=3000).asked().eval_batch_tokens == 3000


def test_a_row_of_an_evaluation_that_takes_more_than_any_step_is_told(planned):
    planner = planned(rows(*[20] * 4), rows(400), batch_size=1, gradient_checkpointing="on")
    asked = planner.asked()
    memory = planner.memory(asked.micro_batch_tokens, checkpointing=True)
    assert memory.evaluation > memory.training
    assert asked.peak == memory.process + memory.weights + memory.adapter + memory.evaluation


@pytest.mark.parametrize("make", [*MODELS.values(), *ROW_BY_ROW.values()], ids=[*MODELS, *ROW_BY_ROW])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_of_the_same_rows_an_evaluation_takes_less_whatever_the_model(make, checkpointing):
    model = make()
    attach(model, LoRAConfig(r=4))
    checkpoint_activations(model.to("meta"), on=checkpointing, again=AsOnDevices)
    batch = collate(rows(60, 90, 40, 75), range(4))
    assert trace_evaluation(model, batch, 100).peak <= trace_step(model, batch, 100).peak


def test_a_kept_trunk_is_counted_where_it_lies(planned):
    upper = {"lora": {"r": 4, "layers": [2, 3]}, "device": "cpu"}
    kept, off = (planned(cache_trunk=where, **upper).asked() for where in ("memory", "off"))
    planner = planned(cache_trunk="memory", **upper)
    tokens = sum(len(example.ids) for example in (*planner.train, *planner.valid))
    assert planner.trunk == pytest.approx(tokens * 64 * 4, rel=0.05)  # what a row ends with is not read
    assert kept.peak - off.peak == pytest.approx(planner.trunk, abs=60_000_000)  # the process itself may have grown
    assert planned(cache_trunk="disk", **upper).trunk == 0
    assert planned(cache_trunk="memory", lora={"r": 4, "layers": [2, 3]}).trunk == 0  # a GPU's memory holds none of it


@pytest.fixture(scope="module")
def without_weights(tmp_path_factory):
    """A base of 200M parameters, of which there is the config alone."""
    folder = tmp_path_factory.mktemp("config")
    sizes = {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 12, "vocab_size": 1000}
    LlamaConfig(**sizes, num_attention_heads=8, architectures=["LlamaForCausalLM"]).save_pretrained(folder)
    return str(folder)


def test_a_base_in_fewer_bits_is_suggested_where_only_checkpointing_fits(planned, without_weights):
    planner = planned(model=without_weights, micro_batch_tokens=400)
    plain, checkpointed = planner.fitting(None)
    assert not plain.gradient_checkpointing
    assert not list(planner.suggestions(plain.peak))
    suggested = list(planner.suggestions(plain.peak - 1))
    assert [(each.flag, each.value) for each in suggested] == [("quantize", "int8"), ("quantize", "nf4")]
    assert not any(each.setting.gradient_checkpointing or each.same_result for each in suggested)
    quantised = planned(model=without_weights, micro_batch_tokens=400, quantize="nf4")
    assert planner.weights - quantised.weights > 500_000_000
    assert suggested[1].setting.peak == quantised.asked().peak
    nothing_fits = [each.value for each in planner.suggestions(checkpointed.peak - 1)]
    assert nothing_fits[:2] == ["int8", "nf4"]
    assert "bf16" in nothing_fits
    only_with_checkpointing = list(planner.suggestions(suggested[1].setting.peak - 1))
    assert [each.setting.gradient_checkpointing for each in only_with_checkpointing if each.value == "nf4"] == [True]
    assert not list(quantised.suggestions(1))


def test_the_blocks_of_a_file_are_suggested_and_hold_the_same_numbers():
    config = {"model": "smollm2", "data": "none", "dtype": "fp32", "quantize": "none", "device": "cuda"}
    planner = Planner(TrainConfig.from_dict(config), rows(30))
    plain = planner.fitting(None)[0]
    (suggested,) = planner.suggestions(plain.peak - 1)
    assert (suggested.flag, suggested.value, suggested.same_result) == ("quantize", "blocks", True)


def test_a_narrower_dtype_is_suggested_where_nothing_else_fits(planned):
    planner = planned(micro_batch_tokens=400)
    (with_checkpointing,) = (each for each in planner.fitting(None) if each.gradient_checkpointing)
    suggested = list(planner.suggestions(with_checkpointing.peak - 1))
    assert [each.flag for each in suggested] == ["dtype", "max_length"]
    assert suggested[1].value == 300
    assert suggested[1].rows_cut == 5


def test_kernels_of_bf16_are_counted_up_to_the_bound(planned):
    one, many = (planned(dtype="bf16", device="cpu", max_steps=steps).asked().peak for steps in (1, 10_000))
    more = planned(dtype="bf16", device="cpu", max_steps=20_000).asked().peak
    assert one < many
    assert abs(more - many) < 50_000_000  # the process itself may have grown between them
