"""How a frozen weight is stored: read it as a dense tensor, write one back or refuse."""

from __future__ import annotations

from typing import Protocol

import torch
from torch import nn

from lorakit.errors import AdapterError, TargetError
from lorakit.quant.tensor import WAYS_OUT, QuantizedTensor, as_dense, format_of


class BaseWeight(Protocol):
    """One way of storing the weight of a layer."""

    def read(self, layer: nn.Module) -> torch.Tensor:
        """The dense weight, in the layer's own layout; never a copy where the storage is dense already."""
        ...

    def write(self, layer: nn.Module, weight: torch.Tensor) -> None:
        """Store `weight` in place (the parameter stays the same object), or raise where the storage cannot hold it."""
        ...


class Dense:
    """A plain floating-point parameter, called `weight` in most layers."""

    def __init__(self, name: str = "weight") -> None:
        self.name = name

    def read(self, layer: nn.Module) -> torch.Tensor:
        """The parameter itself."""
        weight: torch.Tensor = layer.get_parameter(self.name)
        return weight

    @torch.no_grad()
    def write(self, layer: nn.Module, weight: torch.Tensor) -> None:
        """Copy into the parameter, rounding to its dtype; tied parameters see it too."""
        layer.get_parameter(self.name).copy_(weight)


class Quantised:
    """A matrix stored in few bits (`quant.tensor`), called `weight` in most layers. It is never written."""

    def __init__(self, name: str, path: str) -> None:
        self.name, self.path = name, path

    def read(self, layer: nn.Module) -> torch.Tensor:
        """The matrix unpacked, in the dtype it is computed with."""
        return as_dense(layer.get_parameter(self.name).detach())

    def write(self, layer: nn.Module, weight: torch.Tensor) -> None:
        """Refuse.

        Raises:
            AdapterError: always; says what can be done instead.
        """
        raise AdapterError(
            f"{self.path}: stored as {format_of(layer.get_parameter(self.name))}, which cannot take another weight "
            f"without losing most of the change: {WAYS_OUT}"
        )


def base_weight_of(layer: nn.Module, path: str, name: str = "weight") -> BaseWeight:
    """The storage of a layer's weight, the parameter called `name` (`Site.weight_name`).

    Raises:
        TargetError: the weight is stored in a way lorakit does not read.
    """
    weight = getattr(layer, name, None)
    if isinstance(weight, QuantizedTensor):
        return Quantised(name, path)
    if isinstance(weight, nn.Parameter) and weight.is_floating_point():
        return Dense(name)
    raise TargetError(
        f"{path}: {type(layer).__name__} stores its weight as {getattr(weight, 'dtype', type(weight).__name__)}, "
        "which this version does not read; load the base in fp32, bf16 or fp16, or leave it out by exclude_modules"
    )
