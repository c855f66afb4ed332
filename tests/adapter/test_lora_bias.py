"""Biases of B (`lora_bias`) over every kind of site that carries them: what is added is s (B A x + c)."""

import copy
from dataclasses import replace

import pytest
import torch
from torch import nn

import lorakit
from adapter.models import CASES, WITH_LORA_BIAS, Case, randomise, trained, weight_at
from lorakit import Adapter, LoRAConfig
from lorakit.adapter.combine import METHODS
from lorakit.adapter.compress import compress
from lorakit.errors import AdapterError, AdapterFileError, AdapterMismatchError, ConfigError, TargetError
from lorakit.formats.peft import CONFIG_FILE, TENSOR_FILE

cases = pytest.mark.parametrize("case", WITH_LORA_BIAS.values(), ids=WITH_LORA_BIAS)
EXACT = ("cat", "linear", "svd")


def config(case: Case, **changes) -> LoRAConfig:
    return LoRAConfig(**{"r": 4, "alpha": 8.0, "lora_bias": True, **case.what, **changes})


def with_three(case: Case, dtype: torch.dtype = torch.float32, **changes):
    """A model with adapters "a" (active) and "b", which have such biases, and "c", which has none."""
    model = case.build(dtype)
    handle = lorakit.attach(model, config(case, **changes), name="a")
    handle.add("b", config(case, r=2, alpha=3.0, scaling="rslora"))
    handle.add("c", config(case, lora_bias=False, init="gaussian"))
    for name in "abc":
        randomise(handle, name, 0.1)
    return model, handle


def relative(got: torch.Tensor, expected: torch.Tensor) -> float:
    got, expected = got.detach().double(), expected.detach().double()
    return float((got - expected).norm() / expected.norm())


def without_bias(model: nn.Module, value: Adapter) -> list[str]:
    return [path for path in value.factors if model.get_submodule(path).bias is None]


def give_zeros(layer: nn.Module, outputs: int) -> None:
    layer.bias = nn.Parameter(torch.zeros(outputs, dtype=layer.weight.dtype), requires_grad=False)


# ---------------------------------------------------------------- in a model


@cases
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-6), (torch.float32, 1e-5), (torch.bfloat16, 5e-2)])
@pytest.mark.parametrize("weights", [{"a": 1.0}, {"a": 0.7, "b": -0.3, "c": 1.5}], ids=str)
def test_it_computes_what_weights_and_biases_with_it_inside_compute(case, dtype, tolerance, weights):
    """Active = the same model with s B A in its weights and s c in its biases, in fp64."""
    model, handle = with_three(case, dtype)
    handle.activate(weights)
    got = case.run(model)
    values = {name: handle.extract(name) for name in weights}
    reference = copy.deepcopy(handle.detach()).double()
    for path in values["a"].factors:
        layer, (weight, transposed) = reference.get_submodule(path), weight_at(reference, path)
        if layer.bias is None:
            give_zeros(layer, len(values["a"].factors[path].B))
        for name, factor in weights.items():
            f, delta = values[name].factors[path], values[name].delta(path).double()
            weight.data += factor * (delta.mT if transposed else delta)
            if f.bias is not None:
                layer.bias.data += factor * values[name].scale(path) * f.bias.double()
    assert relative(got, case.run(reference)) < tolerance


@cases
def test_a_fresh_one_changes_nothing_and_detaching_gives_every_bit_back(case):
    model = case.build()
    before, state = case.run(model), {k: v.clone() for k, v in model.state_dict().items()}
    handle = lorakit.attach(model, config(case))
    biases = {name: t for name, t in handle.trainable_tensors().items() if name.endswith(".B.bias")}
    assert {name.removesuffix(".B.bias") for name in biases} == set(handle.extract().factors)
    assert all(t.dtype == torch.float32 and t.requires_grad and not t.any() for t in biases.values())
    assert torch.equal(case.run(model), before)
    case.run(model).sin().sum().backward()
    assert all(t.grad is not None for t in biases.values())
    with torch.no_grad():
        for tensor in biases.values():
            tensor.add_(0.3)
    assert not torch.allclose(case.run(model), before)
    handle.detach()
    assert torch.equal(case.run(model), before)
    assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items())


