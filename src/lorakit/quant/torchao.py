"""Weights that torchao has quantised, read in place: their inner tensors as parts, made dense by torchao's own code.

Only read, and only where torchao has been imported (by whoever loaded the model): nothing here imports it.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from typing import Any

import torch

from lorakit.errors import AdapterError, TargetError
from lorakit.quant.formats import Parts
from lorakit.quant.tensor import QuantizedTensor


@dataclass(frozen=True)
class Torchao:
    """One of torchao's tensors whose inner tensors have the matrix's rows first.

    Attributes:
        kind: torchao's class.
        names: of the inner tensors, as the class has them.
        context: what else it consists of.
    """

    kind: Any
    names: tuple[str, ...]
    context: Any

    @property
    def name(self) -> str:
        """As files call it."""
        return f"torchao-{self.kind.__name__}"

    def unpack(self, parts: Parts, out: torch.Tensor) -> None:
        """As `Format.unpack`."""
        inner = dict(zip(self.names, parts, strict=True))
        rows = self.kind.__tensor_unflatten__(inner, self.context, out.shape, out.stride())
        out.copy_(rows.dequantize())

    def quantise(self, matrix: torch.Tensor, draws: torch.Generator | None = None) -> Parts:
        """Refuse.

        Raises:
            AdapterError: always.
        """
        raise AdapterError(f"{self.name}: lorakit reads this format and does not write it")


def weight_of(parameter: torch.Tensor | None, path: str, dtype: torch.dtype) -> QuantizedTensor | None:
    """A parameter quantised by torchao as a matrix that shares its data; None for any other parameter.

    Args:
        parameter: of a layer that multiplies, or looks up.
        path: named in errors.
        dtype: to compute in.

    Raises:
        TargetError: it cannot be read row by row, or it comes with quantised activations.
    """
    library = sys.modules.get("torchao.utils")
    if library is None or not isinstance(parameter, library.TorchAOBaseTensor):
        return None
    own: Any = parameter
    kind = next(each for each in type(own).__mro__ if each.__module__.startswith("torchao"))
    names, context = own.__tensor_flatten__()
    parts = tuple(getattr(own, name) for name in names)
    instead = "load the base dense, or with lorakit's own quantize='int8' or 'nf4', or leave the layer out"
    if own.ndim != 2 or any(part.ndim == 0 or len(part) != len(own) for part in parts):
        raise TargetError(f"{path}: torchao's {kind.__name__} does not lie row by row; {instead} (exclude_modules)")
    if any(context.get(key) is not None for key in ("act_quant_kwargs", "activation_quantization")):
        raise TargetError(
            f"{path}: torchao quantises the activations of this layer too, which an update beside it would not see; "
            f"{instead} (exclude_modules)"
        )
    return QuantizedTensor.of(Torchao(kind, tuple(names), context), parts, own.shape[1], dtype)
