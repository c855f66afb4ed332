"""The block formats of GGUF files (llama.cpp's ggml-quants): bytes of rows -> fp32, for whole tensors at once.

Every block of consecutive columns has its own scale. What comes out is what gguf-py's numpy code gives, bit for bit:
scales are fp16 and quants are small integers, so that of the products and sums only the last one rounds. Packed fields
are taken apart eight bytes at a time, as int64.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from lorakit.errors import AdapterError
from lorakit.quant.formats import Parts


@dataclass(frozen=True)
class Blocks:
    """One of GGUF's formats; a matrix is one part, (rows, bytes of a row) uint8.

    Attributes:
        name: ggml's name for it.
        elements: columns in a block.
        bytes: of a block.
        numbers: writes what (n, bytes) uint8 stand for into (n, elements) fp32.
        pack: the other way: fp32, and what is added before fractions are cut off: 0.5 for the nearest number, draws
            between 0 and 1 for one of the two neighbours; None: lorakit does not write the format.
    """

    name: str
    elements: int
    bytes: int
    numbers: Callable[[torch.Tensor, torch.Tensor], None]
    pack: Callable[[torch.Tensor, torch.Tensor | float], torch.Tensor] | None = None

    def unpack(self, parts: Parts, out: torch.Tensor) -> None:
        """As `Format.unpack`."""
        (packed,) = parts
        assert packed.shape[1] * self.elements == out.shape[1] * self.bytes, "rows are whole blocks"
        self.numbers(packed.reshape(-1, self.bytes), out.view(-1, self.elements))

    def quantise(self, matrix: torch.Tensor, draws: torch.Generator | None = None) -> Parts:
        """As `Format.quantise`, for rows of whole blocks; gguf-py's choice of scales, and to the nearest of quants.

        Raises:
            AdapterError: a format that lorakit does not write.
        """
        if self.pack is None:
            raise AdapterError(f"{self.name}: lorakit reads this format and does not write it")
        x = matrix.detach().float().reshape(-1, self.elements)
        cut = 0.5 if draws is None else torch.rand(x.shape, generator=draws, device=x.device)
        return (self.pack(x, cut).view(len(matrix), -1),)


def _half(blocks: torch.Tensor, at: int) -> torch.Tensor:
    """(n, 1) fp32 from the fp16 at a byte of each block; two beside each other by one conversion take six times as
    long.
    """
    return blocks[:, at : at + 2].view(torch.float16).float()


def _words(fields: torch.Tensor) -> torch.Tensor:
    """Bytes, eight at a time: what shifts them must leave no bit that passes into the next."""
    return fields.view(torch.int64)


def _fields(packed: torch.Tensor, bits: int, width: int) -> torch.Tensor:
    """Small fields of bytes, the low ones first: (n, groups * width) -> (n, groups, 8 / bits, width) uint8.

    Args:
        packed: uint8.
        bits: of a field: 4, 2 or 1.
        width: bytes after which the next group begins; a multiple of 8.
    """
    mask = int.from_bytes(bytes([2**bits - 1] * 8), "little")
    words = packed.contiguous().view(torch.int64).view(len(packed), -1, width // 8)  # (n, groups, width / 8)
    fields = [(words >> shift if shift else words) & mask for shift in range(0, 8, bits)]
    return torch.stack(fields, 2).view(torch.uint8)


_FIFTH_BITS = ((torch.arange(256).unsqueeze(1) >> torch.arange(8)) & 1).to(torch.uint8) * 16  # (256, 8), by byte


def _fifth_bits(packed: torch.Tensor) -> torch.Tensor:
    """Bits in the order of a little-endian word, each as the fifth of a byte: (n, 4) -> (n, 32) uint8."""
    table = _words(_FIFTH_BITS.to(packed.device)).view(-1)
    return table.index_select(0, packed.reshape(-1).int()).view(torch.uint8).view(-1, 32)


def _bytes_of(scales: torch.Tensor) -> torch.Tensor:
    """Undo `_half`."""
    return scales.half().view(torch.uint8)


def _nibbles(q: torch.Tensor) -> torch.Tensor:
    """Undo `_fields` of four bits: (n, 32) whole numbers below 16, the first 16 of them in the low halves."""
    return q[:, :16] | (q[:, 16:] << 4)


def _word(bits: torch.Tensor) -> torch.Tensor:
    """Undo `_fifth_bits`."""
    places = torch.arange(8, dtype=torch.uint8, device=bits.device)
    return (bits.view(-1, 4, 8) << places).sum(2, dtype=torch.uint8)


def _inverse(d: torch.Tensor) -> torch.Tensor:
    return torch.where(d == 0, 0, 1 / d)


def _symmetric(x: torch.Tensor, half: int, cut: torch.Tensor | float) -> tuple[torch.Tensor, torch.Tensor]:
    """(scale, quants from 0 to 2 half - 1): the largest number becomes quant 0, which stands for -half."""
    largest = x.gather(1, x.abs().argmax(1, keepdim=True))
    d = largest / -half
    return d, (x * _inverse(d) + (half + cut)).to(torch.uint8).clamp_(max=2 * half - 1)


def _between(x: torch.Tensor, most: int, cut: torch.Tensor | float) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(scale, least number, quants from 0 to most)."""
    least = x.amin(1, keepdim=True)
    d = (x.amax(1, keepdim=True) - least) / most
    return d, least, ((x - least) * _inverse(d) + cut).to(torch.uint8).clamp_(max=most)


