"""A quantised matrix does what the dense one of its numbers does, in layers, products, lookups and gradients."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from lorakit.core import kernels
from lorakit.core.cross_entropy import linear_cross_entropy_sum
from lorakit.errors import AdapterError
from lorakit.quant import tensor as quant_tensor
from lorakit.quant.blocks import BLOCKS
from lorakit.quant.int8 import Int8
from lorakit.quant.nf4 import NF4
from lorakit.quant.tensor import QuantizedTensor, as_dense, format_of, quantised, stored_tensors

FORMATS = [BLOCKS["Q4_0"], BLOCKS["Q8_0"], NF4(), Int8()]


@pytest.fixture(params=FORMATS, ids=lambda f: f.name)
def matrix(request):
    """(quantised, dense) of 48 x 96, fp32."""
    torch.manual_seed(0)
    Q = quantised(torch.randn(48, 96), request.param, torch.float32)
    return Q, Q.dense()


@pytest.fixture
def small_chunks(monkeypatch):
    """A few rows at a time."""
    monkeypatch.setattr(quant_tensor, "AT_ONCE", 96 * 5)
    monkeypatch.setattr(quant_tensor, "_TILE", 96 * 2)


def test_it_looks_like_the_matrix(matrix):
    Q, D = matrix
    assert (Q.shape, Q.dtype, Q.device, Q.stride(), Q.numel()) == (D.shape, D.dtype, D.device, D.stride(), D.numel())
    assert Q.is_floating_point()
    assert not Q.requires_grad
    assert torch.equal(Q, D)
    assert Q.stored_bytes < D.nbytes / 3
    assert repr(Q).startswith(f"QuantizedTensor({format_of(Q)}, (48, 96)")


def test_products_both_ways_and_their_gradients(matrix):
    Q, D = matrix
    for shape in ((5, 96), (1, 96), (2, 3, 96), (96,)):
        x = torch.randn(shape, requires_grad=True)
        for b in (None, torch.randn(48)):
            ours, theirs = F.linear(x, Q, b), F.linear(x, D, b)
            torch.testing.assert_close(ours, theirs)
            g = torch.randn_like(ours)
            for one, other in zip(torch.autograd.grad(ours, x, g), torch.autograd.grad(theirs, x, g), strict=True):
                torch.testing.assert_close(one, other)
    y = torch.randn(5, 48, requires_grad=True)
    torch.testing.assert_close(y @ Q, y @ D)
    torch.testing.assert_close(torch.autograd.grad((y @ Q).sum(), y), torch.autograd.grad((y @ D).sum(), y))
    torch.testing.assert_close(Q @ torch.ones(96, 3), D @ torch.ones(96, 3))
    torch.testing.assert_close(Q @ torch.ones(96), D @ torch.ones(96))
    with torch.inference_mode():
        x = torch.randn(2, 3, 96)
        torch.testing.assert_close(F.linear(x, Q, torch.ones(48)), F.linear(x, D, torch.ones(48)))
        torch.testing.assert_close(x @ Q.T, x @ D.T)


def test_in_one_chunk_products_are_the_same_bits(matrix):
    Q, D = matrix
    x = torch.randn(7, 96)
    assert torch.equal(F.linear(x, Q), F.linear(x, D))
    assert torch.equal(torch.randn(0, 48) @ Q, torch.empty(0, 96))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_in_many_chunks_too(matrix, dtype, small_chunks):
    Q = matrix[0].to(dtype)
    D = Q.dense()

    def close(ours, theirs):
        return (ours - theirs).abs().max() <= 8 * torch.finfo(dtype).eps * theirs.abs().max()

    assert len(list(Q.chunks())) == 10
    assert torch.equal(D, matrix[1].to(dtype))
    x, y = torch.randn(7, 96, dtype=dtype), torch.randn(7, 48, dtype=dtype)
    assert close(F.linear(x, Q, y[0]), F.linear(x, D, y[0]))
    assert close(y @ Q, y @ D)
    assert close(x.clone().addmm_(y, Q, alpha=2), x.clone().addmm_(y, D, alpha=2))
    assert close(torch.addmm(x, y, Q, beta=3), torch.addmm(x, y, D, beta=3))
    with torch.no_grad():
        for left, ours, theirs, more in ((x, Q.T, D.T, y), (y, Q, D, x)):
            out = torch.empty_like(more)
            assert close(torch.mm(left, ours, out=out), left @ theirs)
            assert close(torch.addmm(more[0], left, ours, out=out), torch.addmm(more[0], left, theirs))


def test_the_dense_matrix_never_stands_whole(matrix, small_chunks, monkeypatch):
    Q, _ = matrix
    seen = []
    unpack = type(Q.format).unpack

    def watched(self, parts, out):
        seen.append(len(out))
        unpack(self, parts, out)

    monkeypatch.setattr(type(Q.format), "unpack", watched)
    x = torch.randn(3, 96, requires_grad=True)
    layer = kernels.LoRAOperands(Q, None, torch.randn(2, 96), torch.zeros(48, 2), 1.0)
    kernels.lora_linear(x, layer).sum().backward()
    F.embedding(torch.tensor([3, 4]), Q)
    assert max(seen) <= 5
    assert sum(seen) == 48 * 2 + 2  # forward, backward, two rows looked up


def test_the_loss_fused_with_a_quantised_head(matrix, small_chunks):
    Q, D = matrix
    hidden, targets = torch.randn(9, 96, requires_grad=True), torch.arange(9)
    ours, theirs = (linear_cross_entropy_sum(hidden, W, None, targets) for W in (Q, D))
    torch.testing.assert_close(ours, theirs)
    grads = [torch.autograd.grad(loss, hidden)[0] for loss in (ours, theirs)]
    torch.testing.assert_close(*grads)


def test_the_fused_layer_is_its_reference(matrix):
    Q, D = matrix
    A, B = torch.randn(2, 96, requires_grad=True), torch.randn(48, 2, requires_grad=True)
    x = torch.randn(2, 3, 96, requires_grad=True)
    for W in (Q, D):
        layer = kernels.LoRAOperands(W, torch.ones(48), A, B, 0.5)
        results = [f(x, layer) for f in (kernels.lora_linear, kernels.lora_linear_reference)]
        grads = [torch.autograd.grad(y.square().sum(), (x, A, B)) for y in results]
        torch.testing.assert_close(*results)
        torch.testing.assert_close(*grads, rtol=1e-4, atol=1e-4)


def test_lookups_and_rows(matrix):
    Q, D = matrix
    ids = torch.tensor([[3, 0], [47, 3]])
    assert torch.equal(F.embedding(ids, Q, padding_idx=0), F.embedding(ids, D))
    assert torch.equal(Q[ids], D[ids])
    assert torch.equal(Q[torch.tensor([1, -1])], D[[1, -1]])
    assert torch.equal(Q[ids, torch.tensor([5, -2])], D[ids, torch.tensor([5, -2])])
    assert torch.equal(Q[2], D[2])
    assert torch.equal(Q[-1], D[-1])
    assert torch.equal(Q.index_select(0, torch.tensor([4, 4])), D.index_select(0, torch.tensor([4, 4])))
    assert torch.equal(Q[torch.arange(48) % 2 == 0], D[::2])
    for ours, theirs in ((Q[3:7], D[3:7]), (Q[::5], D[::5]), (Q[-3:], D[-3:]), (Q.T[:, 4:9], D.T[:, 4:9])):
        assert isinstance(ours, QuantizedTensor)
        assert torch.equal(ours, theirs)
    for ours, theirs in zip([*Q.chunk(5), *torch.split(Q, [40, 8])], [*D.chunk(5), *D.split([40, 8])], strict=True):
        assert isinstance(ours, QuantizedTensor)
        assert torch.equal(ours, theirs)


def test_whatever_else_works_on_the_dense_matrix(matrix):
    Q, D = matrix
    assert torch.equal(Q + 1, D + 1)
    assert torch.equal(Q[:, 3:5], D[:, 3:5])
    assert torch.equal(Q.reshape(-1)[:9], D.reshape(-1)[:9])
    assert torch.equal(Q.reshape(48, 96), D)
    assert torch.equal(torch.cat([Q, D]), torch.cat([D, D]))
    torch.testing.assert_close(torch.linalg.vector_norm(Q, dim=1), torch.linalg.vector_norm(D, dim=1))
    assert torch.equal(torch.zeros(48, 96).copy_(Q), D)
    assert Q.T.shape == Q.mT.shape == Q.permute(1, 0).shape == (96, 48)
    assert torch.equal(Q.T.T, D)
    assert torch.equal(Q.permute(0, 1), D)
    assert torch.equal(Q.to(torch.int32), D.to(torch.int32))


def test_another_dtype_is_another_dtype_to_compute_in(matrix):
    Q, D = matrix
    half = Q.to(torch.bfloat16)
    assert isinstance(half, QuantizedTensor)
    assert torch.equal(half, D.to(torch.bfloat16))
    assert torch.equal(half.float(), D)  # nothing was rounded


def test_as_the_weight_of_a_layer(matrix):
    Q, D = matrix
    layer = nn.Linear(96, 48)
    layer.weight = nn.Parameter(Q, requires_grad=False)
    assert isinstance(layer.weight, nn.Parameter)
    assert list(layer.state_dict()) == ["weight", "bias"]
    twin = copy.deepcopy(layer)
    assert isinstance(twin.weight, nn.Parameter)
    assert isinstance(twin.weight, QuantizedTensor)
    ours, theirs = (dict(stored_tensors("w", each.weight)) for each in (layer, twin))
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[k], theirs[k]) and ours[k].data_ptr() != theirs[k].data_ptr() for k in ours)
    twin.to(torch.bfloat16)
    assert twin.weight.dtype == torch.bfloat16
    assert isinstance(twin.weight, nn.Parameter)
    assert format_of(twin.weight) == format_of(layer.weight)
    x = torch.randn(2, 96)
    assert torch.equal(layer(x), F.linear(x, D, layer.bias))
    twin.requires_grad_(False)


def test_nothing_writes_into_it_or_trains_it(matrix):
    Q, D = matrix
    for write in (lambda: Q.add_(1), lambda: Q.copy_(D), lambda: Q.zero_(), lambda: torch.add(D, 1, out=Q)):
        with pytest.raises(AdapterError, match=f"stored as {format_of(Q)} is never written; keep the adapter unmerged"):
            write()
    with pytest.raises(AdapterError, match="cannot be trained itself"):
        nn.Parameter(Q)
    layer = nn.Linear(96, 48)
    layer.weight = nn.Parameter(Q, requires_grad=False)
    with pytest.raises((AdapterError, RuntimeError), match="is never written"):
        layer.load_state_dict({"weight": D, "bias": torch.zeros(48)})
    assert torch.equal(Q, D)


def test_rows_move_with_their_parts(matrix):
    Q, D = matrix
    order = torch.randperm(48)
    assert torch.equal(Q.stored_rows(order), D[order])
    assert as_dense(D) is D
    assert format_of(D) is None
    names, context = Q.__tensor_flatten__()
    again = QuantizedTensor.__tensor_unflatten__({n: getattr(Q, n) for n in names}, context, Q.shape, Q.stride())
    assert torch.equal(again, D)
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        Q.nothing  # noqa: B018


def test_a_matrix_is_rewritten_as_it_is_stored(matrix):
    Q, D = matrix
    for ours, theirs in ((Q, D), (Q.t(), D.t())):
        again = ours.rewritten(theirs)
        assert again.format is Q.format
        torch.testing.assert_close(as_dense(again), theirs, rtol=0.02, atol=0.02 * float(D.abs().max()))
