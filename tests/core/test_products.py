"""Layers that multiply in integers: near the exact ones, exact where they should be, and as before afterwards."""

import pytest
import torch
from torch import nn

import lorakit
from lorakit import LoRAConfig
from lorakit.core import int8
from lorakit.core.int8 import Int8Weight
from lorakit.core.kernels import LoRAOperands, lora_linear, lora_linear_reference, lora_linears
from lorakit.core.layer import AdaptedLayer
from lorakit.core.products import frozen_linear, int8_obstacle, int8_products, takes_int8


def relative(found, expected):
    found, expected = found.detach().double(), expected.detach().double()
    return float((found - expected).norm() / expected.norm())


def operands(dtype=torch.float64):
    """x and two layers given it, of different widths and ranks, one with a bias."""
    torch.manual_seed(0)
    x = torch.randn(2, 15, 64, dtype=dtype, requires_grad=True)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    factors = [torch.randn(*s, dtype=wide, requires_grad=True) for s in ((3, 64), (48, 3), (2, 64), (32, 2))]
    W, b, V = torch.randn(48, 64).to(dtype), torch.randn(48).to(dtype), torch.randn(32, 64).to(dtype)
    gain = torch.rand(32, dtype=wide, requires_grad=True)
    layers = [LoRAOperands(W, b, *factors[:2], 0.1), LoRAOperands(V, None, *factors[2:], -0.2, gain)]
    return x, layers, [x, *factors, gain]


def in_integers(layer):
    return layer._replace(copy=Int8Weight(layer.W))


@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-5), (torch.bfloat16, 2e-2)]
)
@pytest.mark.parametrize("which", [(True, True), (True, False), (False, True)])
def test_outputs_and_input_gradients_are_near_and_those_of_the_factors_exact(dtype, tolerance, which):
    """For one gradient of the outputs, A's and B's need x and that gradient alone, which are not rounded."""
    results = []
    for fast in (True, False):
        x, layers, leaves = operands(dtype)
        if fast:
            layers = [in_integers(layer) if flag else layer for layer, flag in zip(layers, which, strict=True)]
            outputs = lora_linears(x, layers)
        else:
            outputs = [lora_linear_reference(x, layer) for layer in layers]
        given = [torch.randn(y.shape, generator=torch.Generator().manual_seed(k)) for k, y in enumerate(outputs)]
        torch.autograd.backward(outputs, [g.to(dtype) for g in given])
        results.append((*outputs, *(leaf.grad for leaf in leaves)))
    (y, z, x, A, B, C, D, gain), (y_r, z_r, x_r, A_r, B_r, C_r, D_r, gain_r) = results
    for near, exact in ((y, y_r), (z, z_r), (x, x_r), (gain, gain_r)):
        assert near.dtype == exact.dtype
        assert relative(near, exact) < 0.02 + tolerance
    for fast, reference in ((A, A_r), (B, B_r), (C, C_r), (D, D_r)):
        assert relative(fast, reference) < tolerance
    assert (relative(y, y_r) > 1e-4) == which[0] or dtype == torch.bfloat16


def test_without_gradients_it_is_the_same():
    x, (layer, _), _ = operands()
    layer = in_integers(layer)
    with torch.no_grad():
        alone = lora_linear(x, layer)
    assert torch.equal(alone, lora_linear(x, layer))


def test_a_frozen_layer_alone():
    x, (layer, _), _ = operands()
    g = torch.randn(2, 15, 48).double()
    y = frozen_linear(x, layer.W, layer.b, Int8Weight(layer.W))
    expected = nn.functional.linear(x, layer.W, layer.b)
    assert relative(y, expected) < 0.02
    (grad_x,) = torch.autograd.grad(y, x, g)
    assert relative(grad_x, g @ layer.W) < 0.02


class Two(nn.Module):
    def __init__(self):
        super().__init__()
        self.q_proj, self.k_proj, self.embed = nn.Linear(64, 32), nn.Linear(64, 32, bias=False), nn.Embedding(9, 4)

    def forward(self, x):
        return self.q_proj(x) * self.k_proj(x)


