"""Folding an update into a weight: rounding to the dtype of storage, and how much of the update survives it.

Rounding in storage is what loses an update (arithmetic is fp32 here): where it is smaller than half the gap between two
numbers of the dtype, the nearest number is the old weight.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from lorakit.errors import AdapterError
from lorakit.quant.tensor import QuantizedTensor


@dataclass(frozen=True)
class Folded:
    """A weight with an update folded in.

    Attributes:
        weight: as it will be stored.
        survived: share of the update that is in it: <stored - old, update> / <update, update>. 1 where nothing is lost,
        0 where rounding gave the old weight back, nan for an update of zero.
        ratio: ||update|| / ||old weight||.
        energy: <update, update>.
    """

    weight: torch.Tensor
    survived: float
    ratio: float
    energy: float


def fold(
    weight: torch.Tensor,
    update: torch.Tensor,
    *,
    dtype: torch.dtype | None = None,
    generator: torch.Generator | None = None,
    where: str = "weight",
    rewrite: bool = False,
) -> Folded:
    """`weight + update`, computed in fp32 (fp64 for an fp64 weight) and rounded once.

    Args:
        weight: any floating dtype.
        update: fp32 or fp64, of the same shape.
        dtype: of storage; None: the weight's own.
        generator: round stochastically, drawing from it (on the weight's device); None: to the nearest.
        where: named in errors.
        rewrite: store a quantised weight in its own format, not in a floating-point dtype.

    Raises:
        AdapterError: the shapes differ, the format of a weight to be rewritten is only read, or the sum is not finite
        in that dtype.
    """
    if weight.shape != update.shape:
        raise AdapterError(
            f"{where}: an update of shape {tuple(update.shape)} cannot be folded into a weight of shape "
            f"{tuple(weight.shape)} (PEFT's A of a grouped convolution reads all channels); keep it unmerged"
        )
    wide = torch.promote_types(weight.dtype, torch.float32)
    old = weight.to(wide)
    update = update.to(device=weight.device, dtype=wide)
    total = old + update
    target = dtype or weight.dtype
    if rewrite and isinstance(weight, QuantizedTensor):
        stored: torch.Tensor = weight.rewritten(total, generator)
    else:
        stored = total.to(target) if generator is None else round_stochastically(total, target, generator)
    if not torch.isfinite(stored).all():
        raise AdapterError(
            f"{where}: not finite in {str(target).removeprefix('torch.')} after folding (largest {total.abs().max()}); "
            "choose a wider dtype, or keep the adapter unmerged"
        )
    energy = float(update.pow(2).sum(dtype=torch.float64))
    change = stored.to(wide) - old
    survived = float((change * update).sum(dtype=torch.float64)) / energy if energy else float("nan")
    size = float(torch.linalg.vector_norm(old.double())) if old.numel() else 0.0
    return Folded(stored, survived, energy**0.5 / size if size else float("inf"), energy)


def round_stochastically(x: torch.Tensor, dtype: torch.dtype, generator: torch.Generator) -> torch.Tensor:
    """Round each element to one of its two neighbours in `dtype`, with the probabilities that make its mean exact.

    Args:
        x: fp32 or fp64.
        dtype: the result's.
        generator: on x's device.
    """
    nearest = x.to(dtype)
    error = x - nearest.to(x.dtype)  # exact: both are numbers of x's dtype, close to each other
    toward = torch.where(error > 0, torch.inf, -torch.inf).to(dtype)
    other = torch.nextafter(nearest, toward)
    gap = (other.to(x.dtype) - nearest.to(x.dtype)).abs()
    draw = torch.rand(x.shape, generator=generator, device=x.device, dtype=x.dtype)
    return torch.where((error != 0) & torch.isfinite(other) & (draw * gap < error.abs()), other, nearest)