@pytest.mark.parametrize(("name", "last", "dim"), [("mlp", "second", -1), ("convolutions", "three", 1)])
@pytest.mark.parametrize("dropout", [0.0, 0.5])  # fused, and not
def test_its_gradient_is_the_sum_over_places_and_dropout_leaves_it_alone(name, last, dim, dropout):
    case = WITH_LORA_BIAS[name]
    model = case.build()
    handle = lorakit.attach(model, config(case, dropout=dropout, target_modules=(last,)))
    randomise(handle)
    model.train()
    y = case.run(model)
    y.retain_grad()
    y.sin().sum().backward()
    tensors, scale = handle.trainable_tensors(), handle.extract().scale(last)
    torch.testing.assert_close(tensors[f"{last}.B.bias"].grad, scale * y.grad.transpose(dim, -1).flatten(0, -2).sum(0))
    with torch.no_grad():
        tensors[f"{last}.B"].zero_()
        with handle.disabled():
            base = case.run(model)
        change = (case.run(model) - base).transpose(dim, -1)
    torch.testing.assert_close(change, (scale * tensors[f"{last}.B.bias"]).expand_as(change), rtol=1e-4, atol=1e-5)


@cases
@pytest.mark.parametrize("few", [False, True])
def test_each_row_of_a_route_gets_its_own(case, few):
    model, handle = with_three(case)
    torch.manual_seed(1)
    rows = {key: torch.cat([value, value.flip(0)])[:4] for key, value in case.inputs().items()}
    if few and "input_ids" in rows:
        rows = {"input_ids": rows["input_ids"][:, :2]}
    names = ["a", None, "c", "b"]

    def run() -> torch.Tensor:
        output = model(**rows)
        return output if isinstance(output, torch.Tensor) else output[0]

    with torch.no_grad() if few else torch.enable_grad():
        expected = []
        for row, name in enumerate(names):
            handle.activate(name)
            expected.append(run()[row])
        with handle.route(names):
            got = run()
    torch.testing.assert_close(got, torch.stack(expected), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("init", ["default", "random"])
def test_the_start_is_zero_or_random_and_that_of_factors_is_what_it_was(init):
    case = WITH_LORA_BIAS["mlp"]
    starts = []
    for lora_bias in (True, False):
        handle = lorakit.attach(case.build(), config(case, init=init, lora_bias=lora_bias))
        starts.append(handle.extract().factors)
    for path, f in starts[0].items():
        assert torch.equal(f.A, starts[1][path].A)
        assert torch.equal(f.B, starts[1][path].B)
        assert bool(f.bias.any()) == (init == "random")
        assert f.bias.abs().max() <= 4**-0.5
    with pytest.raises(ConfigError, match=r"lora_bias: goes with init 'default' or 'random'.*got init 'orthogonal'"):
        config(case, init="orthogonal")


@pytest.mark.parametrize(
    ("name", "kind"),
    [("embedding", "Embedding"), ("attention", "MultiheadAttention"), ("qwen3 moe", "stacked experts")],
)
def test_layers_that_cannot_have_one_are_named_and_nothing_is_touched(name, kind):
    case, model = CASES[name], CASES[name].build()
    with pytest.raises(TargetError, match=rf"{case.some_path}: lora_bias=True is not supported for {kind}"):
        lorakit.attach(model, config(case))
    assert not any("lorakit" in key for key in model.state_dict())


# ---------------------------------------------------------------- merged


@cases
@pytest.mark.parametrize("bias", ["none", "lora_only"])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 6e-2)])
def test_merged_equals_active_and_a_layer_without_bias_is_refused_by_name(case, bias, dtype, tolerance):
    lacking = without_bias(case.build(), trained(case.build(), config(case)))
    if len(lacking) == len(trained(case.build(), config(case)).factors):
        bias = "none"  # there is none to train
    model, handle = with_three(case, dtype, bias=bias)
    expected = case.run(model)
    if lacking:
        for call in (handle.merge, handle.merge_report, handle.merged().__enter__):
            with pytest.raises(AdapterError, match=r"(?s)cannot be merged.*lora_bias.*none of their own") as caught:
                call()
            assert all(f"- {path}\n" in str(caught.value) for path in lacking[:20])
        assert torch.equal(case.run(model), expected)
        handle.activate("c")
        with handle.merged():
            pass
    for path in lacking:
        give_zeros(model.get_submodule(path), len(handle.extract("a").factors[path].B))
    for active in ("a", {"a": 0.7, "b": -0.3, "c": 1.0}):
        handle.activate(active)
        expected = case.run(model)
        with handle.merged():
            assert relative(case.run(model), expected) < tolerance
        assert torch.equal(case.run(model), expected)
    path = next(iter(handle.extract("a").factors))
    names = [layer.name for layer in handle.merge_report().layers]
    assert {f"{path}.weight", f"{path}.bias"} <= set(names)
    assert handle.merge(minimum_survival=0.5) is model
    assert relative(case.run(model), expected) < tolerance


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_folded_bias_is_the_fp64_sum_rounded_once(dtype):
    case = WITH_LORA_BIAS["gpt2"]
    model, handle = with_three(case, dtype, bias="lora_only")
    values, weights = [handle.extract(name) for name in "abc"], [0.7, -0.3, 1.0]
    base = {path: model.get_submodule(path).bias.detach().double() for path in values[0].factors}
    handle.activate(dict(zip("abc", weights, strict=True)))
    with handle.merged():
        for path, own in base.items():
            expected = own + weights[0] * (values[0].biases[path].double() - own)
            for value, weight in zip(values[:2], weights, strict=False):
                expected = expected + weight * value.scale(path) * value.factors[path].bias.double()
            folded = model.get_submodule(path).bias
            assert relative(folded, expected) < (1e-6 if dtype == torch.float32 else 3e-3)