def adapted(**settings):
    torch.manual_seed(0)
    model = Two()
    handle = lorakit.attach(model, LoRAConfig(r=4, **{"init": "random", **settings}))
    return model, handle, torch.randn(5, 64)


def layers_of(model):
    return [module for module in model.modules() if isinstance(module, AdaptedLayer) and takes_int8(module)]


@pytest.mark.parametrize(
    "settings", [{}, {"dropout": 0.5}, {"lora_bias": True}, {"delta": "dora", "init": "default"}, {"bias": "all"}]
)
def test_whatever_an_adapter_is_its_layers_are_near_in_training_and_exact_elsewhere(settings):
    model, handle, x = adapted(**settings)

    def outputs():
        torch.manual_seed(1)  # dropout
        train = model.train()(x)
        torch.manual_seed(1)
        with handle.disabled():
            off = model(x)
        return train, model.eval()(x), off

    train, evaluation, off = outputs()
    with int8_products(layers_of(model)):
        in_train, in_evaluation, in_off = outputs()
    assert 1e-4 < relative(in_train, train) < 0.03
    assert torch.equal(in_evaluation, evaluation)
    assert torch.equal(in_off, off)
    for one, other in zip(outputs(), (train, evaluation, off), strict=True):
        assert torch.equal(one, other)


def test_several_adapters_at_once():
    model, handle, x = adapted()
    handle.add("other", LoRAConfig(r=2, init="random"))
    handle.activate({"default": 0.5, "other": -1.0})
    model.train()
    exact = model(x)
    with int8_products(layers_of(model)):
        assert 1e-4 < relative(model(x), exact) < 0.03


def test_a_transposed_layer(gpt2):
    """transformers' Conv1D, which no kernel computes together with its update."""
    lorakit.attach(gpt2, LoRAConfig(r=4, init="random"))
    ids = torch.arange(3, 40)[None]
    gpt2.train()
    for module in gpt2.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    exact = gpt2(ids).logits
    layers = layers_of(gpt2)
    assert len(layers) == 8
    with int8_products(layers):
        assert 1e-4 < relative(gpt2(ids).logits, exact) < 0.1


def test_nothing_stays_behind_whatever_is_raised():
    model, _, _ = adapted()
    before = {name: dict(vars(module)) for name, module in model.named_modules()}
    weights = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with int8_products(layers_of(model)):
        assert model.q_proj.lorakit_int8 is not None
        assert set(model.state_dict()) == set(weights)
    with pytest.raises(ZeroDivisionError), int8_products(layers_of(model)):
        raise ZeroDivisionError
    assert {name: dict(vars(module)) for name, module in model.named_modules()} == before
    assert all(torch.equal(tensor, weights[name]) for name, tensor in model.state_dict().items())


def test_a_copy_that_cannot_be_made_leaves_none():
    model, _, _ = adapted()
    with pytest.raises(AttributeError), int8_products([*layers_of(model), nn.Identity()]):
        pass
    assert all("lorakit_int8" not in vars(layer) for layer in layers_of(model))


def test_layers_that_cannot():
    model, _, _ = adapted(target_modules=["q_proj", "k_proj", "embed"])
    assert layers_of(model) == [model.q_proj, model.k_proj]  # an embedding looks up
    model.k_proj.weight.requires_grad_(True)
    assert not takes_int8(model.k_proj)
    wide = nn.Linear(int8.LONGEST_SUM + 1, 1, bias=False)
    lorakit.attach(nn.ModuleDict({"wide": wide}), LoRAConfig(r=1))
    assert not takes_int8(wide)


def test_devices_that_cannot():
    assert int8_obstacle(torch.device("cpu")) is None
    for name in ("cuda", "mps", "xpu"):
        assert f"not for {name}" in int8_obstacle(torch.device(name))
