"""Products with a frozen weight in 8-bit integers: rounded, summed exactly in 32 bits, scaled back.

A vector along which is summed is rounded to 255 levels of its own largest element. One large element would leave the
others few of these levels, and the inputs of a transformer's layers have such features. So input and weight are rotated
first, blocks of neighbours by a Hadamard matrix (arXiv 2404.00456): the product of rotated vectors is that of the
vectors, and what one element held alone its block now shares. That takes no pass over data beforehand, so what is
computed depends on weight and input alone, and the error of a gradient is less than half of what it is without
(docs/int8.md).

Knows no layers and no autograd; `core.products` chooses who multiplies so.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import NamedTuple

import torch

LEVELS = 127  # each side of zero
LONGEST_SUM = (2**31 - 1) // LEVELS**2  # summands that 32 bits hold whatever they are
_BLOCK = 32  # elements that share; larger blocks cost more than they gain (docs/int8.md)
_AT_ONCE = 1 << 17  # elements rounded together: few enough to stay in the cache between passes


@functools.cache
def _hadamard(size: int, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """The Hadamard matrix of a power of two, orthogonal and its own inverse: (size, size)."""
    matrix = torch.ones(1, 1, dtype=dtype, device=device)
    while len(matrix) < size:
        matrix = torch.cat((torch.cat((matrix, matrix), 1), torch.cat((matrix, -matrix), 1)))
    return matrix.mul_(size**-0.5)


def rotated(x: torch.Tensor) -> torch.Tensor:
    """Blocks of neighbours in each row times a Hadamard matrix: the largest power of two up to 32 that divides the row.
    Twice is not at all.

    Args:
        x: (n, k), of any floating dtype.

    Returns:
        (n, k), fp32 (fp64 of fp64).
    """
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    size = min(_BLOCK, x.shape[1] & -x.shape[1])
    if size <= 1:
        return wide
    return (wide.reshape(-1, size) @ _hadamard(size, wide.dtype, wide.device)).view(x.shape)


class Rounded(NamedTuple):
    """Rows of a matrix (n, k) as integers times a scale a row.

    Attributes:
        values: (n, k) int8, between -127 and 127.
        scales: (n, 1), fp32 (fp64 of an fp64 matrix).
    """

    values: torch.Tensor
    scales: torch.Tensor

    def dense(self) -> torch.Tensor:
        """What it stands for, (n, k), in the dtype of the scales."""
        return self.values.to(self.scales.dtype) * self.scales


def rounded(x: torch.Tensor, prepare: Callable[[torch.Tensor], torch.Tensor] = rotated) -> Rounded:
    """The rows of `x` (n, k), each rounded by itself. One with NaN or infinity gets a scale that is not finite either.

    Args:
        x: of any floating dtype.
        prepare: what is done to some of the rows before they are rounded; its result is at least fp32.
    """
    values = torch.empty(x.shape, dtype=torch.int8, device=x.device)
    scales = []
    at_once = max(1, _AT_ONCE // max(1, x.shape[1]))
    for rows, into in zip(torch.split(x, at_once), torch.split(values, at_once), strict=True):
        wide = prepare(rows)
        largest = wide.abs().amax(1, keepdim=True)
        scale = largest.clamp_(min=LEVELS * torch.finfo(largest.dtype).tiny).div_(LEVELS)  # of a row of zeros too
        into.copy_((wide / scale).round_())
        scales.append(scale)
    return Rounded(values, torch.cat(scales))


def product(x: Rounded, W: torch.Tensor) -> torch.Tensor:
    """x W.

    Args:
        x: rows of (n, k).
        W: (k, m) int8.

    Returns:
        (n, m), in the dtype of x's scales.
    """
    return torch._int_mm(x.values, W).to(x.scales.dtype).mul_(x.scales)


def product_reference(x: Rounded, W: torch.Tensor) -> torch.Tensor:
    """What `product` computes, in floating point."""
    return x.dense() @ W.to(x.scales.dtype)


class Int8Weight:
    """A frozen weight W (out, in), each row rotated and rounded: a byte a number, beside the weight itself.

    One copy serves both directions. In the backward pass, where sums run over the rows, the rows' scales go into the
    gradient before it is rounded. A second copy rounded along the columns, with a rotated gradient, would make the
    error of the adapter's gradients 3% less, which is mostly that of the forward pass (docs/int8.md).

    Attributes:
        rounded: rows of (out, in), rotated.
    """

    def __init__(self, W: torch.Tensor) -> None:
        self.rounded = rounded(W.detach())

    def forwards(self, x: Rounded) -> torch.Tensor:
        """x W^T: (n, in), rotated, -> (n, out)."""
        return product(x, self.rounded.values.T).mul_(self.rounded.scales.T)

    def backwards(self, g: torch.Tensor) -> torch.Tensor:
        """g W: (n, out) -> (n, in), rotated: sums of several are rotated back once."""
        return product(rounded(g, lambda rows: rows * self.rounded.scales.T), self.rounded.values)

    def dense(self) -> torch.Tensor:
        """The weight it stands for, (out, in)."""
        return rotated(self.rounded.dense())


def nbytes(out_features: int, in_features: int) -> int:
    """Memory of an `Int8Weight` of that shape (of a weight that is no fp64)."""
    return out_features * in_features + 4 * out_features


@functools.cache
def is_exact(device: torch.device) -> bool:
    """Whether this device's integer product sums the largest numbers without saturating, which older instructions of
    processors do not.
    """
    signs = torch.tensor([1, -1, 1, 1], dtype=torch.int8, device=device).repeat(64)  # (256,)
    x = (signs * LEVELS).repeat(32, 1)
    W = torch.stack((signs, -signs, signs.abs(), signs.roll(1)) * 4) * LEVELS  # (16, 256)
    sums: torch.Tensor = torch._int_mm(x, W.T)
    return torch.equal(sums.cpu().long(), x.cpu().long() @ W.cpu().long().T)
