"""loralib's convolution update as plain factors, and back.

loralib multiplies two matrices, B (k out/groups, k r) by A (k r, k in), and reads the product, row after row, as a
weight (out, in/groups, k, k). So, without groups, row o k + a of the product is the a-th of k stretches, each k in
long, of output o: in our form the update has k copies of A, one in each stretch, and rank k^2 r. The other way round an
update of rank r of ours, (B, A), is (B x I_k, A cut in k stretches), which loralib can hold; that form is recognised
and undone. With groups the stretches of an output do not line up with A's rows, and the factors come from a
decomposition of the dense update (fp64, exact rank).
"""

from __future__ import annotations

import math

import torch

from lorakit.adapter.value import Factors


def obstacle(f: Factors) -> str | None:
    """Why loralib has no such convolution, or None."""
    kernel = f.A.shape[2:]
    if f.B.shape[1] != f.r:
        return "a grouped convolution, whose update loralib's factors cannot hold"
    if len(set(kernel)) > 1:
        return f"a kernel of {' x '.join(map(str, kernel))}; loralib's are square"
    if kernel[0] != 1 and len(kernel) != 2:
        return f"a {len(kernel)}-d convolution; loralib's work in 2-d only"
    return None


def stacked(A: torch.Tensor, B: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Our factors A (r, in, k, k), B (out, r, 1, 1) in loralib's form: A (k r, k in), B (k out, k r)."""
    r, inputs, k = A.shape[:3]
    return A.reshape(r * k, k * inputs), torch.kron(B.reshape(B.shape[0], r), torch.eye(k, dtype=B.dtype))


def factors(A: torch.Tensor, B: torch.Tensor, alpha: float, weight: tuple[int, ...]) -> Factors:
    """loralib's factors as ours, for a weight (out, in/groups, k, k); the scale is alpha / r of either.

    Raises:
        ValueError: the shapes do not fit.
    """
    k, out, per_group = weight[2], weight[0], weight[1]
    groups = A.shape[1] // (k * per_group) if A.shape[1] % (k * per_group) == 0 else 0
    fits = (
        groups > 0
        and A.shape[0] % k == 0
        and out % groups == 0
        and tuple(B.shape) == (out // groups * k, A.shape[0])
        and B.shape[0] * A.shape[1] == math.prod(weight)
    )
    if not fits:
        raise ValueError(f"A {tuple(A.shape)} and B {tuple(B.shape)} do not fit its weight {tuple(weight)}")
    r, ones = A.shape[0] // k, (1,) * (len(weight) - 2)
    if groups > 1:
        return _decomposed(A, B, alpha / r, weight, groups)
    blocks = B.view(out, k, r, k)  # output, stretch, rank, copy
    plain = blocks[:, 0, :, 0]
    if torch.equal(B, torch.kron(plain, torch.eye(k, dtype=B.dtype))):
        return Factors(
            A=A.reshape(r, *weight[1:]).clone(), B=plain.reshape(out, r, *ones).clone(), alpha=alpha, kind="convolution"
        )
    copies = A.new_zeros(k, r * k, k, A.shape[1])  # stretch, row of A, stretch, position in it
    for a in range(k):
        copies[a, :, a] = A
    return Factors(
        A=copies.reshape(k * k * r, *weight[1:]),
        B=B.reshape(out, k * k * r, *ones).clone(),
        alpha=alpha * k * k,
        kind="convolution",
    )


def _decomposed(A: torch.Tensor, B: torch.Tensor, s: float, weight: tuple[int, ...], groups: int) -> Factors:
    """Grouped factors of the dense update, all groups of the largest rank that one has."""
    dense = (B.double() @ A.double()).reshape(groups, weight[0] // groups, -1)  # (groups, out/groups, in/groups k k)
    U, S, Vh = torch.linalg.svd(dense, full_matrices=False)
    noise = torch.finfo(torch.float64).eps * max(dense.shape[1:]) * S.amax()
    rank = max(1, int((noise < S).sum(1).max()))
    root = S[:, :rank].sqrt()
    return Factors(
        A=(root[..., None] * Vh[:, :rank]).float().reshape(groups * rank, *weight[1:]),
        B=(U[..., :rank] * root[:, None]).float().reshape(weight[0], rank, *(1,) * (len(weight) - 2)),
        alpha=s * groups * rank,
        kind="convolution",
    )
