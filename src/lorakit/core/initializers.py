"""How A and B start. Each initialiser is a pure function of shapes (or of W) and a seeded generator.

An initialiser returns an `Init`; where it moves part of W into B A, `base_update` is what the caller adds to the base
weight, through the BaseWeight, so that the function of the layer is unchanged. The ones here leave the base as it is.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch

from lorakit.errors import ConfigError


class Init(NamedTuple):
    """Starting factors, fp32 on the CPU, and what to add to the base weight (None: nothing)."""

    A: torch.Tensor
    B: torch.Tensor
    base_update: torch.Tensor | None = None


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
