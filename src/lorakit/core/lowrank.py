"""The arithmetic of a low-rank update: its scale, its dense form, its singular values and its best approximation of
lower rank. Tensors in, tensors out.

An update is one product B A; that of a grouped convolution is one product a group, each on channels of its own. So
singular values are those of (groups, out / groups, columns) stacks of matrices, of which most hold one. None of them is
ever made: QR of B and of A^T leaves a core no larger than the rank, O((out + columns) r^2) in all. In fp64, since what
is below the rounding of ||A|| ||B|| is lost.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch


def scale(alpha: float, r: int, scaling: str = "lora") -> float:
    """The factor before B A: alpha / r (LoRA, arXiv 2106.09685) or alpha / sqrt(r) (rsLoRA, arXiv 2312.03732)."""
    return alpha / math.sqrt(r) if scaling == "rslora" else alpha / r


def matrix_delta(A: torch.Tensor, B: torch.Tensor, s: float) -> torch.Tensor:
    """s B A for A (r, in), B (out, r): (out, in), in the factors' dtype."""
    return (B @ A) * s


def convolution_delta(A: torch.Tensor, B: torch.Tensor, s: float) -> torch.Tensor:
    """The convolution weight of "first A, then the 1x1 convolution B".

    Args:
        A: (r, in / groups, *kernel).
        B: (out, r / groups, 1, ...); r / groups < r means a grouped convolution: each block of outputs reads its own
        rows of A.
        s: scale.

    Returns:
        (out, in / groups, *kernel).
    """
    A_blocks, B_blocks = blocks(A, B)
    return (torch.bmm(B_blocks, A_blocks) * s).reshape(B.shape[0], *A.shape[1:])


# ---------------------------------------------------------------- factors as stacks of matrices


