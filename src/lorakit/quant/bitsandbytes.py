"""Layers that bitsandbytes has quantised, read in place: their data as parts, unpacked by bitsandbytes' own functions.

Only read, and only where bitsandbytes has been imported (by whoever loaded the model): nothing here imports it.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from lorakit.errors import AdapterError, TargetError
from lorakit.quant.formats import Parts
from lorakit.quant.tensor import QuantizedTensor


def _functions() -> Any:
    return sys.modules["bitsandbytes.functional"]


@dataclass(frozen=True)
class FourBits:
    """NF4 or FP4. Parts: codes (rows, columns / 2), two a byte; the blocks' maxima (rows, columns / block) fp32.

    Attributes:
        kind: bitsandbytes' name of the type of the codes.
        block: columns with one maximum.
    """

    kind: str
    block: int

    @property
    def name(self) -> str:
        """As files call it."""
        return f"bitsandbytes-{self.kind}"

    def unpack(self, parts: Parts, out: torch.Tensor) -> None:
        """As `Format.unpack`."""
        codes, maxima = parts
        state = _functions().QuantState(
            maxima.reshape(-1), shape=out.shape, blocksize=self.block, quant_type=self.kind, dtype=out.dtype
        )
        out.copy_(_functions().dequantize_4bit(codes.reshape(-1, 1), state))

    def quantise(self, matrix: torch.Tensor, draws: torch.Generator | None = None) -> Parts:
        """Refuse.

        Raises:
            AdapterError: always.
        """
        raise AdapterError(f"{self.name}: lorakit reads this format and does not write it")


@dataclass(frozen=True)
class EightBits:
    """LLM.int8's weights. Parts: codes (rows, columns) int8; the rows' maxima (rows,) fp32."""

    name: str = "bitsandbytes-int8"

    def unpack(self, parts: Parts, out: torch.Tensor) -> None:
        """As `Format.unpack`."""
        codes, maxima = parts
        out.copy_(_functions().int8_vectorwise_dequant(codes, maxima))

    def quantise(self, matrix: torch.Tensor, draws: torch.Generator | None = None) -> Parts:
        """Refuse.

        Raises:
            AdapterError: always.
        """
        raise AdapterError(f"{self.name}: lorakit reads this format and does not write it")


def weight_of(layer: nn.Module, path: str, dtype: torch.dtype) -> QuantizedTensor | None:
    """The weight of a layer of bitsandbytes as a matrix that shares its data; None for any other layer.

    Args:
        layer: any.
        path: named in errors.
        dtype: to compute in.

    Raises:
        TargetError: the weight is not quantised yet, is kept in another way too, or its rows are not whole blocks.
    """
    library = sys.modules.get("bitsandbytes")
    if library is None:
        return None
    own: Any = layer
    if isinstance(layer, library.nn.Linear4bit):
        return _four_bits(own, path, dtype)
    if isinstance(layer, library.nn.Linear8bitLt):
        # the layer moves its weight's numbers into its own state in its first pass
        codes, maxima = (own.weight.CB, own.weight.SCB) if own.weight.CB is not None else (own.state.CB, own.state.SCB)
        if own.state.has_fp16_weights:
            raise TargetError(f"{path}: Linear8bitLt with has_fp16_weights keeps its weight wide; load it dense")
        if codes is None or maxima is None:
            raise TargetError(f"{path}: not quantised yet: move the model to its device first, model.to(device)")
        return QuantizedTensor.of(EightBits(), (codes, maxima.view(-1)), codes.shape[1], dtype)
    return None


def _four_bits(layer: Any, path: str, dtype: torch.dtype) -> QuantizedTensor:
    state = layer.weight.quant_state or layer.quant_state
    if state is None:
        raise TargetError(f"{path}: not quantised yet: move the model to its device first, model.to(device)")
    if vars(state).get("packing_format_for_cpu", False):
        raise TargetError(
            f"{path}: bitsandbytes has packed this weight anew in a pass on the processor; attach before the first pass"
        )
    rows, columns = state.shape
    if columns % state.blocksize:
        raise TargetError(
            f"{path}: rows of {columns} columns are not whole blocks of {state.blocksize}, so they cannot be unpacked "
            "one by one; load the base dense or with lorakit's own quantize='nf4', or leave the layer out by "
            "exclude_modules"
        )
    maxima = state.absmax
    if state.nested:  # the maxima are quantised too, in blocks that run over the ends of rows: 1/64 of the weights
        maxima = _functions().dequantize_blockwise(maxima, state.state2) + state.offset
    parts = (layer.weight.data.view(torch.uint8).view(rows, columns // 2), maxima.float().view(rows, -1))
    return QuantizedTensor.of(FourBits(state.quant_type, state.blocksize), parts, columns, dtype)
