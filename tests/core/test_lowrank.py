"""Singular values and truncation from factors, against dense fp64 SVD."""

import math

import pytest
import torch

from lorakit.core import lowrank

SHAPES = {
    "matrix": ((5, 12), (20, 5)),
    "rank above the smaller side": ((9, 4), (7, 9)),
    "convolution": ((4, 3, 3, 3), (6, 4, 1, 1)),
    "grouped": ((6, 2, 3), (9, 2, 1)),
}
shapes = pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)


def factors(shape, seed=0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    return tuple(torch.randn(size, generator=generator, dtype=torch.float64).to(dtype) for size in shape)


def dense_blocks(A, B, s):
    """The update as a matrix, a group at a time, by the dense product."""
    A, B = lowrank.blocks(A, B)
    return B.double() @ A.double() * s


@shapes
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_singular_values_are_those_of_the_dense_update(shape, dtype):
    A, B = factors(shape, dtype=dtype)
    found = lowrank.svd(*lowrank.blocks(A, B), 0.7)
    dense = dense_blocks(A, B, 0.7)
    expected = torch.linalg.svdvals(dense)[..., : found.S.shape[-1]]
    torch.testing.assert_close(found.S, expected, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(found.U * found.S.unsqueeze(-2) @ found.V, dense, rtol=0, atol=1e-11)
    torch.testing.assert_close(lowrank.energy(found.S), float(dense.square().sum()))
    torch.testing.assert_close(lowrank.frobenius_norm(*lowrank.blocks(A, B), 0.7), float(dense.norm()))


@shapes
def test_truncation_is_the_best_there_is(shape):
    A, B = factors(shape)
    value = lowrank.svd(*lowrank.blocks(A, B))
    U, S, V = torch.linalg.svd(dense_blocks(A, B, 1.0), full_matrices=False)
    for rank in range(1, value.S.shape[-1] + 1):
        small_A, small_B = lowrank.balanced(value, rank)
        best = U[..., :rank] * S[..., None, :rank] @ V[..., :rank, :]
        torch.testing.assert_close(small_B @ small_A, best, rtol=0, atol=1e-10)
        torch.testing.assert_close(small_A.norm(dim=-1), small_B.norm(dim=-2))  # balanced
        again_A, again_B = lowrank.unblocked(small_A, small_B, A, B)
        assert again_A.shape == (small_A.shape[0] * rank, *A.shape[1:])
        assert again_B.shape == (B.shape[0], rank, *B.shape[2:])


def test_a_grouped_update_is_the_one_that_convolution_delta_makes():
    A, B = factors(SHAPES["grouped"])
    torch.testing.assert_close(dense_blocks(A, B, 0.5).reshape(9, 2, 3), lowrank.convolution_delta(A, B, 0.5))


def test_small_singular_values_survive_factors_of_uneven_size():
    """A large B and a small A: in fp32 the small directions would drown."""
    A, B = factors(((3, 50), (40, 3)))
    Q_A, Q_B = torch.linalg.qr(A.mT).Q.mT, torch.linalg.qr(B).Q
    S = torch.tensor([1.0, 1e-4, 1e-9], dtype=torch.float64)
    found = lowrank.svd((Q_A * 1e-6)[None], (Q_B * S * 1e6)[None])
    torch.testing.assert_close(found.S[0], S, rtol=1e-5, atol=0)


def test_ranks_of_known_spectra():
    assert lowrank.stable_rank(torch.tensor([3.0, 3.0, 3.0])) == pytest.approx(3)
    assert lowrank.effective_rank(torch.tensor([2.0, 2.0, 0.0])) == pytest.approx(2)
    assert lowrank.stable_rank(torch.tensor([2.0, 1.0])) == pytest.approx(1.25)
    p = torch.tensor([2.0, 1.0]).double() / 3
    assert lowrank.effective_rank(torch.tensor([2.0, 1.0])) == pytest.approx(math.exp(-float((p * p.log()).sum())))
    nothing = torch.zeros(1, 4)
    assert (lowrank.energy(nothing), lowrank.stable_rank(nothing), lowrank.effective_rank(nothing)) == (0, 0, 0)


def test_one_threshold_for_all_layers():
    layers = [torch.tensor([[4.0, 1.0, 0.1]]), torch.tensor([[2.0, 0.5]]), torch.tensor([[0.2, 0.1]])]
    total = sum(lowrank.energy(S) for S in layers)
    assert lowrank.kept_for_energy(layers, 1.0) == [3, 2, 2]
    kept = lowrank.kept_for_energy(layers, 0.98)
    assert kept == [2, 1, 1]  # the third is below the threshold, and keeps the one that every layer keeps
    dropped = sum(lowrank.energy(S[..., k:]) for S, k in zip(layers, kept, strict=True))
    assert dropped <= 0.02 * total
    grouped = [torch.tensor([[3.0, 0.1], [2.0, 1.9]])]
    assert lowrank.kept_for_energy(grouped, 0.9) == [2]  # what the second group needs
    assert lowrank.kept_for_energy([torch.zeros(1, 3)], 0.5) == [1]


def test_full_energy_drops_what_carries_nothing():
    A, B = factors(((2, 10), (8, 2)))
    twice = lowrank.svd(torch.cat([A, A])[None], torch.cat([B, B], dim=1)[None])
    assert lowrank.kept_for_energy([twice.S], 1.0) == [2]


def test_directions_without_energy_can_be_trained_again():
    A, _ = lowrank.balanced(lowrank.svd(torch.randn(1, 3, 6), torch.zeros(1, 5, 3)), 3)
    torch.testing.assert_close(A[0].norm(dim=-1), torch.ones(3, dtype=torch.float64))


def test_large_dense_matrices_are_sketched_close_to_the_best_and_by_seed():
    generator = torch.Generator().manual_seed(0)
    matrix = torch.randn(1, 700, 640, generator=generator) * 0.02
    matrix += torch.randn(1, 700, 6, generator=generator) @ torch.randn(1, 6, 640, generator=generator)
    found = lowrank.dense_svd(matrix, 8, torch.Generator().manual_seed(1))
    again = lowrank.dense_svd(matrix, 8, torch.Generator().manual_seed(1))
    assert all(torch.equal(one, other) for one, other in zip(found, again, strict=True))
    best = torch.linalg.svdvals(matrix.double())
    residual = matrix.double() - found.U * found.S.unsqueeze(-2) @ found.V
    assert float(residual.norm()) <= 1.01 * float(best[0, 8:].norm())
    torch.testing.assert_close(found.S[0, :6], best[0, :6], rtol=1e-4, atol=0)
