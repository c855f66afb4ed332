"""NF4 with double quantisation (QLoRA, arXiv 2305.14314): four bits a weight, on levels that hold equal shares of a
normal distribution, with one absolute maximum for each block of 64 columns, itself stored in eight bits.

QLoRA quantises the maxima in groups of 256 that run over the ends of rows. Here a group is one row, so that rows can be
taken out alone: 4 + 8/64 bits a weight, and 4 bytes a row.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F

from lorakit.quant.formats import Parts

BLOCK = 64
# Q(i) of a standard normal, scaled to [-1, 1], zero among them: the table of the paper's appendix E
LEVELS = (
    -1.0,
    -0.6961928009986877,
    -0.5250730514526367,
    -0.39491748809814453,
    -0.28444138169288635,
    -0.18477343022823334,
    -0.09105003625154495,
    0.0,
    0.07958029955625534,
    0.16093020141124725,
    0.24611230194568634,
    0.33791524171829224,
    0.44070982933044434,
    0.5626170039176941,
    0.7229568362236023,
    1.0,
)
_PAIRS = torch.stack(
    (torch.tensor(LEVELS).repeat(16), torch.tensor(LEVELS).repeat_interleave(16)), 1
)  # (256, 2), by byte


@dataclass(frozen=True)
class NF4:
    """The format. Parts: codes (rows, blocks * 32), two a byte, the first in the low half; maxima (rows, blocks) uint8;
    their step (rows, 1) fp32. The last block of a row may stand for fewer columns.
    """

    name: str = "nf4"

    def quantise(self, matrix: torch.Tensor, draws: torch.Generator | None = None) -> Parts:
        """As `Format.quantise`; each number goes to a level of its block as it will be read."""
        wide = F.pad(matrix.detach().float(), (0, -matrix.shape[1] % BLOCK))
        wide = wide.view(len(matrix), -1, BLOCK)  # (rows, blocks, 64)
        maxima = wide.abs().amax(2)  # (rows, blocks)
        step = maxima.amax(1, keepdim=True) / 255
        stored = (maxima / step.clamp(min=torch.finfo(torch.float32).tiny)).round_().to(torch.uint8)
        scale = (stored.float() * step).unsqueeze(2)
        levels = matrix.new_tensor(LEVELS, dtype=torch.float32)
        ratio = torch.where(scale > 0, wide / scale, 0)
        if draws is None:
            between = (levels[1:] + levels[:-1]) / 2
        else:  # where between two levels a number goes up is drawn
            below = torch.bucketize(ratio, levels, right=True, out_int32=True).sub_(1).clamp_(0, len(LEVELS) - 2)
            share = torch.rand(ratio.shape, generator=draws, device=ratio.device)
            low, high = levels[below], levels[below + 1]
            ratio, between = torch.where(ratio - low > share * (high - low), high, low), levels[:-1]
        codes = torch.bucketize(ratio, between, out_int32=True).to(torch.uint8).flatten(1)
        return codes[:, 0::2] | (codes[:, 1::2] << 4), stored, step

    def unpack(self, parts: Parts, out: torch.Tensor) -> None:
        """As `Format.unpack`."""
        codes, stored, step = parts
        whole = out.shape[1] == stored.shape[1] * BLOCK
        values = out if whole else out.new_empty(len(out), stored.shape[1] * BLOCK)
        # a pair is looked up as one number of eight bytes: a third of the time of a row of two
        pairs = _PAIRS.to(codes.device).view(torch.int64).view(-1)
        torch.index_select(pairs, 0, codes.reshape(-1).int(), out=values.view(torch.int64).view(-1))
        values.view(*stored.shape, BLOCK).mul_((stored.float() * step).unsqueeze(2))
        if not whole:
            out.copy_(values[:, : out.shape[1]])
