"""Layers that another library has quantised, as plain layers whose weight unpacks in products (`quant.tensor`).

While adapters are attached such a layer has a plain layer's class and a weight of ours that shares its data: the fused
kernels, DoRA, fingerprints and `merged` blocks need to know no library. Detaching gives back class and parameter.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from lorakit.errors import TargetError
from lorakit.quant import bitsandbytes, torchao
from lorakit.quant.tensor import QuantizedTensor


class Foreign:
    """The layers of a model that were made plain; `back` undoes it.

    Args:
        model: it is changed in place.

    Raises:
        TargetError: a layer cannot be read; the model is untouched.
    """

    def __init__(self, model: nn.Module) -> None:
        plain = {nn.Linear, nn.Embedding}
        dtype = next((p.dtype for p in model.parameters() if type(p) is nn.Parameter and p.is_floating_point()), None)
        found: list[tuple[Any, QuantizedTensor]] = []
        for path, module in model.named_modules():
            own = module._parameters.get("weight")
            weight = bitsandbytes.weight_of(module, path, dtype or torch.float32)
            if weight is None and type(module) in plain:
                weight = torchao.weight_of(own, path, dtype or torch.float32 if own is None else own.dtype)
            if weight is None:
                continue
            if "forward" in module.__dict__:
                raise TargetError(
                    f"{path}: its forward was replaced on the layer itself (hooks of accelerate do that), so an update "
                    "would never be computed; load the model on one device, without device_map"
                )
            found.append((module, weight))
        self._kept: list[tuple[Any, type[nn.Module], Any]] = []
        for module, weight in found:
            self._kept.append((module, type(module), module._parameters["weight"]))
            module.__class__ = type(module) if type(module) in plain else nn.Linear
            module._parameters["weight"] = nn.Parameter(weight, requires_grad=False)

    def back(self) -> None:
        """Give every layer its own class and weight, the same objects."""
        while self._kept:
            module, kind, own = self._kept.pop()
            module.__class__ = kind
            module._parameters["weight"] = own
