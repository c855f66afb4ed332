"""Quantised weights kept dense for a while: for decoding, which would unpack all of them again for every token.

The same numbers, so the same results; only memory is given for time. Knows layers, not who decodes.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from torch import nn

from lorakit.quant.tensor import QuantizedTensor


@contextlib.contextmanager
def unpacked(model: nn.Module, most: int) -> Iterator[int]:
    """Within the block the model multiplies by dense copies of its quantised weights, as many as fit; afterwards its
    own parameters, the same objects, are back, whatever was raised.

    Weights are taken in the model's order, each whole; the others are unpacked in each product, as ever. What is only
    looked up (an embedding that is no head) stays as it is: of it little is unpacked.

    Args:
        model: adapted or not.
        most: bytes that the dense copies may take together.

    Yields:
        Bytes that they take.
    """
    places: dict[int, tuple[QuantizedTensor, list[tuple[nn.Module, str]]]] = {}
    multiplies: set[int] = set()
    for module in model.modules():
        for name, parameter in module._parameters.items():
            own: torch.Tensor | None = parameter
            if isinstance(own, QuantizedTensor):
                places.setdefault(id(own), (own, []))[1].append((module, name))
                if not isinstance(module, nn.Embedding):
                    multiplies.add(id(own))
    taken, exchanged = 0, []
    try:
        for key in [key for key in places if key in multiplies]:
            stored, owners = places[key]
            size = stored.numel() * stored.dtype.itemsize
            if taken + size <= most:
                taken += size
                dense = nn.Parameter(stored.dense(), requires_grad=False)
                exchanged.append((stored, owners))
                for module, name in owners:
                    module._parameters[name] = dense
        yield taken
    finally:
        for stored, owners in exchanged:
            for module, name in owners:
                module._parameters[name] = stored  # type: ignore[assignment]  # a parameter of a subclass
