"""Bases whose weights are held in few bits: a GGUF file's own blocks, or int8 and NF4 made while the weights are read.

Either way the model is never dense as a whole, not while it is loaded either: its skeleton is given one parameter after
another.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

from lorakit.checkpoints.folder import Checkpoint
from lorakit.checkpoints.gguf import GgufWeights
from lorakit.core.sites import LINEAR, site_of
from lorakit.errors import ModelError, bullet_list
from lorakit.quant.formats import Format
from lorakit.quant.int8 import Int8
from lorakit.quant.nf4 import NF4
from lorakit.quant.tensor import AT_ONCE, quantised

Storage = Literal["none", "blocks", "int8", "nf4"]
"""How a base's weights are held: in a floating-point dtype, in a GGUF file's blocks, or quantised while loading."""

WORKSPACE = 2 * 4 * AT_ONCE
"""Bytes for what of a quantised base is dense at one time: a chunk in fp32, and as much for what is made of it."""

QUANTIZERS: dict[str, Format] = {"int8": Int8(), "nf4": NF4()}


def from_blocks(path: Path, skeleton: Any, device: torch.device) -> Any:
    """A model with the weights of a GGUF file in their blocks.

    Args:
        path: of the file.
        skeleton: the model on the meta device, in the dtype to compute in; it becomes the model.
        device: where it is to be.

    Raises:
        ModelError: the file lacks weights, or cannot be used in its blocks.
    """
    weights = GgufWeights(path, skeleton)
    return _filled(skeleton, weights.shapes, lambda name, dtype: weights.stored(name, dtype), device)


def from_checkpoint(checkpoint: Checkpoint, skeleton: Any, format: Format, device: torch.device) -> Any:
    """A model whose linear layers are quantised as they are read; embeddings, the head and norms keep their dtype.

    Args:
        checkpoint: the weights on disk.
        skeleton: as in `from_blocks`.
        format: of the linear layers.
        device: where it is to be.

    Raises:
        ModelError: a weight cannot be stored.
    """
    chosen = quantised_names(skeleton)

    def read(name: str, dtype: torch.dtype) -> torch.Tensor:
        with checkpoint.open() as shards:  # closed again: what has been read of a file need not stay in memory
            tensor = checkpoint.read(name, shards)
            return quantised(tensor, format, dtype, name) if name in chosen else tensor.to(dtype, copy=True)

    return _filled(skeleton, checkpoint.shapes, read, device)


def quantised_names(model: Any) -> set[str]:
    """The weights that `from_checkpoint` quantises: of linear layers, but of none that is (tied to) the output head."""
    head = model.get_output_embeddings()
    kept = {id(parameter) for parameter in (head.parameters() if head is not None else ())}
    return {
        f"{path}.weight"
        for path, module in model.named_modules()
        if site_of(module) is LINEAR and id(module.weight) not in kept
    }


def stored_bytes(skeleton: Any, storage: Storage, dtype: torch.dtype, path: Path) -> int:
    """What a base's weights and buffers will take in memory.

    Args:
        skeleton: of the model.
        storage: how they are held.
        dtype: to compute in.
        path: of the GGUF file, for "blocks".
    """
    buffers: int = sum(buffer.numel() * buffer.element_size() for buffer in skeleton.buffers())
    parameters: dict[str, nn.Parameter] = dict(skeleton.named_parameters())  # tied ones once
    if storage == "blocks":
        weights = GgufWeights(path, skeleton)
        return buffers + sum(weights.nbytes(name, dtype) for name in parameters)
    chosen = quantised_names(skeleton) if storage in QUANTIZERS else set()
    total = buffers
    for name, parameter in parameters.items():
        if name in chosen:
            rows = QUANTIZERS[storage].quantise(torch.zeros(1, parameter.shape[1]))
            total += len(parameter) * sum(part.numel() * part.element_size() for part in rows)
        else:
            total += parameter.numel() * dtype.itemsize
    return total


# ---------------------------------------------------------------- giving a skeleton its weights


def _filled(
    skeleton: Any,
    names: Mapping[str, Any],
    read: Callable[[str, torch.dtype], torch.Tensor],
    device: torch.device,
) -> Any:
    """The skeleton with all its parameters and buffers; those that are one stay one."""
    _compute_buffers(skeleton, set(names))
    groups: dict[int, list[str]] = {}
    for name, tensor in [*skeleton.named_parameters(remove_duplicate=False), *_meta_buffers(skeleton)]:
        groups.setdefault(id(tensor), []).append(name)
    for group in groups.values():
        if group[0] not in names:
            continue
        tensor = read(group[0], _dtype_of(skeleton, group[0])).to(device)
        path, _, _ = group[0].rpartition(".")
        owner = skeleton.get_submodule(path)
        is_buffer = group[0].rpartition(".")[2] in owner._buffers
        value = tensor if is_buffer else nn.Parameter(tensor, requires_grad=False)
        for name in group:
            path, _, own = name.rpartition(".")
            module = skeleton.get_submodule(path)
            (module._buffers if is_buffer else module._parameters)[own] = value
    left = [name for name, parameter in skeleton.named_parameters() if parameter.is_meta]
    left += [name for name, _ in _meta_buffers(skeleton)]
    if left:
        raise ModelError(f"the files do not hold all weights of the model:\n{bullet_list(left)}")
    for module in skeleton.modules():
        for name, buffer in module._buffers.items():
            module._buffers[name] = None if buffer is None else buffer.to(device)
    return skeleton.eval()


def _meta_buffers(model: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    return ((name, buffer) for name, buffer in model.named_buffers() if buffer.is_meta)


def _dtype_of(model: Any, name: str) -> torch.dtype:
    """The dtype that transformers would load a parameter in: the model's, but fp32 where its class asks for it."""
    wide = list(model._keep_in_fp32_modules_strict or ())
    if model.dtype == torch.float16:
        wide += list(model._keep_in_fp32_modules or ())
    dtype: torch.dtype = model.dtype
    return torch.float32 if any(part in name.split(".") for part in wide) else dtype


def _compute_buffers(model: Any, held: set[str]) -> None:
    """Give a skeleton the buffers that no file holds (frequencies of rotations, masks), as its class computes them.

    Raises:
        ModelError: the class does not compute one of them.
    """
    left = []
    for path, module in model.named_modules():
        own = {
            name: buffer
            for name, buffer in module._buffers.items()
            if buffer is not None and buffer.is_meta and (f"{path}.{name}" if path else name) not in held
        }
        if not own:
            continue
        for name, buffer in own.items():
            module._buffers[name] = torch.full(buffer.shape, _unset(buffer.dtype), dtype=buffer.dtype)
        model._init_weights(module)  # parameters are on the meta device still: nothing is drawn
        for name in own:
            value = module._buffers[name]
            assert value is not None
            unset = value.isnan() if value.is_floating_point() else value == _unset(value.dtype)
            if value.numel() and value.dtype is not torch.bool and bool(unset.any()):
                left.append(f"{path}.{name}")
    if left:
        raise ModelError(
            f"{type(model).__name__} does not say how these of its buffers are computed:\n{bullet_list(left)}\n"
            "Load it dense: quantize 'none' (--quantize none)"
        )


def _unset(dtype: torch.dtype) -> float | int | bool:
    if dtype.is_floating_point:
        return math.nan
    return False if dtype is torch.bool else torch.iinfo(dtype).min
