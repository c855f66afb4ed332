"""Chunked cross-entropy, of logits and fused with the head that makes them, equals torch's own."""

import pytest
import torch
import torch.nn.functional as F

import lorakit
from lorakit import LoRAConfig
from lorakit.core import cross_entropy
from lorakit.core.cross_entropy import (
    cross_entropy_sum,
    cross_entropy_sum_reference,
    linear_cross_entropy_sum,
    linear_cross_entropy_sum_reference,
    linear_token_losses,
    rows_at_once,
    token_losses,
)


@pytest.mark.parametrize("rows", [0, 1, 7, 200])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-6), (torch.float32, 1e-5), (torch.bfloat16, 1e-2)])
def test_value_and_gradient(rows, dtype, tolerance, monkeypatch):
    monkeypatch.setattr(cross_entropy, "_CHUNK_ON_CPU", 50 * 33)  # several chunks, the last one short
    torch.manual_seed(0)
    values, targets = torch.randn(rows, 33).to(dtype) * 4, torch.randint(0, 33, (rows,))
    results = []
    for function in (cross_entropy_sum, cross_entropy_sum_reference):
        logits = values.clone().requires_grad_()
        loss = function(logits, targets)
        (loss / max(rows, 1)).backward()
        assert torch.equal(logits.detach(), values)  # the caller's logits are not workspace
        results.append((loss.detach(), logits.grad))
    (loss, gradient), (expected, expected_gradient) = results
    assert loss.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert gradient.dtype == dtype
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(gradient, expected_gradient, rtol=tolerance, atol=tolerance / max(rows, 1))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("adapted", [False, True])
def test_the_gradient_may_take_the_place_of_logits_that_nobody_reads(dtype, adapted):
    torch.manual_seed(0)
    head = torch.nn.Linear(5, 33, bias=False).to(dtype)
    if adapted:
        lorakit.attach(head_in := torch.nn.ModuleDict({"head": head}), LoRAConfig(r=2, target_modules=["head"]))
        assert head_in["head"] is head
    states, targets = torch.randn(1, 7, 5).to(dtype), torch.randint(0, 33, (7,))
    results = []
    for overwrite in (False, True):
        x = states.clone().requires_grad_()
        logits = head(x).squeeze(0)
        before = logits.detach().clone()
        loss = cross_entropy_sum(logits, targets, overwrite=overwrite)
        assert torch.equal(logits.detach(), before) != overwrite
        loss.backward()
        results.append((loss.detach(), x.grad))
    assert all(torch.equal(one, other) for one, other in zip(*results, strict=True))


def test_logits_that_are_needed_again_stay():
    x = torch.randn(7, 33, requires_grad=True)
    for logits in (torch.tanh(x @ torch.eye(33)), x * 1.0):
        before = logits.detach().clone()
        cross_entropy_sum(logits, torch.zeros(7, dtype=torch.long), overwrite=True).backward()
        assert torch.equal(logits.detach(), before)


def test_no_gradient_is_kept_when_none_is_wanted():
    assert not cross_entropy_sum(torch.randn(4, 9), torch.tensor([1, 2, 3, 4])).requires_grad


def test_the_gradient_is_there_once():
    loss = cross_entropy_sum(torch.randn(4, 9, requires_grad=True), torch.tensor([1, 2, 3, 4]))
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="compute the loss again"):
        loss.backward()


V, D = 33, 6
CHUNKS = {"one row": 1, "odd": 3, "all": 1000}


def head_inputs(repeats, bias, dtype, places=10):
    """What enters a head, its weight and bias, targets, and which place predicts each."""
    generator = torch.Generator().manual_seed(0)
    hidden, W, b = (torch.randn(*shape, generator=generator).to(dtype) for shape in ((places, D), (V, D), (V,)))
    source = None
    if repeats:  # in no order, one place three times and one token of it twice
        source = torch.cat([torch.randperm(places, generator=generator), torch.tensor([4, 4, 0, 9])])
    targets = torch.randint(0, V, (places if source is None else len(source),), generator=generator)
    if source is not None:
        targets[-4:-2] = 7
    return hidden, W, b if bias else None, targets, source


@pytest.fixture
def chunked(monkeypatch):
    """Sets how many rows of logits are there at once, and so that the loss looks at two of them together."""

    def set_rows(rows, dtype):
        monkeypatch.setattr(cross_entropy, "_AT_ONCE", rows * V * torch.empty(0, dtype=dtype).element_size())
        monkeypatch.setattr(cross_entropy, "_CHUNK_ON_CPU", 2 * V)

    return set_rows