# ---------------------------------------------------------------- as a value


@cases
def test_files_give_the_same_bytes_and_the_same_adapter(case, tmp_path):
    model = case.build()
    handle = lorakit.attach(model, config(case))
    randomise(handle)
    expected, value = case.run(model), handle.extract()
    handle.save("default", tmp_path / "a")
    Adapter.load(tmp_path / "a").save(tmp_path / "b")
    lorakit.attach(handle.detach(), tmp_path / "b", name="x").save("x", tmp_path / "c")
    for file in (CONFIG_FILE, TENSOR_FILE):
        assert len({(tmp_path / folder / file).read_bytes() for folder in "abc"}) == 1
    assert torch.equal(case.run(model), expected)
    assert lorakit.adapters(model).extract("x").digest() == value.digest()
    path, f = next(iter(value.factors.items()))
    other = replace(value, factors={**value.factors, path: replace(f, bias=f.bias + 1)})
    assert other.digest() != value.digest()
    plain = replace(value, factors={path: replace(f, bias=None) for path, f in value.factors.items()})
    biases = sum(f.bias.numel() for f in value.factors.values())
    assert value.nbytes - plain.nbytes == 4 * biases
    assert value.summary()["parameters"] - plain.summary()["parameters"] == biases
    torch.testing.assert_close(value.spectrum().energy, plain.spectrum().energy, rtol=0, atol=0)
    handle = lorakit.adapters(model)
    with pytest.raises(AdapterMismatchError, match=rf"missing: {path}\.B\.bias"):
        handle.add("plain", plain)


@cases
def test_scaled_folded_and_compressed_ones_do_the_same(case):
    model, handle = with_three(case)
    value, rank = handle.extract("b"), 2
    for changed, weight in ((value.scaled(-1.5), -1.5), (value.folded(), 1.0), (value.compress(rank=rank), 1.0)):
        handle.activate({"b": weight})
        expected = case.run(model)
        handle.load(changed, "changed", replace=True)
        handle.activate("changed")
        torch.testing.assert_close(case.run(model), expected, rtol=1e-4, atol=1e-5)
    value = handle.extract("a")
    small = compress(value, rank=rank)
    for path, f in small.adapter.factors.items():
        torch.testing.assert_close(f.bias, value.scale(path) * value.factors[path].bias, rtol=1e-6, atol=0)
    plain = replace(value, factors={path: replace(f, bias=None) for path, f in value.factors.items()})
    assert small.error == compress(replace(plain, config=config(case, lora_bias=False)), rank=rank).error


