"""Spectra and compression of adapters, over every kind of site, against dense fp64 SVD."""

import json
import math
from dataclasses import replace

import pytest
import torch
from torch import nn

import lorakit
from adapter.models import CASES, randomise
from lorakit import Adapter, LoRAConfig
from lorakit.adapter.compress import compress
from lorakit.adapter.value import Factors
from lorakit.errors import AdapterError

cases = pytest.mark.parametrize("case", CASES.values(), ids=CASES)


def trained(case, name="default", **changes):
    """A model and the value of a random adapter for it; the model has no adapter."""
    settings = {"r": 4, "alpha": 5.0, "scaling": "rslora", **case.what, **changes}
    model = case.build()
    handle = lorakit.attach(model, LoRAConfig(**settings), name=name)
    randomise(handle, name)
    value = handle.extract(name)
    handle.detach()
    return model, value


def as_matrices(value, path):
    """The dense update as a stack of matrices (groups, outputs, inputs), fp64, from the layer's dense weight."""
    f = value.factors[path]
    delta = value.delta(path).double()
    delta = delta.T if f.kind == "embedding" else delta
    if f.kind == "experts":
        return delta
    groups = f.r // f.B.shape[1]
    return delta.reshape(groups, delta.shape[0] // groups, -1)


@cases
def test_spectrum_is_that_of_the_dense_update(case):
    _, value = trained(case)
    spectrum = value.spectrum()
    assert list(spectrum) == list(value.factors)
    for path, layer in spectrum.layers.items():
        dense = as_matrices(value, path)
        expected = torch.linalg.svdvals(dense).flatten().sort(descending=True).values
        expected = expected[: layer.r * (layer.groups if value.factors[path].kind == "experts" else 1)]
        torch.testing.assert_close(layer.singular_values, expected[: len(layer.singular_values)], rtol=1e-4, atol=1e-6)
        assert layer.frobenius_norm == pytest.approx(float(dense.norm()), rel=1e-5)
        assert 1 <= layer.stable_rank <= layer.effective_rank * 1.5
        assert layer.effective_rank <= len(expected)
        assert layer.shape == value.factors[path].matrix_shape
    assert spectrum.frobenius_norm == pytest.approx(
        math.hypot(*(float(value.delta(path).norm()) for path in value.factors)), rel=1e-5
    )
    json.dumps(spectrum.to_dict(), allow_nan=False)


@cases
@pytest.mark.parametrize("how", [{"rank": 2}, {"energy": 0.8}, {"energy": 1.0}], ids=str)
def test_compression_is_the_nearest_there_is_and_its_error_exact(case, how, tmp_path):
    model, value = trained(case)
    result = compress(value, **how)
    small = result.adapter
    for path, f in small.factors.items():
        dense, left = as_matrices(value, path), as_matrices(small, path)
        own = torch.linalg.svdvals(dense)[..., f.r // f.rank_shares :].square().sum().sqrt()
        assert float((dense - left).norm()) == pytest.approx(float(own), rel=1e-3, abs=1e-5 * float(dense.norm()))
        assert result.errors[path] == pytest.approx(float(own), rel=1e-4, abs=1e-6 * float(dense.norm()))
        assert small.scale(path) == 1.0
    apart = math.hypot(*(float((value.delta(p) - small.delta(p)).norm()) for p in value.factors))
    assert result.error == pytest.approx(apart, rel=1e-3, abs=1e-5 * value.spectrum().frobenius_norm)
    if "energy" in how:
        assert result.relative_error <= math.sqrt(1 - how["energy"]) + 1e-9
    # the config says what the factors are: it attaches, and a file of it does
    lorakit.attach(model, small)
    got = case.run(model)
    lorakit.adapters(model).detach()
    lorakit.attach(model, small.save(tmp_path / "a"))
    if any(f.kind == "attention" for f in small.factors.values()):  # padded to one rank in each attention
        torch.testing.assert_close(case.run(model), got, rtol=1e-5, atol=1e-5)
    else:
        assert torch.equal(case.run(model), got)
    assert Adapter.load(tmp_path / "a").metadata == small.metadata


def test_full_rank_and_full_energy_change_nothing_but_the_scale():
    case = CASES["llama"]
    model, value = trained(case)
    lorakit.attach(model, value)
    expected = case.run(model)
    for small in (value.compress(rank=4), value.compress(energy=1.0), value.compress(rank=100)):
        assert small.config.r == 4
        lorakit.adapters(model).add("default", small, replace=True)
        torch.testing.assert_close(case.run(model), expected, rtol=1e-5, atol=1e-5)


def test_energy_is_spent_where_it_is_by_one_threshold_for_all_layers():
    def layer(S, seed):
        generator = torch.Generator().manual_seed(seed)
        U, V = (torch.linalg.qr(torch.randn(9, len(S), generator=generator)).Q for _ in range(2))
        return Factors(A=V.T.contiguous(), B=U * torch.tensor(S), alpha=float(len(S)))

    factors = {"a": layer([5.0, 4.0, 3.0], 0), "b": layer([2.0, 0.1, 0.1], 1), "net.b": layer([0.2, 0.1, 0.1], 2)}
    value = Adapter(config=LoRAConfig(r=3, alpha=3.0, target_modules=("a", "b")), factors=factors)
    result = compress(value, energy=0.99)
    assert result.ranks == {"a": 3, "b": 1, "net.b": 1}
    assert result.error == pytest.approx(math.sqrt(4 * 0.01), rel=1e-4)
    assert result.relative_error == pytest.approx(0.2 / math.sqrt(50 + 4.02 + 0.06), rel=1e-4)
    told = json.loads(result.adapter.metadata["compressed"])
    assert told == {"energy": 0.99, "relative_error": pytest.approx(result.relative_error, rel=1e-5)}
    model = nn.Module()
    model.a, model.b, model.net = nn.Linear(9, 9), nn.Linear(9, 9), nn.Module()
    model.net.b = nn.Linear(9, 9)
    lorakit.attach(model, result.adapter)  # "b" is the end of "net.b": the patterns tell them apart


def test_a_path_that_ends_another_has_its_own_rank():
    A, B = torch.randn(4, 6), torch.randn(6, 4)
    factors = {"b": Factors(A=A[:1], B=B[:, :1], alpha=1.0)}
    factors |= {name: Factors(A=A, B=B, alpha=4.0) for name in ("net.b", "net.c", "net.net.b")}
    value = Adapter(config=LoRAConfig(r=4, target_modules=("b", "c"), rank_pattern={"b": 1}), factors=factors)
    small = value.compress(rank=4)
    assert list(small.config.rank_pattern.items()) == [(r"net\.net\.b", 4), (r"net\.b", 4), ("b", 1)]
    model = nn.Module()
    model.b, model.net = nn.Linear(6, 6), nn.Module()
    model.net.b, model.net.c, model.net.net = nn.Linear(6, 6), nn.Linear(6, 6), nn.Module()
    model.net.net.b = nn.Linear(6, 6)
    assert lorakit.attach(model, small).extract().factors["net.b"].r == 4


def test_whole_tensors_stay(tmp_path):
    model = CASES["vit"].build()
    config = LoRAConfig(r=4, target_modules=("q_proj",), modules_to_save=("classifier",), bias="lora_only")
    handle = lorakit.attach(model, config)
    randomise(handle)
    value = handle.extract()
    small = value.compress(rank=1)
    assert small.replaced.keys() == value.replaced.keys()
    assert all(torch.equal(small.biases[path], bias) for path, bias in value.biases.items())
    handle.add("small", small)


def test_half_precision_factors_give_fp32_and_double_stays():
    _, value = trained(CASES["mlp"])
    for dtype, expected in ((torch.bfloat16, torch.float32), (torch.float64, torch.float64)):
        cast = {path: replace(f, A=f.A.to(dtype), B=f.B.to(dtype)) for path, f in value.factors.items()}
        small = replace(value, factors=cast).compress(rank=3)
        assert {t.dtype for t in small.tensors().values()} == {expected}


def test_what_cannot_be_compressed_says_why():
    _, value = trained(CASES["convolutions"])
    for wrong in ({}, {"rank": 2, "energy": 0.5}, {"rank": 0}, {"energy": 0.0}, {"energy": 1.5}):
        with pytest.raises(AdapterError, match=r"compress: .*(rank|energy)"):
            value.compress(**wrong)
    with pytest.raises(AdapterError, match="two: a convolution with 2 groups needs a rank divisible by 2"):
        value.compress(rank=3)
    with pytest.raises(AdapterError, match="no low-rank update"):
        replace(value, factors={}, biases={"two": torch.zeros(8)}).compress(rank=1)


def test_a_fresh_adapter_has_no_energy():
    handle = lorakit.attach(CASES["mlp"].build(), LoRAConfig(r=4))
    value = handle.extract()
    layer = value.spectrum()["first"]
    assert (layer.energy, layer.stable_rank, layer.effective_rank) == (0, 0, 0)
    assert compress(value, energy=0.5).relative_error == 0.0
