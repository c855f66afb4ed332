"""DoRA (arXiv 2402.09353): a low-rank update of a weight's direction, and a trained length for each of its rows.

W' = m V / ||V|| with V = W + s B A: every output's row of V is made as long as its m says. The lengths of V come from
the factors, ||V||^2 = ||W||^2 + 2 s <W A^T, B> + s^2 <B (A A^T), B> row by row; V itself is never made. As in the
paper (section 4.3) and PEFT they count as constants in the gradient.
"""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import nn

from lorakit.core import lowrank
from lorakit.core.deltas import LoRA
from lorakit.core.kernels import LoRAOperands
from lorakit.core.sites import Site
from lorakit.errors import AdapterError
from lorakit.quant.tensor import as_dense

_AT_ONCE = 1 << 22  # elements of a weight that are widened at a time


def row_norms(weight: torch.Tensor, A: torch.Tensor, B: torch.Tensor, s: float) -> torch.Tensor:
    """Lengths of the rows of W + s B A, in fp32 (fp64 for an fp64 weight), never zero.

    Args:
        weight: (outputs, columns), of any floating dtype.
        A: factors of a layer, as `LoRA` has them.
        B: likewise.
        s: scale.

    Returns:
        (outputs,).

    Raises:
        AdapterError: A and B make no matrix of that shape.
    """
    wide = torch.promote_types(weight.dtype, torch.float32)
    A, B = lowrank.blocks(A.detach().to(wide), B.detach().to(wide))  # (groups, r, columns), (groups, outputs, r)
    groups, outputs, _ = B.shape
    if tuple(weight.shape) != (groups * outputs, A.shape[-1]):
        raise AdapterError(
            f"DoRA: factors of {groups * outputs} x {A.shape[-1]} do not belong to a weight of "
            f"{weight.shape[0]} x {weight.shape[1]} (PEFT's A of a grouped convolution reads all channels)"
        )
    squares = []
    rows = max(1, _AT_ONCE // weight.shape[1])
    with contextlib.nullcontext() if weight.is_meta else torch.autocast(weight.device.type, enabled=False):
        gram = A @ A.mT  # (groups, r, r)
        for group, own in enumerate(weight.detach().chunk(groups)):  # each (outputs, columns)
            for W, factor in zip(torch.split(own, rows), torch.split(B[group], rows), strict=True):
                W = as_dense(W)  # read twice
                along = 2 * s * (W.to(wide) @ A[group].T) + s * s * (factor @ gram[group])  # (rows, r)
                squares.append(torch.linalg.vector_norm(W, dim=1, dtype=wide).square_() + (along * factor).sum(1))
    # rounding can make the square of a row that is almost zero negative, and a row of zeros has no direction
    return torch.cat(squares).clamp_(min=torch.finfo(wide).tiny).sqrt_()


def dense_delta(
    weight: torch.Tensor, A: torch.Tensor, B: torch.Tensor, s: float, magnitude: torch.Tensor
) -> torch.Tensor:
    """W' - W.

    Args:
        weight: (outputs, columns).
        A: as in `row_norms`.
        B: likewise.
        s: scale.
        magnitude: (outputs,).

    Returns:
        (outputs, columns), fp32 or fp64.
    """
    gain = (magnitude.detach() / row_norms(weight, A, B, s)).unsqueeze(1)
    wide = weight.detach().to(gain.dtype)
    blocks_A, blocks_B = lowrank.blocks(A.detach().to(gain.dtype), B.detach().to(gain.dtype))
    return (gain - 1) * wide + gain * s * torch.bmm(blocks_B, blocks_A).reshape(wide.shape)


class _Norms(NamedTuple):
    """Lengths of rows, and what they were computed from."""

    lengths: torch.Tensor
    tensors: tuple[weakref.ref[torch.Tensor], ...]
    states: tuple[tuple[int, int], ...]
    s: float

    def hold(self, tensors: Sequence[torch.Tensor], s: float) -> bool:
        """Whether they are those of these tensors as they are now."""
        same = all(known() is tensor for known, tensor in zip(self.tensors, tensors, strict=True))
        return same and self.s == s and self.states == _states(tensors)


def _states(tensors: Sequence[torch.Tensor]) -> tuple[tuple[int, int], ...]:
    """What changes when a tensor does: in place, or by its `.data`."""
    return tuple((0 if t.is_meta else t.data_ptr(), t._version) for t in tensors)


class DoRA(LoRA):
    """The update of one layer by DoRA.

    Attributes:
        magnitude: (out,) parameter, fp32: the length of each output's row of the weight.
    """

    def __init__(self, A: torch.Tensor, B: torch.Tensor, magnitude: torch.Tensor, **settings: Any) -> None:
        super().__init__(A, B, **settings)
        self.magnitude = nn.Parameter(magnitude)
        self._norms: _Norms | None = None

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_norms": None}

    def norms(self, site: Site, layer: nn.Module) -> torch.Tensor:
        """Lengths of the rows of W + s B A, (out,); while nothing is trained kept until one of the three changes."""
        weight = getattr(layer, site.weight_name)  # sharded, it is no parameter while it is whole
        tensors = (weight, self.A, self.B)
        training = torch.is_grad_enabled() and (self.A.requires_grad or self.B.requires_grad)
        # fused optimisers change tensors without counting it, so what training reads is neither kept nor left behind
        if training or torch.compiler.is_compiling() or any(t.is_inference() for t in tensors):  # which count nothing
            self._norms = None
            return row_norms(site.rows(weight), *self.factors(), self.s)
        if self._norms is None or not self._norms.hold(tensors, self.s):
            with torch.inference_mode(False), torch.no_grad():  # a later pass with gradients may read them
                lengths = row_norms(site.rows(weight), *self.factors(), self.s)
            self._norms = _Norms(lengths, tuple(map(weakref.ref, tensors)), _states(tensors), self.s)
        return self._norms.lengths

    def gain(self, site: Site, layer: nn.Module) -> torch.Tensor:
        """What each output of W + s B A is multiplied by, (out,), with a gradient for the magnitude."""
        return self.magnitude / self.norms(site, layer)

    def forward(
        self, site: Site, layer: nn.Module, x: torch.Tensor, y: torch.Tensor, out: slice = slice(None)
    ) -> torch.Tensor:
        """As `LoRA.forward`. Dropout is on the input of A alone."""
        change = super().forward(site, layer, x, y)
        gain = self.gain(site, layer)
        bias = layer._parameters.get("bias")
        shape = [1] * y.ndim
        shape[site.bias_dim] = -1
        plain = y if bias is None else y - bias.view(shape).to(y.dtype)
        return plain * (gain - 1).view(shape).to(y.dtype) + change * gain.view(shape).to(y.dtype)

    def fused(self, site: Site, layer: Any, x: torch.Tensor, weight: float) -> LoRAOperands | None:
        """As `LoRA.fused`, with the gain; None where the update is weighted, which is no gain of the sum."""
        operands = super().fused(site, layer, x, weight) if weight == 1.0 else None
        return None if operands is None else operands._replace(gain=self.gain(site, layer))

    def dense(self, site: Site, weight: torch.Tensor) -> torch.Tensor:
        """W' - W in fp32 (fp64 for an fp64 weight), in the layout of the weight."""
        return site.unrows(dense_delta(site.rows(weight), *self.factors(), self.s, self.magnitude), weight)

    def extra_repr(self) -> str:
        """As a LoRA's."""
        return f"{super().extra_repr()}, magnitudes"
