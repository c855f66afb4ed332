"""LoftQ's start: what it makes up for, against fp64 and against PEFT; where it begins, and what is refused."""

import gguf
import pytest
import torch
from peft.utils.loftq_utils import _low_rank_decomposition

import lorakit
from gguf_files import write_gguf
from lorakit import LoRAConfig, models
from lorakit.core import initializers
from lorakit.core.layer import base_parameters
from lorakit.errors import ConfigError, ModelError, TargetError
from lorakit.merging import merge
from lorakit.originals import starts_from_original
from lorakit.quant.nf4 import NF4
from lorakit.quant.tensor import quantised, stored_tensors
from tiny_models import byte_tokenizer, tiny_gpt2, tiny_llama

IDS = torch.arange(20)[None]


def save(model, folder):
    model.save_pretrained(folder)
    byte_tokenizer(eos="<|im_end|>").save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def base_folder(tmp_path_factory):
    model = tiny_llama(hidden_size=64, intermediate_size=96, initializer_range=0.1)
    return save(model, tmp_path_factory.mktemp("base"))


@pytest.fixture(scope="module")
def blocks(tmp_path_factory):
    """(a GGUF file of blocks, the model it was made of)."""
    folder = tmp_path_factory.mktemp("gguf")
    model = tiny_llama(vocabulary=len(byte_tokenizer()), hidden_size=64, initializer_range=0.1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LORAKIT_CACHE", str(folder / "cache"))
        path = write_gguf(folder / "tiny.gguf", model, gguf.GGMLQuantizationType.Q4_0)
        yield path, save(model, folder / "dense")


def load(spec, quantize="auto"):
    return models.load_weights(spec, "fp32", "cpu", quantize)


@torch.no_grad()
def logits(model):
    return model(IDS).logits


def loftq(**changes):
    return LoRAConfig(**{"r": 8, "alpha": 24.0, "init": "loftq", **changes})


def assert_makes_up_for_what_was_lost(dense, base, handle):
    """Each layer's s B A is the best approximation of W - Q of its rank, by an SVD in fp64."""
    value = handle.extract()
    assert value.factors
    for path, f in value.factors.items():
        W, Q = dense.get_submodule(path).weight.detach().double(), base.get_submodule(path).weight.dense(torch.float64)
        U, S, V = torch.linalg.svd(W - Q, full_matrices=False)
        best = U[:, : f.r] @ torch.diag(S[: f.r]) @ V[: f.r]
        delta = value.delta(path).double()
        torch.testing.assert_close(delta, best, rtol=1e-4, atol=1e-6 * float(W.abs().max()))
        assert float((W - Q - delta).norm()) < 0.999 * float((W - Q).norm())


@pytest.mark.parametrize("quantize", ["nf4", "int8"])
@pytest.mark.parametrize("changes", [{}, {"scaling": "rslora", "rank_pattern": {"q_proj": 3}}], ids=str)
def test_makes_up_for_what_quantising_lost_and_leaves_the_base(base_folder, quantize, changes):
    dense, base = load(base_folder), load(base_folder, quantize)
    before = {k: p.clone() for n, t in base_parameters(base).items() for k, p in stored_tensors(n, t.detach())}
    exact, lost = logits(dense), logits(base)
    handle = lorakit.attach(base, lorakit.starts_from_original(base, loftq(**changes)))
    assert_makes_up_for_what_was_lost(dense, base, handle)
    assert float((logits(base) - exact).norm()) < float((lost - exact).norm())
    with handle.disabled():
        assert torch.equal(logits(base), lost)
    handle.detach()
    after = {k: p for n, t in base_parameters(base).items() for k, p in stored_tensors(n, t.detach())}
    assert all(torch.equal(part, after[name]) for name, part in before.items())


def test_dora_begins_as_the_corrected_layer(base_folder):
    base = load(base_folder, "nf4")
    starts = starts_from_original(base, loftq(delta="dora"))
    handle = lorakit.attach(base, starts)
    found = logits(base)
    handle.detach()
    lorakit.attach(base, starts_from_original(base, loftq()))
    torch.testing.assert_close(found, logits(base), rtol=1e-4, atol=1e-4)


def test_layers_that_are_not_quantised_begin_as_by_default(base_folder):
    base = load(base_folder, "nf4")
    handle = lorakit.attach(base, starts_from_original(base, loftq(target_modules=("q_proj", "embed_tokens")), seed=3))
    plain = load(base_folder)
    default = lorakit.attach(plain, loftq(init="default", target_modules=("embed_tokens",)), seed=3)
    ours, theirs = handle.extract().factors["model.embed_tokens"], default.extract().factors["model.embed_tokens"]
    assert torch.equal(ours.A, theirs.A)
    assert torch.equal(ours.B, theirs.B)


@pytest.mark.parametrize("iterations", [1, 4])
def test_is_pefts_where_the_scale_is_one(iterations):
    """PEFT's own loop needs bitsandbytes; its decomposition does not."""
    W = torch.empty(64, 128).normal_(generator=torch.Generator().manual_seed(0))

    def nf4(weight):
        return quantised(weight.reshape(64, 128), NF4(), torch.float32).dense().reshape(weight.shape)

    residual = W
    for _ in range(iterations):
        Q = nf4(residual)
        parts = _low_rank_decomposition(W - Q, reduced_rank=8)
        residual = W - parts["L"] @ parts["R"]
    A, B, ours = initializers.loftq(W[None], 8, 1.0, nf4, iterations)
    torch.testing.assert_close(ours[0].float(), Q, rtol=0, atol=2e-2 if iterations > 1 else 0)
    if iterations == 1:
        torch.testing.assert_close((B @ A)[0].float(), parts["L"] @ parts["R"], rtol=1e-4, atol=1e-5)
        signs = torch.sign((A[0].float() * parts["R"]).sum(1))
        torch.testing.assert_close(A[0].float() * signs[:, None], parts["R"], rtol=1e-3, atol=1e-4)
        torch.testing.assert_close(B[0].float() * signs, parts["L"], rtol=1e-3, atol=1e-4)


def test_a_gguf_file_needs_the_model_it_was_made_of(blocks):
    path, original = blocks
    base = load(path)
    with pytest.raises(ConfigError, match=r"holds only what was left of them: name the dense model .*--loftq-original"):
        starts_from_original(base, loftq())
    handle = lorakit.attach(base, starts_from_original(base, loftq(), original))
    assert_makes_up_for_what_was_lost(load(original), base, handle)


def test_of_a_gguf_file_quantised_anew_its_own_numbers_are_the_original(blocks):
    path, _ = blocks
    base = load(path, "nf4")
    handle = lorakit.attach(base, starts_from_original(base, loftq()))
    assert_makes_up_for_what_was_lost(load(path, "none"), base, handle)


def test_what_is_merged_is_the_base_as_it_is_held_and_the_update(base_folder, tmp_path):
    base = load(base_folder, "nf4")
    handle = lorakit.attach(base, starts_from_original(base, loftq()))
    handle.save("default", tmp_path / "adapter")
    merge(adapters=[tmp_path / "adapter"], output=tmp_path / "merged", dtype="fp32")
    torch.testing.assert_close(logits(load(str(tmp_path / "merged"))), logits(base), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("make", "config", "error", "message"),
    [
        (lambda f: load(f), loftq(), ConfigError, "this base is not quantised: load it with quantize nf4 or int8"),
        (lambda f: load(f, "nf4"), loftq(target_modules=("embed_tokens",)), ConfigError, "base is not quantised"),
        (lambda f: load(f, "nf4"), loftq(init="pissa"), ConfigError, "init 'pissa' needs no original"),
        (lambda f: load(f, "nf4"), loftq(r=65), ConfigError, "q_proj: init 'loftq': a matrix of 64 x 64 has no 65"),
        (lambda f: load(f, "nf4"), loftq(target_modules=("q_prj",)), TargetError, "did you mean q_proj"),
    ],
)
def test_refuses_by_name(base_folder, make, config, error, message):
    with pytest.raises(error, match=message):
        starts_from_original(make(base_folder), config)


def test_refuses_another_models_weights(base_folder, tmp_path):
    base = load(base_folder, "nf4")
    other = save(tiny_llama(hidden_size=64, intermediate_size=96, seed=1, initializer_range=0.1), tmp_path / "other")
    with pytest.raises(ModelError, match="is not what this LlamaForCausalLM was quantised from") as found:
        starts_from_original(base, loftq(), other)
    assert "q_proj.weight: differs from the base's by 14" in str(found.value)
    narrow = save(tiny_llama(hidden_size=32, initializer_range=0.1), tmp_path / "narrow")
    with pytest.raises(ModelError, match=r"q_proj.weight: \(32, 32\), in the base \(64, 64\)"):
        starts_from_original(base, loftq(), narrow)
    with pytest.raises(ModelError, match="not there"):
        starts_from_original(base, loftq(), save(tiny_gpt2(), tmp_path / "gpt2"))


def test_refuses_an_original_of_the_very_numbers(blocks):
    path, _ = blocks
    with pytest.raises(ModelError, match="nothing that was lost"):
        starts_from_original(load(path), loftq(), path)


def test_the_config_alone_says_what_to_attach(base_folder):
    with pytest.raises(ConfigError, match=r"attach what lorakit\.starts_from_original\(model, config\) gives"):
        lorakit.attach(load(base_folder, "nf4"), loftq())