def _to_q4_0(x: torch.Tensor, cut: torch.Tensor | float) -> torch.Tensor:
    d, q = _symmetric(x, 8, cut)
    return torch.cat((_bytes_of(d), _nibbles(q)), 1)


def _to_q4_1(x: torch.Tensor, cut: torch.Tensor | float) -> torch.Tensor:
    d, least, q = _between(x, 15, cut)
    return torch.cat((_bytes_of(d), _bytes_of(least), _nibbles(q)), 1)


def _to_q5_0(x: torch.Tensor, cut: torch.Tensor | float) -> torch.Tensor:
    d, q = _symmetric(x, 16, cut)
    return torch.cat((_bytes_of(d), _word(q >> 4), _nibbles(q & 15)), 1)


def _to_q5_1(x: torch.Tensor, cut: torch.Tensor | float) -> torch.Tensor:
    d, least, q = _between(x, 31, cut)
    return torch.cat((_bytes_of(d), _bytes_of(least), _word(q >> 4), _nibbles(q & 15)), 1)


def _to_q8_0(x: torch.Tensor, cut: torch.Tensor | float) -> torch.Tensor:
    d = x.abs().amax(1, keepdim=True) / 127
    scaled = x * _inverse(d)
    size = scaled.abs()
    whole = size.floor()
    up = (size - whole + cut).floor() if isinstance(cut, torch.Tensor) else (2 * (size - whole)).floor()
    q = scaled.sign() * (whole + up).clamp_(max=127)  # halves away from zero
    return torch.cat((_bytes_of(d), q.to(torch.int8).view(torch.uint8)), 1)


def _q4_0(b: torch.Tensor, out: torch.Tensor) -> None:
    q = _fields(b[:, 2:], 4, 16).flatten(1).view(torch.int8)
    out.copy_(q.sub_(8)).mul_(_half(b, 0))


def _q4_1(b: torch.Tensor, out: torch.Tensor) -> None:
    q = _fields(b[:, 4:], 4, 16).flatten(1)
    out.copy_(q).mul_(_half(b, 0)).add_(_half(b, 2))


def _q5_0(b: torch.Tensor, out: torch.Tensor) -> None:
    q = _fields(b[:, 6:], 4, 16).flatten(1).bitwise_or_(_fifth_bits(b[:, 2:6])).view(torch.int8)
    out.copy_(q.sub_(16)).mul_(_half(b, 0))


def _q5_1(b: torch.Tensor, out: torch.Tensor) -> None:
    q = _fields(b[:, 8:], 4, 16).flatten(1).bitwise_or_(_fifth_bits(b[:, 4:8]))
    out.copy_(q).mul_(_half(b, 0)).add_(_half(b, 2))


def _q8_0(b: torch.Tensor, out: torch.Tensor) -> None:
    out.copy_(b[:, 2:].view(torch.int8)).mul_(_half(b, 0))


