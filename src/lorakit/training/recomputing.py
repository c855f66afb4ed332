"""Activations computed again in the backward pass instead of kept. Knows no step."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any


def checkpoint_activations(
    model: Any, *, on: bool, again: Callable[[], contextlib.AbstractContextManager[Any]] = contextlib.nullcontext
) -> None:
    """Have a transformers model keep only what enters its layers, and compute the rest again in the backward pass.

    Args:
        model: a transformers model.
        on: or no longer.
        again: what to enter while layers are computed again.
    """
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    disable = getattr(model, "activation_checkpointing_disable", None) or model.gradient_checkpointing_disable
    if on:
        enable({"use_reentrant": False, "context_fn": lambda: (contextlib.nullcontext(), again())})
    elif any(getattr(module, "gradient_checkpointing", False) for module in model.modules()):
        disable()