@cases
@pytest.mark.parametrize("method", EXACT)
def test_exact_sums_add_them_up(case, method, tmp_path):
    model, handle = with_three(case)
    values, weights = [handle.extract(name) for name in "abc"], [0.7, -0.3, 1.2]
    options = {} if method != "svd" else {"rank": 10}
    combined = lorakit.combine(values, weights, method, **options)
    for path, f in combined.factors.items():
        total = sum(
            w * v.scale(path) * v.factors[path].bias.double() for v, w in zip(values[:2], weights, strict=False)
        )
        torch.testing.assert_close(combined.scale(path) * f.bias.double(), total, rtol=1e-6, atol=1e-7)
    handle.activate(dict(zip("abc", weights, strict=True)))
    expected = case.run(model)
    handle.load(combined, "sum")
    handle.activate("sum")
    torch.testing.assert_close(case.run(model), expected, rtol=1e-4, atol=1e-4)
    assert Adapter.load(combined.save(tmp_path / "sum")).digest() == combined.digest()


@pytest.mark.parametrize("method", [method for method in METHODS if method not in EXACT])
def test_methods_on_elements_refuse_them_by_name(method):
    _, handle = with_three(WITH_LORA_BIAS["mlp"])
    values = [handle.extract(name) for name in "cab"]
    with pytest.raises(AdapterError, match=rf"{method}: adapter 2 .*\(lora_bias\).*cat, linear, svd add them up"):
        lorakit.combine(values, method=method)


def test_a_layer_that_only_an_adapter_without_them_has_gets_zeros():
    case = WITH_LORA_BIAS["llama"]
    model = case.build()
    handle = lorakit.attach(model, config(case, target_modules=("q_proj",)), name="a")
    handle.add("b", config(case, lora_bias=False, init="orthogonal"))
    for name in "ab":
        randomise(handle, name)
    combined = lorakit.combine([handle.extract("a"), handle.extract("b")])
    assert combined.config.lora_bias
    assert {path.endswith("q_proj") for path, f in combined.factors.items() if f.bias.any()} == {True}
    handle.activate(["a", "b"])
    expected = case.run(model)
    handle.load(combined, "ab")
    handle.activate("ab")
    torch.testing.assert_close(case.run(model), expected, rtol=1e-4, atol=1e-4)
    table = trained(CASES["llama embedding"].build(), LoRAConfig(r=2, target_modules=("embed_tokens",)))
    with pytest.raises(AdapterError, match=r"(?s)embed_tokens: B of a layer of kind embedding has no bias.*together"):
        lorakit.combine([handle.extract("a"), table])


def test_an_adapter_of_biases_alone_is_not_zero_and_what_does_not_belong_is_refused(tmp_path):
    case = WITH_LORA_BIAS["mlp"]
    value = trained(case.build(), config(case))
    zeroed = {path: replace(f, B=torch.zeros_like(f.B)) for path, f in value.factors.items()}
    replace(value, factors=zeroed).check()
    nothing = {path: replace(f, bias=torch.zeros_like(f.bias)) for path, f in zeroed.items()}
    f = value.factors["first"]
    wrong = {
        "zero in every layer": replace(value, factors=nothing),
        "first: B has no bias, which lora_bias says": replace(
            value, factors={**value.factors, "first": replace(f, bias=None)}
        ),
        "first: B has a bias, which lora_bias=False says": replace(value, config=config(case, lora_bias=False)),
        r"first: B \(20, 4\) and its bias \(19,\)": replace(
            value, factors={**value.factors, "first": replace(f, bias=f.bias[1:])}
        ),
        r"first: a bias of B is for .*, not for embedding": replace(
            value, factors={**value.factors, "first": replace(f, kind="embedding")}
        ),
        r"first\.B\.bias: 20 of 20 values are NaN": replace(
            value, factors={**value.factors, "first": replace(f, bias=f.bias * torch.nan)}
        ),
    }
    for message, spoilt in wrong.items():
        with pytest.raises(AdapterError, match=message):
            spoilt.check()
    with pytest.raises(AdapterFileError, match="not written"):
        spoilt.save(tmp_path / "a")
    assert not (tmp_path / "a").exists()
