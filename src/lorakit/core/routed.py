"""All adapters of a mixed batch in one product, for the few tokens a row of decoding.

Against one small product an adapter: every row goes through the stacked A of all of them, what is not its own is
zeroed, and the stacked B adds the rest. More arithmetic, fewer calls; it pays while tokens are few.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import nn

from lorakit.core.active import Route, Rows
from lorakit.core.deltas import LayerUpdate, LoRA
from lorakit.core.sites import LinearSite, Site

_FEW_TOKENS = 4  # a row; above, an adapter's own rows are enough work for a call of their own


class _Stack(NamedTuple):
    versions: tuple[int, ...]  # of the tensors it was made from: training changes them in place
    A: torch.Tensor  # (R, in), R the sum of all ranks
    B: torch.Tensor  # (R, out), scales included
    own: torch.Tensor  # (rows, R): 1 where that part of A is the row's own


def stackable(site: Site | None, routed: Sequence[tuple[LayerUpdate, Rows]], route: Route, x: torch.Tensor) -> bool:
    """Whether `add_stacked` gives what the adapters one by one give, and faster."""
    return (
        len(routed) > 1
        and type(site) is LinearSite
        and not torch.is_grad_enabled()
        and not torch.compiler.is_compiling()
        and x.shape[:-1].numel() <= _FEW_TOKENS * len(route.slots)
        and all(_is_plain(update.low_rank_alone) for update, _ in routed)
    )


def _is_plain(lora: LoRA | None) -> bool:
    return type(lora) is LoRA and lora.bias is None and not (lora.dropout and lora.training)


def add_stacked(
    route: Route, layer: nn.Module, routed: Sequence[tuple[LayerUpdate, Rows]], x: torch.Tensor, y: torch.Tensor
) -> None:
    """Add to `y` (N, ..., out), in place, what each row's adapter makes of `x` (N, ..., in)."""
    loras = [update.lora for update, _ in routed]
    versions = tuple(tensor._version for lora in loras if lora is not None for tensor in (lora.A, lora.B))
    kept = route.stacks.get(layer)
    stack = kept if isinstance(kept, _Stack) and kept.versions == versions and len(kept.own) == len(x) else None
    if stack is None or stack.A.dtype != y.dtype or stack.A.device != y.device:
        factors = [(*lora.factors(), lora.s) for lora in loras if lora is not None]
        A = torch.cat([A for A, _, _ in factors]).to(y)
        B = torch.cat([B.T * s for _, B, s in factors]).to(y)
        own, start = y.new_zeros(len(x), len(A)), 0
        for (of_one, _, _), (_, rows) in zip(factors, routed, strict=True):
            own[rows, start : start + len(of_one)] = 1
            start += len(of_one)
        stack = route.stacks[layer] = _Stack(versions, A, B, own)
    h = x @ stack.A.T  # (N, ..., R)
    h *= stack.own if h.ndim == 2 else stack.own.view(len(x), *[1] * (h.ndim - 2), -1)
    y.view(-1, y.shape[-1]).addmm_(h.view(-1, h.shape[-1]), stack.B)
