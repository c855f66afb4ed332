"""Merging back into a GGUF file: only what changes is rewritten, in its own format, and judged by what it answers."""

import json
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from transformers import Qwen2Config, Qwen2ForCausalLM

import lorakit
from gguf_files import write_gguf, write_renamed
from lorakit import LoRAConfig, models, quantised_base
from lorakit.checkpoints.gguf import GgufWeights
from lorakit.errors import AdapterError, ConfigError, MergeError
from lorakit.merging import CERTIFICATE, merge
from lorakit.merging.requantise import requantise
from lorakit.quant.blocks import BLOCKS
from lorakit.quant.int8 import Int8
from lorakit.quant.nf4 import NF4
from lorakit.quant.tensor import QuantizedTensor, as_dense, format_of, quantised
from tiny_models import DECODER_SIZES, byte_tokenizer, tiny_llama

Q = gguf.GGMLQuantizationType


def base(tmp_path, kind, **settings):
    sizes = {"hidden_size": 64, "intermediate_size": 64, "initializer_range": 0.05, **settings}
    return write_gguf(tmp_path / "tiny.gguf", tiny_llama(vocabulary=len(byte_tokenizer()), **sizes), kind)


def adapter_of(spec, size=0.05, quantize="auto", **settings):
    """One that changes much: of a random B."""
    model = models.load_weights(spec, "fp32", "cpu", quantize)
    handle = lorakit.attach(model, LoRAConfig(**{"r": 4, **settings}), seed=0)
    torch.manual_seed(1)
    for parameter in handle.trainable_parameters():
        if parameter.ndim == 1 or parameter.shape[1] == 4:
            parameter.data = torch.randn_like(parameter) * size
    return handle.extract(), handle


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("LORAKIT_CACHE", str(tmp_path / "cache"))


@pytest.mark.parametrize("kind", ["Q8_0", "Q5_1", "Q5_0", "Q4_1", "Q4_0", "F16"])
def test_the_new_file_is_the_old_one_with_the_merged_weights_in_its_own_types(kind, tmp_path):
    spec = base(tmp_path, Q[kind])
    value, handle = adapter_of(spec, target_modules=["q_proj", "k_proj", "down_proj"])
    result = merge(adapters=[value], model=spec, output=tmp_path / "out", requantize=True, verify=False, accept=True)
    assert (result.how, result.model) == ("requantised", tmp_path / "out/tiny-merged.gguf")
    assert result.report.dtypes == (kind,)
    assert {file.name for file in (tmp_path / "out").iterdir()} == {"tiny-merged.gguf", CERTIFICATE}
    old, new = (gguf.GGUFReader(path) for path in (spec, result.model))
    assert [t.name for t in old.tensors] == [t.name for t in new.tensors]
    changed = {t.name for t, u in zip(old.tensors, new.tensors, strict=True) if not np.array_equal(t.data, u.data)}
    assert changed == {f"blk.{i}.{n}.weight" for i in (0, 1) for n in ("attn_q", "attn_k", "ffn_down")}
    assert GgufWeights(result.model, models.load_skeleton(result.model)).file.header_bytes == (
        GgufWeights(Path(spec), models.load_skeleton(spec)).file.header_bytes
    )
    ours = models.load_weights(result.model, "fp32", "cpu")
    with handle.merged():
        for name, own in ours.named_parameters():
            expected = handle.model.get_parameter(name)
            if name.endswith(("q_proj.weight", "k_proj.weight", "down_proj.weight")):
                assert isinstance(own, QuantizedTensor) == (kind != "F16")
                if kind == "F16":
                    assert torch.equal(own, expected.half().float())
                else:
                    again = quantised(as_dense(expected), BLOCKS[kind], torch.float32)
                    assert torch.equal(own.parts[0], again.parts[0]), name
    layers = {
        row["name"]: row["survived"] for row in json.loads((tmp_path / "out" / CERTIFICATE).read_text())["layers"]
    }
    assert len(layers) == 6
    assert all(0 < share < 1.2 for share in layers.values())


def test_dora(tmp_path):
    spec = base(tmp_path, Q.Q8_0)
    value, handle = adapter_of(spec, delta="dora")
    merged = merge(adapters=[value], model=spec, output=tmp_path / "out", requantize=True, verify=False)
    near(models.load_weights(merged.model, "fp32", "cpu"), handle)


def test_biases(tmp_path):
    torch.manual_seed(0)
    config = Qwen2Config(**{**DECODER_SIZES, "hidden_size": 64, "intermediate_size": 64, "initializer_range": 0.1})
    path = write_renamed(tmp_path / "m.gguf", Qwen2ForCausalLM(config).eval(), "qwen2")

    def skeleton():
        with torch.device("meta"):
            return Qwen2ForCausalLM(config)

    handle = lorakit.attach(quantised_base.from_blocks(path, skeleton(), torch.device("cpu")), LoRAConfig(bias="all"))
    torch.manual_seed(1)
    for parameter in handle.trainable_parameters():
        parameter.data = torch.randn_like(parameter) * 0.05
    there = skeleton()
    weights = GgufWeights(path, there)
    report = requantise(weights, lorakit.attach(there, handle.extract(), check_base=False), tmp_path / "n.gguf", None)
    assert report.dtypes == ("F32", "Q8_0")
    assert sum(layer.name.endswith("bias") for layer in report.layers) == 6
    near(quantised_base.from_blocks(tmp_path / "n.gguf", skeleton(), torch.device("cpu")), handle)


