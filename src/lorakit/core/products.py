"""The one place that chooses how a frozen weight multiplies: exactly, or by an integer copy made of it.

Exactly is the plain way and what every layer does. Inside `int8_products(layers)` those layers multiply by integers
while they train (in train mode, with an adapter active); evaluation, decoding and the base alone stay exact.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch.autograd.function import once_differentiable

from lorakit.core import int8
from lorakit.core.int8 import Int8Weight
from lorakit.core.sites import LinearSite

if TYPE_CHECKING:
    from lorakit.core.layer import AdaptedLayer

Copies = Sequence[Int8Weight | None]
"""For each of several weights its integer copy, or None: it multiplies exactly."""


def forwards(
    x: torch.Tensor, W: Sequence[torch.Tensor], b: Sequence[torch.Tensor | None], copies: Copies
) -> list[torch.Tensor]:
    """x W_i^T + b_i of each.

    Args:
        x: (T, in).
        W: (out_i, in) each.
        b: (out_i,) each, or None.
        copies: of each weight.

    Returns:
        (T, out_i) each, in x's dtype.
    """
    rounded = int8.rounded(x) if any(copies) else None
    outputs = []
    for W_i, b_i, copy in zip(W, b, copies, strict=True):
        if copy is None or rounded is None:
            outputs.append(F.linear(x, W_i, b_i))
        else:
            y = copy.forwards(rounded)
            outputs.append((y if b_i is None else y.add_(b_i)).to(x.dtype))
    return outputs


def backwards(g: Sequence[torch.Tensor], W: Sequence[torch.Tensor], copies: Copies) -> torch.Tensor:
    """The sum of g_i W_i, (T, in) in their dtype; arguments as `forwards`, g_i (T, out_i)."""
    total: torch.Tensor | None = None
    turned: torch.Tensor | None = None  # what came of integers, rotated
    for g_i, W_i, copy in zip(g, W, copies, strict=True):
        if copy is not None:
            own = copy.backwards(g_i)
            turned = own if turned is None else turned.add_(own)
        else:
            total = g_i @ W_i if total is None else total.addmm_(g_i, W_i)
    if turned is not None:
        back = int8.rotated(turned).to(g[0].dtype)
        total = back if total is None else total.add_(back)
    assert total is not None, "there is at least one"
    return total


class _FrozenLinear(torch.autograd.Function):
    """x W^T + b with W and b frozen, by W's integer copy."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, W: torch.Tensor, b: torch.Tensor | None, copy: Int8Weight) -> torch.Tensor:
        ctx.save_for_backward(W)
        ctx.copy = copy
        return forwards(x, [W], [b], [copy])[0]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grad_outputs: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        grad_x = backwards(grad_outputs, ctx.saved_tensors, [ctx.copy]) if ctx.needs_input_grad[0] else None
        return grad_x, None, None, None


def frozen_linear(x: torch.Tensor, W: torch.Tensor, b: torch.Tensor | None, copy: Int8Weight) -> torch.Tensor:
    """A frozen layer's own output by the integer copy of its weight, where no update is computed with it.

    Args:
        x: (..., in).
        W: (out, in), frozen.
        b: (out,), frozen, or None.
        copy: of `W`.

    Returns:
        (..., out) in x's dtype.
    """
    y: torch.Tensor = _FrozenLinear.apply(x.reshape(-1, x.shape[-1]), W, b, copy)  # type: ignore[no-untyped-call]
    return y.view(*x.shape[:-1], -1)


def int8_obstacle(device: torch.device) -> str | None:
    """Why weights on this device cannot multiply by integers; None where they can."""
    if device.type != "cpu":
        return f"integer products are written for processors, not for {device.type}"
    return None if int8.is_exact(device) else "this processor's integer product saturates, so its sums would be wrong"


def takes_int8(layer: AdaptedLayer) -> bool:
    """Whether a layer can multiply by integers: by one frozen matrix, with sums that 32 bits hold."""
    site = layer.lorakit_site
    if not isinstance(site, LinearSite) or site.kind != "matrix":
        return False
    weight = layer.get_parameter(site.weight_name)
    return not weight.requires_grad and max(weight.shape) <= int8.LONGEST_SUM


@contextlib.contextmanager
def int8_products(layers: Iterable[AdaptedLayer]) -> Iterator[None]:
    """Let these layers multiply by integer copies of their weights while they train; nothing of them stays, whatever is
    raised.

    Args:
        layers: each `takes_int8`, on a device without `int8_obstacle`. Their weights must not change meanwhile.
    """
    copied: list[AdaptedLayer] = []
    try:
        for layer in layers:
            assert layer.lorakit_site is not None, "takes_int8"
            weight = layer.get_parameter(layer.lorakit_site.weight_name)
            layer.__dict__["lorakit_int8"] = Int8Weight(layer.lorakit_site.rows(weight))
            copied.append(layer)
        yield
    finally:
        for layer in copied:
            layer.__dict__.pop("lorakit_int8", None)
