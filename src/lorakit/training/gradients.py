"""Gradients of the trained tensors, in memory that stays theirs from before the first step to the last. Knows no loss.

Left to autograd, each gradient is allocated anew in every backward pass, wherever a block has just become free, and
stays there till the step is over. Hundreds of such small blocks, and the optimiser's beside them, then lie scattered
through memory that is needed in large pieces, and the C library takes more from the system (docs/log.md: what plans
left out).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from types import TracebackType
from typing import Self

import torch
from torch import nn


class Gradients:
    """Buffers for the gradients of `tensors`, while entered.

    A tensor that a step does not reach (an expert no token was sent to) has no gradient after it, as without buffers:
    the optimiser leaves it alone.
    """

    def __init__(self, tensors: Iterable[nn.Parameter]) -> None:
        self._tensors = tuple(tensors)
        self._buffers = [torch.zeros_like(tensor) for tensor in self._tensors]
        self._reached: set[nn.Parameter] = set()
        self._hooks: list[torch.utils.hooks.RemovableHandle] = []

    def __enter__(self) -> Self:
        self._hooks = [
            tensor.register_post_accumulate_grad_hook(self._reached.add)  # type: ignore[no-untyped-call]
            for tensor in self._tensors
        ]
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for hook in self._hooks:
            hook.remove()
        for tensor in self._tensors:
            tensor.grad = None

    @contextmanager
    def of_step(self) -> Iterator[None]:
        """Within the block gradients are summed from zero; afterwards each tensor that was reached has its own."""
        self._reached.clear()
        torch._foreach_zero_(self._buffers)
        for tensor, buffer in zip(self._tensors, self._buffers, strict=True):
            tensor.grad = buffer
        yield
        for tensor in self._tensors:
            if tensor not in self._reached:
                tensor.grad = None
