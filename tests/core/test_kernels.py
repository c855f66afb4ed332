"""Each fast kernel equals the plain form beside it, forwards and backwards."""

import pytest
import torch

from lorakit.core.kernels import (
    LoRAOperands,
    lora_linear,
    lora_linear_reference,
    lora_linears,
    rms_norm,
    rms_norm_reference,
    rotary,
    rotary_reference,
    swiglu,
    swiglu_reference,
)


def operands(dtype=torch.float64, factors=None, bias=True):
    torch.manual_seed(0)
    factors = factors or dtype
    x = torch.randn(2, 5, 7, dtype=dtype, requires_grad=True)
    W, b = torch.randn(6, 7, dtype=dtype), torch.randn(6, dtype=dtype) if bias else None
    A, B = (torch.randn(*s, dtype=factors, requires_grad=True) for s in ((3, 7), (6, 3)))
    return x, W, b, A, B


@pytest.mark.parametrize("trained", [(True,) * 5, (False, True, True, False, True), (True, False, False, False, True)])
def test_layers_together_equal_layers_alone(trained):
    """Of different widths and ranks, whatever of x and the factors is trained."""
    torch.manual_seed(0)
    tensors = [torch.randn(*shape, dtype=torch.float64) for shape in ((2, 5, 7), (3, 7), (6, 3), (2, 7), (4, 2))]
    tensors = [tensor.requires_grad_(flag) for tensor, flag in zip(tensors, trained, strict=True)]
    frozen = torch.randn(6, 7, dtype=torch.float64), torch.randn(6, dtype=torch.float64), torch.randn(4, 7).double()

    def operands(A, B, C, D):
        return [LoRAOperands(frozen[0], frozen[1], A, B, 0.7), LoRAOperands(frozen[2], None, C, D, -2.0)]

    def alone(x, *factors):
        return [lora_linear_reference(x, one) for one in operands(*factors)]

    def gradients(function):
        loss = sum((i + 1.0) * y.sin().sum() for i, y in enumerate(function(*tensors)))
        return torch.autograd.grad(loss, [tensor for tensor in tensors if tensor.requires_grad])

    def together(x, *factors):
        return lora_linears(x, operands(*factors))

    for fast, reference in zip(together(*tensors), alone(*tensors), strict=True):
        torch.testing.assert_close(fast, reference)
    for fast, reference in zip(gradients(together), gradients(alone), strict=True):
        torch.testing.assert_close(fast, reference)


@pytest.mark.parametrize("bias", [True, False])
def test_gradients_are_the_derivatives(bias):
    x, W, b, A, B = operands(bias=bias)
    assert torch.autograd.gradcheck(lambda x, A, B: lora_linear(x, LoRAOperands(W, b, A, B, 0.7)), (x, A, B))


@pytest.mark.parametrize("bias", [True, False])
def test_a_mask_leaves_tokens_without_update(bias):
    x, W, b, A, B = operands(bias=bias)
    mask = torch.tensor([[0, 0, 1, 1, 1], [0, 0, 0, 0, 1]]).unsqueeze(-1).double()
    layer = LoRAOperands(W, b, A, B, 0.7, mask=mask)
    other = LoRAOperands(W, b, B.new_ones(2, 7, requires_grad=True), B.new_ones(6, 2, requires_grad=True), -0.5)
    y, beside = lora_linears(x, [layer, other])
    torch.testing.assert_close(y, lora_linear_reference(x, layer))
    torch.testing.assert_close(beside, lora_linear_reference(x, other))
    torch.testing.assert_close(y[0, :2], torch.nn.functional.linear(x[0, :2], W, b))
    with torch.no_grad():
        torch.testing.assert_close(lora_linear(x, layer), y)
    tensors = (x, A, B, other.A, other.B)
    fast = torch.autograd.grad(y.sin().sum() + beside.sin().sum(), tensors)
    plain = lora_linear_reference(x, layer).sin().sum() + lora_linear_reference(x, other).sin().sum()
    for one, expected in zip(fast, torch.autograd.grad(plain, tensors), strict=True):
        torch.testing.assert_close(one, expected)
    assert torch.autograd.gradcheck(lambda x, A, B: lora_linear(x, LoRAOperands(W, b, A, B, 0.7, mask=mask)), (x, A, B))


def test_a_second_derivative_is_refused_and_not_wrong():
    x, W, b, A, B = operands()
    (gradient,) = torch.autograd.grad(lora_linear(x, LoRAOperands(W, b, A, B, 0.7)).sin().sum(), B, create_graph=True)
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
        y = function(x, LoRAOperands(W, b, A, B, 0.7))
        y.sin().sum().backward()
        results.append((y, x.grad, A.grad, B.grad))
    for fast, reference in zip(*results, strict=True):
        assert fast.dtype == reference.dtype
        error = (fast.double() - reference.double()).norm() / reference.double().norm()
        assert error < tolerance


def test_an_input_without_gradient_costs_none():
    x, W, b, A, B = operands()
    x = x.detach()
    lora_linear(x, LoRAOperands(W, b, A, B, 1.0)).sum().backward()
    assert x.grad is None
    assert A.grad is not None


def tensor(*shape, dtype, seed, grad=True):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype).requires_grad_(grad)


PAIRS = {
    "rms_norm": (
        rms_norm,
        rms_norm_reference,
        lambda dtype: (tensor(2, 5, 8, dtype=dtype, seed=0), tensor(8, dtype=dtype, seed=1, grad=False), 1e-2),
    ),
    "swiglu": (
        swiglu,
        swiglu_reference,
        lambda dtype: (tensor(2, 5, 8, dtype=dtype, seed=0), tensor(2, 5, 8, dtype=dtype, seed=1)),
    ),
    "rotary": (
        rotary,
        rotary_reference,
        lambda dtype: (
            tensor(5, 3, 8, dtype=dtype, seed=0).transpose(0, 1),  # as a model hands it over: heads before tokens
            tensor(5, 8, dtype=dtype, seed=1, grad=False),
            tensor(5, 8, dtype=dtype, seed=2, grad=False),
        ),
    ),
}


@pytest.mark.parametrize(("fast", "reference", "make"), PAIRS.values(), ids=PAIRS)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.bfloat16, 1e-2)], ids=["fp32", "bf16"])
def test_fast_kernels_equal_their_references(fast, reference, make, dtype, tolerance):
    results = []
    for function in (fast, reference):
        inputs = make(dtype)
        leaves = [x for x in inputs if isinstance(x, torch.Tensor) and x.requires_grad]
        y = function(*inputs)
        weights = torch.linspace(-1, 1, y.numel()).view(y.shape)
        results.append([y.detach(), *torch.autograd.grad((y.float() * weights).sum(), leaves)])
    for one, other in zip(*results, strict=True):
        assert one.dtype == other.dtype == dtype
        assert (one.double() - other.double()).norm() <= tolerance * other.double().norm()


@pytest.mark.parametrize(
    ("fast", "make"), [(f, m) for n, (f, _, m) in PAIRS.items() if n != "rms_norm"], ids=["swiglu", "rotary"]
)  # rms_norm is fp32 inside whatever comes in
def test_fast_kernels_have_the_derivatives_they_should(fast, make):
    assert torch.autograd.gradcheck(fast, make(torch.float64))
