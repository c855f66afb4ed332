"""How A and B start. Each initialiser is a pure function of shapes, or of W, and a seeded generator.

Some begin with B A zero. The others take B A out of the weight (`Init.from_start`): the layer then counts its update
from there, so that its function is unchanged without a change of the weight.

Those that look at W see it as a stack of matrices (n, out, columns): one, or one a group of a convolution, or one an
expert; so they are defined for every layer that multiplies.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from typing import NamedTuple

import torch

from lorakit.core import lowrank
from lorakit.errors import ConfigError


class Init(NamedTuple):
    """Starting factors, fp32 on the CPU, and whether the update counts from them: s (B A - B0 A0)."""

    A: torch.Tensor
    B: torch.Tensor
    from_start: bool = False


Initializer = Callable[[tuple[int, ...], tuple[int, ...], torch.Generator], Init]


def default(shape_A: tuple[int, ...], shape_B: tuple[int, ...], generator: torch.Generator) -> Init:
    """A uniform in +-1/sqrt(fan_in), B zero: Kaiming with a = sqrt(5), as loralib and PEFT (arXiv 2106.09685)."""
    bound = 1 / math.sqrt(math.prod(shape_A[1:]))
    return Init(torch.empty(shape_A).uniform_(-bound, bound, generator=generator), torch.zeros(shape_B))


def gaussian(shape_A: tuple[int, ...], shape_B: tuple[int, ...], generator: torch.Generator) -> Init:
    """A normal with standard deviation 1/r, B zero (as PEFT and diffusers)."""
    return Init(torch.empty(shape_A).normal_(0, 1 / shape_A[0], generator=generator), torch.zeros(shape_B))


def orthogonal(shape_A: tuple[int, ...], shape_B: tuple[int, ...], generator: torch.Generator) -> Init:
    """A and B non-zero with B A = 0: their rows lie in the two halves of one orthogonal basis of R^r (as PEFT).

    Raises:
        ConfigError: r is odd.
    """
    r = shape_A[0]
    if r % 2:
        raise ConfigError(f"init 'orthogonal' splits an orthogonal r x r matrix in halves: r must be even (got {r})")
    basis, _ = torch.linalg.qr(torch.empty(r, r).normal_(generator=generator))
    columns, outputs = math.prod(shape_A[1:]), shape_B[0]
    A = basis[0::2].T @ torch.empty(r // 2, columns).normal_(generator=generator) / 10  # (r, in)
    B = torch.empty(outputs, r // 2).normal_(generator=generator) @ basis[1::2] / 10  # (out, r)
    return Init(A.reshape(shape_A), B.reshape(shape_B))


def random(shape_A: tuple[int, ...], shape_B: tuple[int, ...], generator: torch.Generator) -> Init:
    """A and B both uniform in +-1/sqrt(fan_in), so the update is not zero (PEFT's init_lora_weights=False)."""
    A = default(shape_A, shape_B, generator).A
    return Init(A, default(shape_B, shape_A, generator).A)


def bias(init: str, shape_B: tuple[int, ...], generator: torch.Generator) -> torch.Tensor:
    """A bias of B, (out,): zero, but for init `random`, where it is uniform in +-1/sqrt(fan_in) as B is."""
    start = torch.zeros(shape_B[0])
    bound = 1 / math.sqrt(math.prod(shape_B[1:]))
    return start.uniform_(-bound, bound, generator=generator) if init == "random" else start


def random_lookup(shape_A: tuple[int, ...], shape_B: tuple[int, ...], generator: torch.Generator) -> Init:
    """A and B both normal(0, 1): `random` for embeddings (as PEFT)."""
    return Init(torch.empty(shape_A).normal_(generator=generator), torch.empty(shape_B).normal_(generator=generator))


def zero_A(shape_A: tuple[int, ...], shape_B: tuple[int, ...], generator: torch.Generator) -> Init:
    """A zero, B normal(0, 1): the default for embeddings, where A's columns are looked up and few get a gradient (as
    loralib).
    """
    return Init(torch.zeros(shape_A), torch.empty(shape_B).normal_(generator=generator))


INITIALIZERS: dict[str, Initializer] = {
    "default": default,
    "gaussian": gaussian,
    "orthogonal": orthogonal,
    "random": random,
}
FOR_EMBEDDINGS: dict[str, Initializer] = {**INITIALIZERS, "default": zero_A, "random": random_lookup}


# ---------------------------------------------------------------- from the weight

Factorisation = Callable[[torch.Tensor, int, float, torch.Generator], tuple[torch.Tensor, torch.Tensor]]
"""(W (n, out, columns) fp32 or fp64, r of each, s, generator) -> A (n, r, columns), B (n, out, r)."""

_PISSA_NITER = re.compile(r"pissa_niter_(\d+)")


def olora(weight: torch.Tensor, r: int, s: float, generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
    """OLoRA (arXiv 2406.01775): B = Q[:, :r], A = R[:r] of W = Q R, unpivoted. s B A is taken out of W, as in PEFT.

    The first r columns of W have the first r columns of Q, and R[:r] = Q[:, :r]^T W: the whole of neither is made.
    """
    wide = weight.double()
    Q = torch.linalg.qr(wide[..., :r]).Q
    return Q.mT @ wide, Q


def pissa(weight: torch.Tensor, r: int, s: float, generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
    """PiSSA (arXiv 2404.02948): s B A is the best approximation of W of rank r, B = U sqrt(S / s), A = sqrt(S / s)
    V^T.
    """
    return _principal(lowrank.leading_svd(weight, r), r, s)


def pissa_fast(passes: int) -> Factorisation:
    """PiSSA with a randomised singular value decomposition of some `passes` (PEFT's pissa_niter_N)."""

    def factorise(
        weight: torch.Tensor, r: int, s: float, generator: torch.Generator
    ) -> tuple[torch.Tensor, torch.Tensor]:
        return _principal(lowrank.subspace_svd(weight, r, passes, generator), r, s)

    return factorise


def _principal(of_weight: lowrank.SVD, r: int, s: float) -> tuple[torch.Tensor, torch.Tensor]:
    return lowrank.balanced(of_weight._replace(S=of_weight.S / s), r)


def factorisation(name: str) -> Factorisation | None:
    """The initialiser that looks at the weight, by its name in a config; None: it is none of them."""
    if passes := _PISSA_NITER.fullmatch(name):
        return pissa_fast(int(passes[1]))
    return {"olora": olora, "pissa": pissa}.get(name)


def from_weight(
    factorise: Factorisation,
    weight: torch.Tensor,
    shape_A: tuple[int, ...],
    shape_B: tuple[int, ...],
    s: float,
    generator: torch.Generator,
) -> Init:
    """A layer's start from its weight.

    Args:
        factorise: of matrices.
        weight: (n, out, columns), of any floating dtype; on the meta device it has no numbers, and A and B are zero.
        shape_A: of the layer's factors.
        shape_B: likewise.
        s: scale.
        generator: on the CPU.

    Raises:
        ConfigError: the matrices have fewer directions than r.
    """
    n, out, columns = weight.shape
    r = math.prod(shape_B) // (n * out)
    if r > min(out, columns):
        raise ConfigError(f"a matrix of {out} x {columns} has no {r} directions to start from; lower its rank")
    if weight.is_meta:
        return Init(torch.zeros(shape_A), torch.zeros(shape_B), from_start=True)
    own = weight.detach()
    own = own.cpu() if own.device.type == "mps" else own  # where there is no fp64
    A, B = factorise(own.to(torch.promote_types(own.dtype, torch.float32)), r, s, generator)
    A, B = A.float().cpu().contiguous(), B.float().cpu().contiguous()
    return Init(A.reshape(shape_A), B.reshape(shape_B), from_start=True)


# ---------------------------------------------------------------- from data


def lora_ga(gradient: torch.Tensor, r: int, gamma: float) -> tuple[torch.Tensor, torch.Tensor]:
    """LoRA-GA (arXiv 2407.05000, section 3.3): with U S V^T the gradient of the loss in W, A = c V[:, :r]^T and
    B = c U[:, r:2r], c = out^(1/4) / gamma^(1/2), so that the first step is nearest to that of full fine-tuning. s B A
    is taken out of W. (PEFT 0.21 scales B by the gradient's singular values too, which the paper does not, and A by 1.)

    Args:
        gradient: (n, out, columns), with 2 r <= out, columns.
        r: rank.
        gamma: divides the size of the factors.

    Returns:
        A (n, r, columns), B (n, out, r), fp64.
    """
    of_gradient = lowrank.leading_svd(gradient, 2 * r)
    scale = gradient.shape[1] ** 0.25 / gamma**0.5
    return of_gradient.V[:, :r] * scale, of_gradient.U[..., r:] * scale


def loftq(
    weight: torch.Tensor,
    r: int,
    s: float,
    quantised: Callable[[torch.Tensor], torch.Tensor],
    iterations: int = 1,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """LoftQ (arXiv 2310.08659): alternately Q = q(W - s B A) and s B A = the best approximation of W - Q of rank r, of
    which both factors get the root of its singular values.

    Args:
        weight: (n, out, columns), as it was before it was quantised.
        r: rank.
        s: scale.
        quantised: what the storage makes of a weight, dense again: read(write(W)).
        iterations: 1 corrects the base as it is quantised; more change it, to what is returned.

    Returns:
        A (n, r, columns), B (n, out, r), fp64, and Q.
    """
    wide = weight.double()
    low_rank = torch.zeros_like(wide)
    for _ in range(iterations):
        Q = quantised((wide - low_rank).to(weight.dtype)).double()
        A, B = _principal(lowrank.leading_svd(wide - Q, r), r, s)
        low_rank = B @ A * s
    return A, B, Q
