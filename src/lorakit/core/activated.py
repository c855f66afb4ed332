"""Activated LoRA (aLoRA, arXiv 2504.12397): an update for the tokens from its invocation on, a sequence of tokens in
the prompt. What stands before has the base's keys and values, which the base and other such adapters can share.

Which tokens those are is found where the model is called (`adapter.invocations`), row by row, and holds for the length
of the pass in a context variable of the thread that runs it. Knows no models and no layouts of rows.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from contextvars import ContextVar
from dataclasses import dataclass, field, replace
from types import MappingProxyType
from typing import Any

import torch
from torch import nn

from lorakit.core.active import Rows
from lorakit.core.deltas import LoRA
from lorakit.core.kernels import LoRAOperands
from lorakit.core.sites import Site
from lorakit.errors import AdapterError


class Mask:
    """Which tokens of a pass an adapter is for.

    Attributes:
        where: (rows, tokens) bool.
    """

    def __init__(self, where: torch.Tensor) -> None:
        self.where = where
        self._made: dict[tuple[torch.dtype, torch.device], torch.Tensor] = {}

    def like(self, x: torch.Tensor) -> torch.Tensor:
        """(*leading dimensions of x, 1): 1 or 0 for each token of `x` (rows, tokens, ..., d) or (rows * tokens, d).

        Raises:
            AdapterError: `x` has other tokens.
        """
        key = (x.dtype, x.device)
        if key not in self._made:
            self._made[key] = self.where.to(x.device, x.dtype)
        own, shape = self._made[key], tuple(self.where.shape)
        if x.ndim == 2 and len(x) == own.numel():
            return own.reshape(-1, 1)
        if tuple(x.shape[:2]) != shape or x.ndim < 3:
            raise AdapterError(
                f"an activated adapter (alora_invocation_tokens) is in a layer whose input of shape {tuple(x.shape)} "
                f"does not hold the {shape[0]} x {shape[1]} tokens of the pass, so it cannot tell which is which: "
                "leave that layer out by exclude_modules"
            )
        return own.view(*shape, *[1] * (x.ndim - 2)).expand(*x.shape[:-1], 1)

    def of(self, rows: Rows, size: int) -> Mask:
        """That of some of the places along the first dimension, `size`, of a layer's input."""
        where = self.where if size == len(self.where) else self.where.reshape(-1, 1)
        return Mask(where[rows])


class Invocation:
    """What all layers of one activated adapter share. Compared by identity.

    Attributes:
        tokens: with which the adapter is invoked.
    """

    def __init__(self, tokens: tuple[int, ...]) -> None:
        self.tokens = tokens

    def mask(self, x: torch.Tensor) -> torch.Tensor:
        """For the input (or output) `x` of a layer: `Mask.like`.

        Raises:
            AdapterError: no pass is running in which the invocation was looked for.
        """
        found = _running.get().masks.get(self)
        if found is None:
            raise AdapterError(
                "an activated adapter (alora_invocation_tokens) is active, and it is not known which tokens it is for: "
                "call the model itself, with input_ids of (rows, tokens). With gradient checkpointing, enable it with "
                "{'use_reentrant': False, 'context_fn': lorakit.core.activated.checkpoint_contexts}"
            )
        return found.like(x)


class ActivatedLoRA(LoRA):
    """The update of one layer that counts for some of the tokens.

    Attributes:
        invocation: from which on it does.
    """

    def __init__(self, A: torch.Tensor, B: torch.Tensor, invocation: Invocation, **settings: Any) -> None:
        super().__init__(A, B, **settings)
        self.invocation = invocation

    def forward(
        self, site: Site, layer: nn.Module, x: torch.Tensor, y: torch.Tensor, out: slice = slice(None)
    ) -> torch.Tensor:
        """As `LoRA.forward`, zero for the other tokens."""
        change = super().forward(site, layer, x, y, out)
        return change * self.invocation.mask(change)

    def fused(self, site: Site, layer: Any, x: torch.Tensor, weight: float) -> LoRAOperands | None:
        """As `LoRA.fused`, with the mask."""
        operands = super().fused(site, layer, x, weight)
        return None if operands is None else operands._replace(mask=self.invocation.mask(x))

    def extra_repr(self) -> str:
        """As a LoRA's."""
        return f"{super().extra_repr()}, from {list(self.invocation.tokens)} on"


# ---------------------------------------------------------------- the running pass


@dataclass(frozen=True)
class Pass:
    """A forward pass of a model with activated adapters.

    Attributes:
        masks: which tokens each adapter is for.
        invoked: tokens of an invocation -> (rows,) bool: whether they have come in the row, in this pass or before.
        owner: who began it.
        before: the pass in which it runs.
    """

    masks: Mapping[Invocation, Mask] = field(default_factory=lambda: MappingProxyType({}))
    invoked: Mapping[tuple[int, ...], torch.Tensor] = field(default_factory=lambda: MappingProxyType({}))
    owner: object = None
    before: Pass | None = None


_running: ContextVar[Pass] = ContextVar("lorakit_pass", default=Pass())  # noqa: B039 - it is never changed


def begin(owner: object) -> None:
    """A pass begins in which nothing is known yet."""
    _running.set(Pass(owner=owner, before=_running.get()))


def found(masks: Mapping[Invocation, Mask], invoked: Mapping[tuple[int, ...], torch.Tensor]) -> None:
    """What is known of the pass that has begun."""
    _running.set(replace(_running.get(), masks=masks, invoked=invoked))


def end(owner: object) -> Pass | None:
    """The pass that `owner` began is over; None if it began none."""
    over = _running.get()
    if over.owner is not owner or over.before is None:
        return None
    _running.set(over.before)
    return over


@contextlib.contextmanager
def _changed(masks: Mapping[Invocation, Mask]) -> Iterator[None]:
    token = _running.set(replace(_running.get(), masks=masks))
    try:
        yield
    finally:
        _running.reset(token)


def kept(places: torch.Tensor) -> contextlib.AbstractContextManager[None]:
    """Within the block, layers are given these tokens (P,) of each row alone."""
    masks = _running.get().masks
    if not masks:
        return contextlib.nullcontext()
    return _changed({invocation: Mask(mask.where[:, places]) for invocation, mask in masks.items()})


def of_rows(lora: LoRA | None, rows: Rows, size: int) -> contextlib.AbstractContextManager[None]:
    """Within the block, an update is given these places alone along the first dimension, `size`, of a layer's input."""
    masks = _running.get().masks
    if not isinstance(lora, ActivatedLoRA) or lora.invocation not in masks:
        return contextlib.nullcontext()
    return _changed({lora.invocation: masks[lora.invocation].of(rows, size)})


def checkpoint_contexts() -> tuple[contextlib.AbstractContextManager[None], contextlib.AbstractContextManager[None]]:
    """For `torch.utils.checkpoint(context_fn=...)`: what is computed again in the backward pass, when the forward pass
    is over, knows what was known then.
    """
    return contextlib.nullcontext(), _changed(_running.get().masks)