@pytest.mark.parametrize("rows", CHUNKS.values(), ids=CHUNKS)
@pytest.mark.parametrize("repeats", [False, True], ids=["each its own", "repeats"])
@pytest.mark.parametrize("bias", [False, True], ids=["no bias", "bias"])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-5)], ids=["fp64", "fp32"])
def test_fused_with_its_head(rows, repeats, bias, dtype, tolerance, chunked):
    chunked(rows, dtype)
    hidden, *rest = head_inputs(repeats, bias, dtype)
    results = []
    for function in (linear_cross_entropy_sum, linear_cross_entropy_sum_reference):
        x = hidden.clone().requires_grad_()
        loss = function(x, *rest)
        (loss / 7).backward()
        results.append((loss.detach(), x.grad))
    assert results[0][0].dtype == dtype
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other, rtol=tolerance, atol=tolerance)
    losses = linear_token_losses(hidden, *rest)
    W, b, targets, source = rest
    logits = F.linear(hidden, W, b)
    expected = token_losses(logits if source is None else logits[source], targets)
    torch.testing.assert_close(losses, expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("rows", CHUNKS.values(), ids=CHUNKS)
@pytest.mark.parametrize("repeats", [False, True], ids=["each its own", "repeats"])
def test_the_gradient_is_that_of_the_loss(rows, repeats, chunked):
    chunked(rows, torch.float64)
    hidden, *rest = head_inputs(repeats, bias=True, dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda x: linear_cross_entropy_sum(x, *rest), hidden.requires_grad_())


@pytest.mark.parametrize("repeats", [False, True], ids=["each its own", "repeats"])
def test_in_bf16_it_is_as_near_to_the_exact_result_as_by_logits(repeats):
    generator = torch.Generator().manual_seed(0)
    errors = torch.zeros(2, 2, dtype=torch.float64)  # (fused, by logits) x (loss, gradient)
    for _ in range(20):
        hidden, W = (torch.randn(*shape, generator=generator).bfloat16() for shape in ((40, 64), (500, 64)))
        source = torch.randint(0, 40, (90,), generator=generator) if repeats else None
        targets = torch.randint(0, 500, (90 if repeats else 40,), generator=generator)

        def by_logits(x, W=W, source=source, targets=targets):
            logits = F.linear(x, W)
            return cross_entropy_sum(logits if source is None else F.embedding(source, logits), targets)

        def fused(x, W=W, source=source, targets=targets):
            return linear_cross_entropy_sum(x, W, None, targets, source)

        exact_x = hidden.double().requires_grad_()
        exact = linear_cross_entropy_sum_reference(exact_x, W.double(), None, targets, source)
        (exact / len(targets)).backward()
        for found, function in zip(errors, (fused, by_logits), strict=True):
            x = hidden.clone().requires_grad_()
            loss = function(x)
            (loss / len(targets)).backward()
            found[0] += ((loss.double() - exact) / exact).abs().detach()
            found[1] += (x.grad.double() - exact_x.grad).norm() / exact_x.grad.norm()
    assert (errors[0] <= 1.05 * errors[1]).all(), errors


def test_the_gradient_that_comes_in_is_multiplied_in():
    hidden, *rest = head_inputs(repeats=True, bias=False, dtype=torch.float32)
    x = hidden.clone().requires_grad_()
    loss = linear_cross_entropy_sum(x, *rest)
    (plain,) = torch.autograd.grad(loss, x, retain_graph=True)
    (scaled,) = torch.autograd.grad(loss * 65536.0, x)
    assert torch.equal(scaled, plain * 65536.0)


def test_no_rows_no_loss():
    hidden, W, b, _, _ = head_inputs(repeats=False, bias=True, dtype=torch.float32)
    x = hidden[:0].requires_grad_()
    loss = linear_cross_entropy_sum(x, W, b, torch.zeros(0, dtype=torch.long))
    loss.backward()
    assert loss == 0
    assert x.grad.shape == (0, D)


def test_a_head_that_is_trained_is_refused_where_gradients_are_wanted():
    hidden, W, b, targets, _ = head_inputs(repeats=False, bias=True, dtype=torch.float32)
    for trained in (W, b):
        trained.requires_grad_()
        with pytest.raises(ValueError, match="would get no gradient"):
            linear_cross_entropy_sum(hidden, W, b, targets)
        with torch.no_grad():
            assert linear_cross_entropy_sum(hidden, W, b, targets) > 0
        trained.requires_grad_(False)


def test_chunks_are_of_equal_size_and_bounded():
    W = torch.empty(150_000, 8, dtype=torch.bfloat16, device="meta")
    most = cross_entropy._AT_ONCE // (150_000 * 2)
    assert rows_at_once(most, W) == most
    assert rows_at_once(most + 1, W) == (most + 2) // 2
    assert rows_at_once(5, W) == 5
    assert rows_at_once(0, W) == 0
