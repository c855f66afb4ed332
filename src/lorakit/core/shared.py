"""Layers that are given the same tensor, one after the other, as a projection's queries, keys and values: the first one
called computes for all, in one autograd node.

Whether two layers are given the same tensor is seen when they are called, so a guess that was wrong costs one product.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

import torch

from lorakit.core import kernels

if TYPE_CHECKING:
    from lorakit.core.active import Selection
    from lorakit.core.layer import AdaptedLayer


class SharedInput:
    """What a few layers keep for one another between their calls.

    Args:
        layers: in the order in which they are called.
    """

    def __init__(self, layers: Sequence[AdaptedLayer]) -> None:
        self.layers = tuple(layers)
        self._of: tuple[torch.Tensor, int, Selection] | None = None  # what the results below were computed from
        self._results: dict[AdaptedLayer, torch.Tensor] = {}

    def output(self, layer: AdaptedLayer, x: torch.Tensor, selection: Selection) -> torch.Tensor | None:
        """The layer's output for `x`; None where it has to compute it alone."""
        if layer is self.layers[0]:
            self._results.clear()
            self._compute(x, selection)
        known = self._of is not None and self._of[0] is x and self._of[1:] == (x._version, selection)
        if known and layer in self._results:
            y = self._results.pop(layer)
            if not self._results:
                self._of = None  # keeps nothing alive beyond the last call
            return y
        self.leave()
        return None

    def _compute(self, x: torch.Tensor, selection: Selection) -> None:
        operands = [layer.fusable(selection, x) for layer in self.layers]
        if all(operand is not None for operand in operands):
            outputs = kernels.lora_linears(x, [operand for operand in operands if operand is not None])
            self._of = (x, x._version, selection)
            self._results = dict(zip(self.layers, outputs, strict=True))

    def leave(self) -> None:
        """The guess was wrong, or the block is over: each layer computes alone from here on."""
        self._of = None
        self._results.clear()
        for layer in self.layers:
            layer.__dict__.pop("lorakit_shared", None)


def share(groups: Iterable[Sequence[AdaptedLayer]]) -> list[SharedInput]:
    """Let the layers of each group compute together, until `leave` is called on what is returned."""
    shared = [SharedInput(layers) for layers in groups]
    for group in shared:
        for layer in group.layers:
            layer.__dict__["lorakit_shared"] = group
    return shared
