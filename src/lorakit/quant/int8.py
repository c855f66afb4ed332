"""Eight bits a weight: every row of a matrix as integers up to 127 times one fp32 scale."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from lorakit.quant.formats import Parts


@dataclass(frozen=True)
class Int8:
    """The format. Parts: codes (rows, columns) int8, scales (rows, 1) fp32."""

    name: str = "int8"

    def quantise(self, matrix: torch.Tensor, draws: torch.Generator | None = None) -> Parts:
        """As `Format.quantise`."""
        wide = matrix.detach().float()
        scale = wide.abs().amax(1, keepdim=True) / 127
        codes = torch.where(scale > 0, wide / scale, 0)
        if draws is None:
            codes.round_()
        else:
            codes.add_(torch.rand(codes.shape, generator=draws, device=codes.device)).floor_().clamp_(max=127)
        return codes.to(torch.int8), scale

    def unpack(self, parts: Parts, out: torch.Tensor) -> None:
        """As `Format.unpack`."""
        codes, scale = parts
        out.copy_(codes).mul_(scale)
