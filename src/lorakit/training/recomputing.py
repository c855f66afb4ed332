"""Activations computed again in the backward pass instead of kept. Knows no step."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

from lorakit.core.activated import checkpoint_contexts

_Context = contextlib.AbstractContextManager[Any]


def checkpoint_activations(model: Any, *, on: bool, again: Callable[[], _Context] = contextlib.nullcontext) -> None:
    """Have a transformers model keep only what enters its layers, and compute the rest again in the backward pass.

    Args:
        model: a transformers model.
        on: or no longer.
        again: what to enter while layers are computed again, besides what activated adapters need.
    """

    def contexts() -> tuple[_Context, _Context]:
        now, later = checkpoint_contexts()
        return now, _both(later, again())

    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    disable = getattr(model, "activation_checkpointing_disable", None) or model.gradient_checkpointing_disable
    if on:
        enable({"use_reentrant": False, "context_fn": contexts})
    elif any(getattr(module, "gradient_checkpointing", False) for module in model.modules()):
        disable()


@contextlib.contextmanager
def _both(outer: _Context, inner: _Context) -> Iterator[None]:
    with outer, inner:
        yield
