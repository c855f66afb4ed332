"""The fast adapted linear layer equals the plain one, forwards and backwards."""

import pytest
import torch

from lorakit.core.kernels import lora_linear, lora_linear_reference


def operands(dtype=torch.float64, factors=None, bias=True):
    torch.manual_seed(0)
    factors = factors or dtype
    x = torch.randn(2, 5, 7, dtype=dtype, requires_grad=True)
    W, b = torch.randn(6, 7, dtype=dtype), torch.randn(6, dtype=dtype) if bias else None
    A, B = (torch.randn(*s, dtype=factors, requires_grad=True) for s in ((3, 7), (6, 3)))
    return x, W, b, A, B


@pytest.mark.parametrize("bias", [True, False])
def test_gradients_are_the_derivatives(bias):
    x, W, b, A, B = operands(bias=bias)
    assert torch.autograd.gradcheck(lambda x, A, B: lora_linear(x, W, b, A, B, 0.7), (x, A, B))


def test_a_second_derivative_is_refused_and_not_wrong():
    x, W, b, A, B = operands()
    (gradient,) = torch.autograd.grad(lora_linear(x, W, b, A, B, 0.7).sin().sum(), B, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.sum().backward()


@pytest.mark.parametrize(
    ("dtype", "factors", "tolerance"),
    [
        (torch.float64, torch.float64, 1e-12),
        (torch.float32, torch.float32, 1e-5),
        (torch.bfloat16, torch.float32, 2e-2),
    ],
)
def test_fast_equals_reference(dtype, factors, tolerance):
    results = []
    for function in (lora_linear, lora_linear_reference):
        x, W, b, A, B = operands(dtype, factors)
        y = function(x, W, b, A, B, 0.7)
        y.sin().sum().backward()
        results.append((y, x.grad, A.grad, B.grad))
    for fast, reference in zip(*results, strict=True):
        assert fast.dtype == reference.dtype
        error = (fast.double() - reference.double()).norm() / reference.double().norm()
        assert error < tolerance


def test_an_input_without_gradient_costs_none():
    x, W, b, A, B = operands()
    x = x.detach()
    lora_linear(x, W, b, A, B, 1.0).sum().backward()
    assert x.grad is None
    assert A.grad is not None
