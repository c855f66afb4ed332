"""Rows of a few tokens trained whole: against rows copied into the embedding, and against PEFT."""

import copy
import warnings

import pytest
import torch
from torch import nn

import lorakit
from adapter.models import randomise
from lorakit import Adapter, LoRAConfig
from lorakit.errors import AdapterError, AdapterFileError, AdapterMismatchError, ConfigError, TargetError
from tiny_models import tiny_gpt2, tiny_llama

TOKENS = (7, 3, 200)
IDS = torch.tensor([[7, 1, 3, 3, 50], [200, 7, 9, 10, 11], [4, 5, 6, 8, 9]])


def adapted(model, **config):
    handle = lorakit.attach(
        model, LoRAConfig(**{"r": 4, "target_modules": ["down_proj"], "trainable_tokens": TOKENS} | config)
    )
    randomise(handle)
    return handle


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-6), (torch.float32, 1e-4), (torch.bfloat16, 0.1)])
def test_the_rows_stand_in_the_embedding_and_in_a_head_tied_to_it(tied, dtype, tolerance):
    model = tiny_llama(tie_word_embeddings=tied).to(dtype)
    fresh = model(IDS).logits
    handle = lorakit.attach(model, LoRAConfig(r=4, target_modules=["down_proj"], trainable_tokens=TOKENS))
    assert torch.equal(model(IDS).logits, fresh)
    randomise(handle)
    got, value = model(IDS).logits, handle.extract()
    handle.activate({"default": 0.5})
    half = model(IDS).logits
    handle.detach()
    for share, seen in ((1.0, got), (0.5, half)):
        reference = copy.deepcopy(model).double()
        weight = reference.model.embed_tokens.weight
        with torch.no_grad():
            rows = value.tokens["model.embed_tokens"].double()
            weight[list(TOKENS)] += share * (rows - weight[list(TOKENS)])
            for path in value.factors:
                reference.get_submodule(path).weight += share * value.delta(path).double()
        error = (seen.double() - reference(IDS).logits).norm() / reference(IDS).logits.norm()
        assert error.item() < tolerance
    assert torch.equal(model(IDS).logits, fresh)


def test_only_the_rows_are_trained():
    model = tiny_llama()
    handle = adapted(model)
    names = handle.trainable_tensors()
    assert names["model.embed_tokens.tokens"].shape == (3, 32)
    assert "lm_head.tokens" not in names
    assert len(handle.trainable_parameters()) == len(names)
    model(IDS[2:]).logits[..., :3].sum().backward()  # none of the tokens, nor their logits
    assert not names["model.embed_tokens.tokens"].grad.any()
    model(IDS).logits.square().sum().backward()
    assert names["model.embed_tokens.tokens"].grad.abs().sum(-1).all()
    assert all(p.grad is None for n, p in model.named_parameters() if "lorakit_updates" not in n)


@pytest.mark.parametrize("tied", [True, False])
def test_saved_loaded_merged_and_routed(tied, tmp_path):
    model = tiny_llama(tie_word_embeddings=tied)
    plain = copy.deepcopy(model)
    handle = adapted(model)
    expected = model(IDS).logits
    handle.save("default", tmp_path / "a")
    value = Adapter.load(tmp_path / "a")
    assert value.digest() == handle.extract().digest()
    value.save(tmp_path / "b")
    for name in ("adapter_model.safetensors", "adapter_config.json"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()
    again = lorakit.attach(plain, tmp_path / "a")
    assert torch.equal(plain(IDS).logits, expected)
    with again.route(["default", None, "default"]):
        routed = plain(IDS).logits
    assert torch.allclose(routed[0], expected[0], atol=1e-5)
    with again.disabled():
        assert torch.allclose(routed[1], plain(IDS).logits[1], atol=1e-5)
    with again.merged():
        assert torch.allclose(plain(IDS).logits, expected, atol=1e-4)
    assert torch.allclose(again.merge()(IDS).logits, expected, atol=1e-4)


def test_gpt2_has_another_name_for_its_embedding():
    model = tiny_gpt2()
    handle = adapted(model, target_modules=["c_fc"])
    assert set(handle.extract().tokens) == {"transformer.wte"}
    with handle.merged():
        merged = model(IDS).logits
    assert torch.allclose(model(IDS).logits, merged, atol=1e-4)


@pytest.mark.parametrize("tied", [True, False])
def test_peft_reads_ours_and_we_read_peft(tied, tmp_path):
    peft = pytest.importorskip("peft")
    ours = tiny_llama(tie_word_embeddings=tied)
    theirs = copy.deepcopy(ours)
    handle = adapted(ours)
    handle.save("default", tmp_path / "ours")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = peft.PeftModel.from_pretrained(theirs, tmp_path / "ours")
        assert torch.allclose(model(IDS).logits, ours(IDS).logits, atol=1e-4)
        model.save_pretrained(tmp_path / "theirs")
    fresh = tiny_llama(tie_word_embeddings=tied)
    lorakit.attach(fresh, tmp_path / "theirs")
    assert torch.allclose(fresh(IDS).logits, ours(IDS).logits, atol=1e-4)


def test_what_cannot_be_meant_is_an_error(tmp_path):
    with pytest.raises(ConfigError, match=r"(?s)from 0 \(got -1\).*twice"):
        LoRAConfig(trainable_tokens=(1, 1, -1))
    for config, message in [
        ({"trainable_tokens": (999,)}, r"999 is no row of model\.embed_tokens, which has 272"),
        ({"target_modules": ["embed_tokens"]}, "embed_tokens cannot also be adapted"),
        ({"modules_to_save": ("lm_head",)}, "lm_head cannot also be adapted or trained whole"),
    ]:
        with pytest.raises(TargetError, match=message):
            adapted(tiny_llama(), **config)
    with pytest.raises(TargetError, match="has 0 embeddings"):
        lorakit.attach(nn.Sequential(nn.Linear(3, 3)), LoRAConfig(r=2, trainable_tokens=(1,)))
    handle = adapted(tiny_llama())
    value = handle.extract()
    with pytest.raises(AdapterError, match="token rows"):
        value.scaled(2.0)
    for format in ("vllm", "gguf", "loralib"):
        with pytest.raises(AdapterFileError, match="rows of tokens trained whole"):
            value.save(tmp_path / format, format, model=handle.model)
    with pytest.raises(AdapterMismatchError, match=r"embed_tokens\.tokens"):
        lorakit.attach(tiny_llama(hidden_size=64), value, check_base=False)


def test_several_adapters_on_one_embedding():
    model = tiny_llama()
    handle = adapted(model)
    handle.add("other", LoRAConfig(r=2, target_modules=["embed_tokens"]))
    randomise(handle, "other")
    handle.activate({"default": 1.0, "other": 1.0})
    unmerged = model(IDS).logits
    with handle.merged():
        assert torch.allclose(model(IDS).logits, unmerged, atol=1e-4)
