"""Flux's layers as its first release names them, which is how kohya's trainer writes them; tensors in, tensors out.

The release has one matrix where diffusers has several: q, k and v, and in blocks of one stream the MLP's first layer
too, their rows below each other. Cutting an update B A of that matrix apart leaves A whole and cuts the rows of B; a
part keeps the columns of B that are not zero in its rows. The other way the factors stand side by side, B
block-diagonal, unless all parts have the same A.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch

from lorakit.adapter.value import Factors
from lorakit.formats.pipeline import Layers

Pair = tuple[torch.Tensor, torch.Tensor]

_PREFIX = "lora_unet_"
# layers within a block -> the release's layer that holds their rows, in this order
_TWO_STREAMS = {
    ("attn.to_q", "attn.to_k", "attn.to_v"): "img_attn_qkv",
    ("attn.to_out.0",): "img_attn_proj",
    ("ff.net.0.proj",): "img_mlp_0",
    ("ff.net.2",): "img_mlp_2",
    ("norm1.linear",): "img_mod_lin",
    ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"): "txt_attn_qkv",
    ("attn.to_add_out",): "txt_attn_proj",
    ("ff_context.net.0.proj",): "txt_mlp_0",
    ("ff_context.net.2",): "txt_mlp_2",
    ("norm1_context.linear",): "txt_mod_lin",
}
_ONE_STREAM = {
    ("attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp"): "linear1",
    ("proj_out",): "linear2",
    ("norm.linear",): "modulation_lin",
}
_BLOCKS = {
    "transformer_blocks": ("double_blocks", _TWO_STREAMS),
    "single_transformer_blocks": ("single_blocks", _ONE_STREAM),
}
_AROUND = {
    "x_embedder": "img_in",
    "context_embedder": "txt_in",
    "time_text_embed.timestep_embedder.linear_1": "time_in_in_layer",
    "time_text_embed.timestep_embedder.linear_2": "time_in_out_layer",
    "time_text_embed.text_embedder.linear_1": "vector_in_in_layer",
    "time_text_embed.text_embedder.linear_2": "vector_in_out_layer",
    "time_text_embed.guidance_embedder.linear_1": "guidance_in_in_layer",
    "time_text_embed.guidance_embedder.linear_2": "guidance_in_out_layer",
    "norm_out.linear": "final_layer_adaLN_modulation_1",
    "proj_out": "final_layer_linear",
}
_SWAPPED = f"{_PREFIX}final_layer_adaLN_modulation_1"  # shift above scale; diffusers has scale above shift


def names(layers: Layers) -> dict[str, tuple[str, ...]]:
    """Name in a file -> paths in the model of the layers it is of; empty where the model is no Flux."""
    paths = {name.path: path for path, name in layers.names.items() if name.component == "transformer"}
    if not any(re.fullmatch(r"single_transformer_blocks\.\d+\.proj_mlp", path) for path in paths):
        return {}
    found: dict[tuple[str, ...], str] = {(path,): f"{_PREFIX}{name}" for path, name in _AROUND.items()}
    for kind, number in dict.fromkeys(tuple(path.split(".")[:2]) for path in paths if path.split(".")[0] in _BLOCKS):
        released, inside = _BLOCKS[kind]
        for parts, name in inside.items():
            found[tuple(f"{kind}.{number}.{part}" for part in parts)] = f"{_PREFIX}{released}_{number}_{name}"
    return {name: tuple(paths[part] for part in parts) for parts, name in found.items() if {*parts} <= paths.keys()}


def split(name: str, whole: Factors, rows: Mapping[str, int]) -> dict[str, Factors]:
    """The update of each layer that `name` is of.

    Args:
        name: of the release's layer.
        whole: its update: A (r, in), B (sum of rows, r).
        rows: path -> rows of the layer's weight, in order.
    """
    B = _swapped(whole.B) if name == _SWAPPED else whole.B
    parts = {}
    for path, own in zip(rows, torch.split(B, list(rows.values())), strict=True):
        used = own.any(dim=0)
        keep = used if len(rows) > 1 and used.any() else torch.ones_like(used)
        alpha = whole.alpha * int(keep.sum()) / whole.r
        parts[path] = replace(whole, A=whole.A[keep], B=own[:, keep], alpha=alpha)
    return parts


def fuse(name: str, parts: Sequence[Pair | None], rows: Sequence[int]) -> Pair:
    """(A (r, in), B (sum of rows, r)) of the release's layer `name`, from those of its parts; None: a part not updated.

    r is the sum of their ranks, or that of one where all A are equal.
    """
    held = [part for part in parts if part is not None]
    first = held[0][0]
    shared = all(torch.equal(A, first) for A, _ in held)
    A = first if shared else torch.cat([A for A, _ in held])
    B = A.new_zeros(sum(rows), A.shape[0])
    row = column = 0
    for part, count in zip(parts, rows, strict=True):
        if part is not None:
            width = part[1].shape[1]
            B[row : row + count, column : column + width] = part[1]
            column += 0 if shared else width
        row += count
    return A, _swapped(B) if name == _SWAPPED else B


def _swapped(B: torch.Tensor) -> torch.Tensor:
    first, second = B.chunk(2)
    return torch.cat([second, first])
