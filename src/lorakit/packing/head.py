"""The output head of a language model, left out of a pass: the model then gives what would enter the head.

That stands for the logits only where the model's logits are the head's product and nothing else. Models that scale or
cap them differ, so a pass is watched: what comes out must be the very tensor that went in. Knows no packing.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from lorakit.quant.tensor import QuantizedTensor


def frozen_linear_head(model: nn.Module) -> nn.Linear | None:
    """The output head, if it is a plain linear layer that is not trained and that nothing watches or wraps; else None.

    An adapted layer has another class, and so has one that other libraries quantise; a weight that is divided among
    devices has another class than a parameter of one.
    """
    if not isinstance(model, PreTrainedModel):
        return None
    head: Any = model.get_output_embeddings()  # type: ignore[no-untyped-call]
    if type(head) is not nn.Linear or "forward" in vars(head):
        return None
    if type(head.weight) not in (nn.Parameter, QuantizedTensor):
        return None
    hooks = (head._forward_hooks, head._forward_pre_hooks, head._backward_hooks, head._backward_pre_hooks)
    compiled = model._compiled_call_impl is not None or head._compiled_call_impl is not None
    trained = torch.is_grad_enabled() and any(p.requires_grad for p in head.parameters())
    return None if any(hooks) or compiled or trained else head


class Entering:
    """In place of a head's forward: gives back what enters."""

    def __init__(self) -> None:
        self._entered: list[tuple[torch.Tensor, int]] = []

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """The input, noted."""
        self._entered.append((x, _version(x)))
        return x

    def came_out(self, output: Any) -> bool:
        """Whether a model's output is the one tensor that entered, untouched since: nothing is done to the head's
        product, and nothing else is multiplied by the head.
        """
        if len(self._entered) != 1:
            return False
        ((x, version),) = self._entered
        return output is x and _version(x) == version


def _version(x: torch.Tensor) -> int:
    return 0 if x.is_inference() else x._version  # tensors of inference mode do not count their changes


@contextlib.contextmanager
def left_out(head: nn.Linear) -> Iterator[Entering]:
    """Within the block the head gives back what it is given; its own forward is back afterwards, whatever is raised."""
    entering = Entering()
    vars(head)["forward"] = entering
    try:
        yield entering
    finally:
        del vars(head)["forward"]