def near(merged, handle):
    """What requantising adds is small beside what the adapter does."""
    ids = torch.arange(8).view(1, 8)
    with torch.no_grad():
        ours, theirs = merged(ids).logits, handle.model(ids).logits
        with handle.disabled():
            plain = handle.model(ids).logits
    assert (ours - theirs).norm() < 0.1 * (plain - theirs).norm()


def test_it_is_judged_by_what_it_answers(tmp_path):
    spec = base(tmp_path, Q.Q8_0)
    value, _ = adapter_of(spec)
    result = merge(adapters=[value], model=spec, output=tmp_path / "good", requantize=True)
    assert result.proof.passed
    assert 0.8 < result.report.survived <= 1
    assert models.load_model(result.model)[1].chat_template
    with pytest.raises(
        MergeError, match=r"differs from the adapter: mean KL[\s\S]*Nothing was written[\s\S]*dense model"
    ):
        merge(adapters=[value], model=spec, output=tmp_path / "strict", requantize=True, max_kl=0.0)
    assert not (tmp_path / "strict").exists()
    most = result.proof.base.mean_kl
    chosen = merge(adapters=[value], model=spec, output=tmp_path / "loose", requantize=True, max_kl=10 * most)
    assert chosen.proof.limit == pytest.approx(most / 2)


def test_a_small_update_does_not_survive_in_four_bits_unless_rounded_stochastically(tmp_path):
    spec = base(tmp_path, Q.Q4_0)
    value, _ = adapter_of(spec, size=0.002)
    with pytest.raises(MergeError, match=r"of the update would survive rounding to Q4_0[\s\S]*round stochastically"):
        merge(adapters=[value], model=spec, output=tmp_path / "lost", requantize=True, verify=False)
    assert not (tmp_path / "lost").exists()
    settings = {"requantize": True, "verify": False, "rounding": "stochastic"}
    files = [
        merge(adapters=[value], model=spec, output=tmp_path / f"{i}", seed=seed, **settings)
        for i, seed in enumerate((0, 0, 1))
    ]
    assert files[0].report.survived > 0.8
    contents = [result.model.read_bytes() for result in files]
    assert contents[0] == contents[1] != contents[2]


def test_what_has_no_file_or_cannot_take_it_is_refused_by_name(tmp_path):
    spec = base(tmp_path, Q.Q8_0)

    def refused(message, error=ConfigError, value=None, model=spec, **settings):
        with pytest.raises(error, match=message):
            merge(adapters=[value or made], model=model, output=tmp_path / "out", requantize=True, **settings)
        assert not (tmp_path / "out").exists()

    made, _ = adapter_of(spec)
    refused("takes no dtype", dtype="bf16")
    in_nf4, _ = adapter_of(spec, quantize="nf4")
    refused("held in nf4, for which there is no file", value=in_nf4)
    tiny_llama().save_pretrained(tmp_path / "folder")
    plain, _ = adapter_of(str(tmp_path / "folder"))
    refused("is no GGUF file", value=plain, model=str(tmp_path / "folder"))
    head, _ = adapter_of(spec, target_modules=["lm_head"])
    refused(r"lm_head\.weight: shares its tensor in the file", MergeError, value=head)


def test_formats_that_are_only_read_are_listed(tmp_path):
    spec = base(tmp_path, Q.Q6_K, hidden_size=256, intermediate_size=256)
    value, _ = adapter_of(spec, target_modules=["q_proj"])
    message = r"q_proj\.weight: stored as Q6_K, which lorakit reads and does not write[\s\S]*dense model"
    with pytest.raises(MergeError, match=message):
        merge(adapters=[value], model=spec, output=tmp_path / "out", requantize=True)


def test_another_template_than_the_files_is_refused(tmp_path):
    spec = base(tmp_path, Q.Q8_0)
    value, _ = adapter_of(spec)
    value.save(tmp_path / "adapter")
    tokenizer = models.load_tokenizer(spec)
    tokenizer.chat_template += " "
    tokenizer.save_pretrained(tmp_path / "adapter")
    with pytest.raises(MergeError, match="trained with another chat template"):
        merge(adapters=[tmp_path / "adapter"], output=tmp_path / "out", model=spec, requantize=True)


@pytest.mark.parametrize("format", [*(f for f in BLOCKS.values() if f.pack), NF4(), Int8()], ids=lambda f: f.name)
def test_stochastic_rounding_has_the_right_mean_and_only_two_outcomes(format):
    torch.manual_seed(0)
    W = torch.randn(1, 64).repeat(400, 1)
    nearest = quantised(W[:1], format, torch.float32).dense()
    draws = torch.Generator().manual_seed(3)
    found = quantised(W, format, torch.float32, draws=draws).dense()
    assert format_of(quantised(W, format, torch.float32)) == format.name
    for column in range(64):
        values = found[:, column].unique()
        assert len(values) <= 2
        assert (values - nearest[0, column]).abs().min() < 1e-6
    step = (found.amax(0) - found.amin(0)).clamp(min=1e-3)
    inside = (W[0] > found.amin(0)) & (W[0] < found.amax(0))  # beyond a format's end there is one outcome
    assert inside.float().mean() > 0.8
    off = ((found.mean(0) - W[0]) / step)[inside]
    assert off.abs().max() < 5 * 0.5 / 400**0.5


def test_in_memory_the_report_knows_the_draws(tmp_path):
    spec = base(tmp_path, Q.Q4_0)
    _, handle = adapter_of(spec, size=0.002)
    assert handle.merge_report(seed=0).survived > 0.8 > handle.merge_report().survived
    with pytest.raises(AdapterError, match="lorakit merge --requantize"):
        handle.merge(minimum_survival=0)