def blocks(A: torch.Tensor, B: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The factors of any layer as stacks of matrices, one a group.

    Args:
        A: (r, in), or (r, in / groups, *kernel).
        B: (out, r), or (out, r / groups, 1, ...).

    Returns:
        A (groups, r / groups, columns), B (groups, out / groups, r / groups): views where they can be.
    """
    out, r_per_group = B.shape[:2]
    groups = A.shape[0] // r_per_group
    return A.reshape(groups, r_per_group, -1), B.reshape(groups, out // groups, r_per_group)


def side_by_side(
    A: torch.Tensor, B: torch.Tensor, other_A: torch.Tensor, other_B: torch.Tensor, *, stacked: bool = False
) -> tuple[torch.Tensor, torch.Tensor]:
    """Factors of a sum: [B, B'] [A; A'] = B A + B' A', within each group.

    Args:
        A: of any layer; see `blocks`.
        B: likewise.
        other_A: of the same layer, of any rank.
        other_B: likewise.
        stacked: the first dimension counts experts, each with a whole pair of its own.
    """
    if stacked:
        return torch.cat([A, other_A], dim=1), torch.cat([B, other_B], dim=2)
    groups = A.shape[0] // B.shape[1]
    rows = [factor.reshape(groups, -1, *factor.shape[1:]) for factor in (A, other_A)]
    return torch.cat(rows, dim=1).flatten(0, 1), torch.cat([B, other_B], dim=1)


def halves(
    A: torch.Tensor, B: torch.Tensor, *, stacked: bool = False
) -> tuple[tuple[torch.Tensor, torch.Tensor], tuple[torch.Tensor, torch.Tensor]]:
    """Undo `side_by_side` of two pairs of equal rank: (A, B), (A', B')."""
    if stacked:
        (first_A, second_A), (first_B, second_B) = A.chunk(2, dim=1), B.chunk(2, dim=2)
        return (first_A, first_B), (second_A, second_B)
    groups = A.shape[0] // B.shape[1]
    first_A, second_A = (half.flatten(0, 1) for half in A.reshape(groups, -1, *A.shape[1:]).chunk(2, dim=1))
    first_B, second_B = B.chunk(2, dim=1)
    return (first_A, first_B), (second_A, second_B)


def unblocked(
    A: torch.Tensor, B: torch.Tensor, like_A: torch.Tensor, like_B: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Undo `blocks` for factors of whatever rank; all but the rank is as in `like_A`, `like_B`."""
    return A.reshape(-1, *like_A.shape[1:]), B.reshape(-1, B.shape[-1], *like_B.shape[2:])


# ---------------------------------------------------------------- singular values


class SVD(NamedTuple):
    """U diag(S) V, fp64: U (groups, out / groups, k) and V (groups, k, columns) with orthonormal columns and rows, S
    (groups, k) descending.
    """

    U: torch.Tensor
    S: torch.Tensor
    V: torch.Tensor


def svd(A: torch.Tensor, B: torch.Tensor, s: float = 1.0) -> SVD:
    """The singular value decomposition of s B A, from the factors.

    B = Q_B R_B and A^T = Q_A R_A; s R_B R_A^T = U S V is k x k; s B A = (Q_B U) S (V Q_A^T).

    Args:
        A: (groups, r / groups, columns), of any floating dtype.
        B: (groups, out / groups, r / groups).
        s: scale.

    Returns:
        k = min(r / groups, out / groups, columns) singular values a group.
    """
    Q_B, R_B = torch.linalg.qr(B.double())
    Q_A, R_A = torch.linalg.qr(A.double().mT)
    U, S, V = torch.linalg.svd(R_B @ R_A.mT * s, full_matrices=False)
    return SVD(Q_B @ U, S, V @ Q_A.mT)


def balanced(decomposed: SVD, rank: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Factors (A, B) of the best approximation with `rank` directions a group (Eckart-Young), scale 1, fp64.

    Both get sqrt(S), so that neither overflows in a narrow dtype and both train at the same pace. A direction that
    carries nothing keeps its row of A: with A and B both zero it could never be trained again.
    """
    U, S, V = (decomposed.U[..., :rank], decomposed.S[..., :rank], decomposed.V[..., :rank, :])
    root = S.sqrt()
    return torch.where(root > 0, root, 1.0).unsqueeze(-1) * V, U * root.unsqueeze(-2)


def frobenius_norm(A: torch.Tensor, B: torch.Tensor, s: float = 1.0) -> float:
    """||s B A||, from the factors: sqrt(trace(B^T B A A^T)). Shapes as in `svd`."""
    A, B = A.double(), B.double()
    squared = float(((B.mT @ B) * (A @ A.mT)).sum())
    return abs(s) * math.sqrt(max(squared, 0.0))  # it may round to just below zero


def energy(S: torch.Tensor) -> float:
    """The sum of squares: the squared Frobenius norm of the update."""
    return float(S.double().square().sum())


def stable_rank(S: torch.Tensor) -> float:
    """Energy over that of the strongest direction: in [1, k], not moved by small singular values; 0 for no update."""
    strongest = float(S.max())
    return energy(S) / strongest**2 if strongest > 0 else 0.0


def effective_rank(S: torch.Tensor) -> float:
    """exp of the entropy of S / sum(S) (Roy and Vetterli, EUSIPCO 2007): how many directions carry the update, in [1,
    k]; 0 for no update.
    """
    total = float(S.sum())
    if total <= 0:
        return 0.0
    share = S.double().flatten() / total
    return math.exp(-float(torch.special.xlogy(share, share).sum()))


def kept_for_energy(singular_values: Sequence[torch.Tensor], share: float) -> list[int]:
    """How many directions a group each update keeps so that all together keep `share` of their energy.

    One threshold for all updates: the weakest directions anywhere go first, as long as what goes is at most 1 - share
    of the sum of squares. Each keeps at least one; a grouped one keeps in every group what its neediest group needs.

    Args:
        singular_values: of each update, (groups, k).
        share: in (0, 1]; 1 drops only what carries nothing.
    """
    squares = torch.cat([S.double().flatten() for S in singular_values]).square().sort().values
    total = float(squares.sum())
    budget = (1.0 - share) * total + 1e-24 * total  # fp64 makes no exact zeros
    dropped = int(torch.searchsorted(squares.cumsum(0), budget, right=True))
    if dropped == len(squares):  # there is no energy at all
        return [1] * len(singular_values)
    threshold = float(squares[dropped])
    return [max(1, int((S.double().square() >= threshold).sum(-1).max())) for S in singular_values]


# ---------------------------------------------------------------- where there are no factors

_EXACT_UP_TO = 512  # smaller side of a matrix whose full SVD takes a fraction of a second
_PASSES = 4
_MORE = 16


def dense_svd(matrix: torch.Tensor, rank: int, generator: torch.Generator) -> SVD:
    """The leading singular directions of dense matrices.

    Exact for small ones. For large ones by `subspace_svd`, which costs a few products: close to the best approximation,
    where the spectrum is flat not quite it, so the error is to be measured, not inferred.

    Args:
        matrix: (groups, out, columns), fp32 or fp64.
        rank: directions a group.
        generator: of the random start, on the CPU.

    Returns:
        `rank` directions, or as many as there are.
    """
    if min(matrix.shape[1:]) > max(_EXACT_UP_TO, _sketch(rank)):
        return subspace_svd(matrix, rank, _PASSES, generator)
    U, S, V = torch.linalg.svd(matrix.double(), full_matrices=False)
    return SVD(U[..., :rank], S[..., :rank], V[..., :rank, :])


def subspace_svd(matrix: torch.Tensor, rank: int, passes: int, generator: torch.Generator) -> SVD:
    """The leading singular directions by subspace iteration from a random start (Halko et al., arXiv 0909.4061,
    algorithm 4.4): the more passes over the matrix, the closer.

    Args:
        matrix: (groups, out, columns), fp32 or fp64.
        rank: directions a group.
        passes: at least 0.
        generator: of the random start, on the CPU.

    Returns:
        `rank` directions, or as many as there are.
    """
    groups, rows, columns = matrix.shape
    start = torch.randn(groups, columns, min(_sketch(rank), rows, columns), generator=generator, dtype=matrix.dtype)
    Q = torch.linalg.qr(matrix @ start.to(matrix.device)).Q
    for _ in range(passes):
        Q = torch.linalg.qr(matrix.mT @ Q).Q
        Q = torch.linalg.qr(matrix @ Q).Q
    U, S, V = torch.linalg.svd((Q.mT @ matrix).double(), full_matrices=False)
    return SVD((Q.double() @ U)[..., :rank], S[..., :rank], V[..., :rank, :])


def _sketch(rank: int) -> int:
    return rank + max(_MORE, rank // 2)


def leading_svd(matrix: torch.Tensor, rank: int) -> SVD:
    """The leading singular directions, exactly, by the eigenvectors of the smaller of M^T M and M M^T in fp64.

    Several times as fast as a singular value decomposition. Squaring costs half of fp64's digits, and only where
    singular values are small against the largest: for numbers that came from fp32 that is below their own rounding.

    Args:
        matrix: (groups, out, columns), of any floating dtype.
        rank: directions a group, at most as many as there are.
    """
    wide = matrix.double()
    _, rows, columns = wide.shape
    narrow = wide if rows >= columns else wide.mT  # (groups, longer, shorter)
    vectors = torch.linalg.eigh(narrow.mT @ narrow).eigenvectors.flip(-1)[..., :rank]  # ascending there
    images = narrow @ vectors
    S = torch.linalg.vector_norm(images, dim=-2)
    images = images / torch.where(S > 0, S, 1.0).unsqueeze(-2)
    return SVD(images, S, vectors.mT) if rows >= columns else SVD(vectors, S, images.mT)
