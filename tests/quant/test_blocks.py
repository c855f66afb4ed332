"""GGUF's block formats, NF4 and int8: gguf-py's numbers bit for bit, and independent computations for the others."""

from pathlib import Path

import gguf
import numpy as np
import pytest
import torch

from gguf_files import stored
from lorakit import models
from lorakit.errors import AdapterError, ModelError
from lorakit.formats.gguf_container import MappedFile
from lorakit.quant.blocks import BLOCKS
from lorakit.quant.int8 import Int8
from lorakit.quant.nf4 import LEVELS, NF4
from lorakit.quant.tensor import QuantizedTensor, quantised

# where fp16 numbers lie in a block
SCALES = {
    "Q4_0": (0,),
    "Q4_1": (0, 2),
    "Q5_0": (0,),
    "Q5_1": (0, 2),
    "Q8_0": (0,),
    "Q2_K": (80, 82),
    "Q3_K": (108,),
    "Q4_K": (0, 2),
    "Q5_K": (0, 2),
    "Q6_K": (208,),
}
WRITTEN = [name for name, each in BLOCKS.items() if each.pack is not None]


def same_bits(ours, theirs):
    return np.array_equal(np.ascontiguousarray(ours.numpy()).view(np.int32), theirs.view(np.int32))


def unpacked(format, parts, columns):
    return QuantizedTensor.of(format, parts, columns, torch.float32).dense()


def random_blocks(name, rows, blocks):
    """Any bytes at all, with scales of every finite size."""
    draw = np.random.default_rng(0)
    packed = draw.integers(0, 256, (rows * blocks, BLOCKS[name].bytes), dtype=np.uint8)
    for place in SCALES[name]:
        bits = draw.integers(0, 1 << 16, rows * blocks, dtype=np.uint16)
        bits = np.where(bits & 0x7C00 == 0x7C00, bits & 0x83FF, bits)  # neither infinity nor NaN
        packed[:, place : place + 2] = bits.view(np.uint8).reshape(-1, 2)
    return packed.reshape(rows, -1)


@pytest.mark.parametrize("name", BLOCKS)
def test_any_bytes_give_what_gguf_gives_bit_for_bit(name):
    packed = random_blocks(name, 37, 3)
    ours = unpacked(BLOCKS[name], (torch.from_numpy(packed),), 3 * BLOCKS[name].elements)
    assert same_bits(ours, gguf.dequantize(packed, gguf.GGMLQuantizationType[name]))


def test_sizes_are_ggmls():
    for name, each in BLOCKS.items():
        assert gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[name]] == (each.elements, each.bytes)


@pytest.mark.parametrize("name", WRITTEN)
def test_what_we_write_is_what_gguf_writes(name):
    matrix = np.random.default_rng(1).standard_normal((19, 96)).astype(np.float32)
    matrix[3, :32] = 0
    (ours,) = BLOCKS[name].quantise(torch.from_numpy(matrix))
    assert np.array_equal(ours.numpy(), gguf.quantize(matrix, gguf.GGMLQuantizationType[name]))


def test_formats_that_are_only_read_say_so():
    assert WRITTEN == ["Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0"]
    with pytest.raises(AdapterError, match="Q4_K: lorakit reads this format and does not write it"):
        BLOCKS["Q4_K"].quantise(torch.zeros(1, 256))


@pytest.mark.real_model
def test_on_the_real_file(smollm2):
    file = MappedFile(Path(models.resolve(smollm2).location))
    kinds = set()
    for name, entry in file.header.entries.items():
        if file.kind(name) in BLOCKS and (name.startswith("blk.0.") or name == "token_embd.weight"):
            raw = file.raw(name)[:2000]
            ours = unpacked(BLOCKS[file.kind(name)], (raw,), entry.shape[1])
            assert same_bits(ours, gguf.dequantize(raw.numpy(), gguf.GGMLQuantizationType[file.kind(name)])), name
            kinds.add(file.kind(name))
    assert kinds == {"Q4_1", "Q8_0"}


# ---------------------------------------------------------------- NF4 and int8


def test_levels_of_nf4_hold_equal_shares_of_a_normal_distribution():
    """The paper's equation 4, with the offset that its code has."""
    offset = 0.9677083
    normal = torch.distributions.Normal(0.0, 1.0)
    above = normal.icdf(torch.linspace(offset, 0.5, 9, dtype=torch.float64))[:-1]
    below = -normal.icdf(torch.linspace(offset, 0.5, 8, dtype=torch.float64))[:-1]
    expected = torch.cat([below, torch.zeros(1), above]).sort().values
    torch.testing.assert_close(torch.tensor(LEVELS), (expected / expected.abs().max()).float(), atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("columns", [64, 200, 576, 8])
def test_nf4_takes_the_nearest_level_of_each_block(columns):
    torch.manual_seed(0)
    W = torch.randn(23, columns) * torch.rand(23, 1)
    W[5] = 0
    codes, maxima, step = NF4().quantise(W)
    dense = unpacked(NF4(), (codes, maxima, step), columns)
    assert dense.shape == W.shape
    for row in range(23):
        for start in range(0, columns, 64):
            part = W[row, start : start + 64]
            # the maximum of a block in eight bits: off by at most half a step
            scale = float(maxima[row, start // 64]) * float(step[row])
            assert abs(scale - float(part.abs().max())) <= float(step[row]) / 2 * 1.001
            levels = torch.tensor(LEVELS) * scale
            nearest = (part[:, None] - levels).abs().min(1).values
            torch.testing.assert_close((part - dense[row, start : start + 64]).abs(), nearest, atol=1e-6, rtol=1e-5)


def test_bits_per_weight():
    W = torch.randn(64, 4096)
    bits = {f.name: 8 * quantised(W, f, torch.float32).stored_bytes / W.numel() for f in (NF4(), Int8())}
    assert bits == {"nf4": 4 + 8 / 64 + 32 / 4096, "int8": 8 + 32 / 4096}


def test_int8_is_off_by_half_a_step_at_most():
    W = torch.randn(17, 50)
    W[3] = 0
    codes, scale = Int8().quantise(W)
    assert codes.abs().amax() == 127
    assert ((unpacked(Int8(), (codes, scale), 50) - W).abs() <= scale / 2 * 1.0001).all()


@pytest.mark.parametrize("format", [NF4(), Int8()], ids=lambda f: f.name)
def test_numbers_that_are_not_finite_are_refused_by_name(format):
    with pytest.raises(ModelError, match=f"layer.weight: holds NaN or infinity, which {format.name} cannot store"):
        quantised(torch.tensor([[1.0, float("nan")]]), format, torch.float32, "layer.weight")


def test_random_k_blocks_of_the_tests_are_ordinary_weights():
    for name in ("Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K"):
        kind = gguf.GGMLQuantizationType[name]
        values = gguf.dequantize(stored(np.ones((4, 256), np.float32), kind), kind)
        assert 1e-3 < values.std() < 2, name