def _q2_k(b: torch.Tensor, out: torch.Tensor) -> None:
    scales = b[:, :16]
    d = (_half(b, 80) * (scales & 15).float()).unsqueeze(2)  # (n, 16, 1)
    least = (_half(b, 82) * (scales >> 4).float()).unsqueeze(2)
    q = _fields(b[:, 16:80], 2, 32).view(-1, 16, 16)
    out.view(-1, 16, 16).copy_(q).mul_(d).sub_(least)


def _q3_k(b: torch.Tensor, out: torch.Tensor) -> None:
    low, high = b[:, 96:104], b[:, 104:108]  # of the 16 scales: 4 bits each, then 2 bits each
    low = torch.cat((low & 15, low >> 4), 1)
    high = torch.cat([(high >> shift) & 3 for shift in (0, 2, 4, 6)], 1)
    scales = (low | (high << 4)).float().sub_(32)
    d = (_half(b, 108) * scales).unsqueeze(2)  # (n, 16, 1)
    q, top = (_fields(b[:, 32:96], 2, 32).view(len(b), -1), _fields(b[:, :32], 1, 32).view(len(b), -1))
    q = q.bitwise_or_(_words(top).bitwise_left_shift_(2).view(torch.uint8)).view(torch.int8).sub_(4)  # no bit: 4 less
    out.view(-1, 16, 16).copy_(q.view(-1, 16, 16)).mul_(d)


def _scales_and_least(packed: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Eight scales and eight minima of 6 bits each: (n, 12) bytes -> two of (n, 8) fp32."""
    d, m, rest = packed[:, :4], packed[:, 4:8], packed[:, 8:]
    scales = torch.cat((d & 63, (rest & 15) | ((d >> 2) & 48)), 1)
    least = torch.cat((m & 63, (rest >> 4) | ((m >> 2) & 48)), 1)
    return scales.float(), least.float()


def _q4_k(b: torch.Tensor, out: torch.Tensor) -> None:
    scales, least = _scales_and_least(b[:, 4:16])
    q = _fields(b[:, 16:], 4, 32).flatten(1, 2)  # (n, 8, 32)
    out.view(q.shape).copy_(q).mul_((_half(b, 0) * scales).unsqueeze(2)).sub_((_half(b, 2) * least).unsqueeze(2))


def _q5_k(b: torch.Tensor, out: torch.Tensor) -> None:
    scales, least = _scales_and_least(b[:, 4:16])
    q, top = _fields(b[:, 48:], 4, 32).flatten(1, 2), _fields(b[:, 16:48], 1, 32)  # (n, 8, 32)
    q = q.bitwise_or_(_words(top).bitwise_left_shift_(4).view(torch.uint8).view(q.shape))
    out.view(q.shape).copy_(q).mul_((_half(b, 0) * scales).unsqueeze(2)).sub_((_half(b, 2) * least).unsqueeze(2))


def _q6_k(b: torch.Tensor, out: torch.Tensor) -> None:
    d = (_half(b, 208) * b[:, 192:208].view(torch.int8).float()).unsqueeze(2)  # (n, 16, 1)
    q, top = _fields(b[:, :128], 4, 64).view(len(b), -1), _fields(b[:, 128:192], 2, 32).view(len(b), -1)
    q = q.bitwise_or_(_words(top).bitwise_left_shift_(4).view(torch.uint8)).view(torch.int8).sub_(32)
    out.view(-1, 16, 16).copy_(q.view(-1, 16, 16)).mul_(d)


BLOCKS: dict[str, Blocks] = {
    each.name: each
    for each in (
        Blocks("Q4_0", 32, 18, _q4_0, _to_q4_0),
        Blocks("Q4_1", 32, 20, _q4_1, _to_q4_1),
        Blocks("Q5_0", 32, 22, _q5_0, _to_q5_0),
        Blocks("Q5_1", 32, 24, _q5_1, _to_q5_1),
        Blocks("Q8_0", 32, 34, _q8_0, _to_q8_0),
        Blocks("Q2_K", 256, 84, _q2_k),
        Blocks("Q3_K", 256, 110, _q3_k),
        Blocks("Q4_K", 256, 144, _q4_k),
        Blocks("Q5_K", 256, 176, _q5_k),
        Blocks("Q6_K", 256, 210, _q6_k),
    )
}
"""ggml's name -> format."""
