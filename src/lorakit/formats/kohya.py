"""The single file of kohya's trainers, which most tools for diffusion models read.

Tensors are `<layer>.lora_down.weight` (r, in, *kernel), `<layer>.lora_up.weight` (out, r, 1, 1) and `<layer>.alpha`,
the scale being alpha / r. A layer is `lora_unet_`, `lora_te_` (the only text encoder), `lora_te1_` or `lora_te2_`, and
the module path with every dot written as `_`: which dots those were, only the model knows, so reading needs it.
Trainers of SDXL name the UNet's layers as its first release did (`input_blocks_4_1_...`); those names are read too,
and so are the tensors of LyCORIS (LoCon, LoHa, LoKr), which become plain factors. Flux's layers are named as in its
first release (`kohya_flux`).

Written files have the scale carried by `lora_up`, and alpha = r, so that whoever loses alpha has the right update.
Where ranks differ, alpha is the largest of them in every layer: diffusers keeps one alpha for all layers of attention.
(Not of Flux, where it takes each layer's own, or, of the last ones, none at all.)
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import torch

from lorakit.adapter.value import Adapter, Factors
from lorakit.errors import AdapterFileError, bullet_list
from lorakit.files import write_safetensors
from lorakit.formats import kohya_flux, pipeline
from lorakit.formats.assembly import adapter_of, header_names, header_of, read_tensors, tensor_file
from lorakit.formats.codec import BaseFacts, Context
from lorakit.formats.lycoris import expand
from lorakit.formats.pipeline import FileName, Layers

_PREFIXES = {
    "unet": ("lora_unet_",),
    "text_encoder": ("lora_te_", "lora_te1_"),  # the second where there are several
    "text_encoder_2": ("lora_te2_",),
    "text_encoder_3": ("lora_te3_",),
}
_TRANSFORMER = "lora_transformer_"  # before a transformer's own path, of trainers that have diffusers' layers
_LYCORIS = "lycoris_"  # before the whole path, of LyCORIS' own wrapper for any model


def recognises(path: Path) -> bool:
    """A .safetensors file with a layer of one of kohya's prefixes."""
    prefixes = (*(prefix for each in _PREFIXES.values() for prefix in each), _TRANSFORMER, _LYCORIS)
    return any(name.startswith(prefixes) for name in header_names(path))


# ---------------------------------------------------------------- writing


def obstacles(adapter: Adapter, context: Context) -> list[str]:
    """What is no low-rank update of a UNet, Flux or a text encoder."""
    problems = pipeline.obstacles(adapter, context.base)
    taken: dict[str, str] = {}
    of_flux = {path for paths in _of_flux(context.base).values() for path in paths}
    way_out = "name the model, if it is Flux, or use diffusers" if context.base is None else "use diffusers"
    for path, name in _written_names(adapter, context.base).items():
        if path in of_flux:
            continue
        if name is None:
            problems.append(f"{path}: kohya's tools know a transformer by other layers than diffusers' ({way_out})")
        elif name in taken:
            problems.append(f"{path} and {taken[name]} are both written {name}")
        else:
            taken[name] = path
    if context.base is not None:
        others = {name: path for name, path in _every_name(Layers(context.base)) if path not in adapter.factors}
        problems += [f"{taken[n]} and {others[n]} are both written {n}" for n in taken.keys() & others.keys()]
    return problems


def write(adapter: Adapter, path: Path, context: Context) -> Path:
    """Write the file `path`, or one of the usual name in the folder `path`; return the file."""
    modules = {} if context.base is None else context.base.modules
    tensors: dict[str, torch.Tensor] = {}

    def put(name: str, A: torch.Tensor, B: torch.Tensor, alpha: int) -> None:
        tensors[f"{name}.lora_down.weight"] = A
        tensors[f"{name}.lora_up.weight"] = B
        tensors[f"{name}.alpha"] = torch.tensor(float(alpha))

    left = dict(adapter.factors)
    for name, paths in _of_flux(context.base).items():
        own = [left.pop(layer, None) for layer in paths]
        if any(own):
            pairs = [
                None if f is None else (f.A.float(), f.B.float() * adapter.scale(layer))
                for layer, f in zip(paths, own, strict=True)
            ]
            A, B = kohya_flux.fuse(name, pairs, [modules[layer][0] for layer in paths])
            put(name, A, B, alpha=A.shape[0])
    alpha = max((f.r for f in left.values()), default=0)
    for layer, flat in _written_names(adapter, context.base).items():
        if flat is not None and (f := left.get(layer)) is not None:
            put(flat, f.A.float(), f.B.float() * (adapter.scale(layer) * f.r / alpha), alpha)
    write_safetensors(tensor_file(path), tensors, header_of(adapter))
    return tensor_file(path)


def _of_flux(base: BaseFacts | None) -> dict[str, tuple[str, ...]]:
    return {} if base is None else kohya_flux.names(Layers(base))


def _written_names(adapter: Adapter, base: BaseFacts | None) -> dict[str, str | None]:
    """What each layer is called; None for those that kohya's names do not reach. Layers of no component are left out,
    which are an obstacle already.
    """
    names = {path: name for path, name in pipeline.file_names(adapter, base).items() if name is not None}
    components = {name.component for name in names.values()} | (Layers(base).components if base else set())
    return {path: _flat(name, several="text_encoder_2" in components) for path, name in names.items()}


def _flat(name: FileName, *, several: bool) -> str | None:
    prefixes = _PREFIXES.get(name.component)
    # diffusers misreads its own names of SDXL's embedding of sizes, and knows those of the first release
    path = _RELEASED_SIZES.get(name.path, name.path) if name.component == "unet" else name.path
    return prefixes[-1 if several else 0] + _underscored(path) if prefixes else None


def _underscored(path: str) -> str:
    return path.replace(".", "_")


# ---------------------------------------------------------------- reading


def read(path: Path, context: Context) -> Adapter:
    """Read one file.

    Raises:
        AdapterFileError: damaged, or no model to tell what its names mean; a layer the model has not, a tensor that is
        missing, not understood or of a wrong shape. All of them at once.
    """
    file = tensor_file(path)
    tensors, metadata = read_tensors(path)
    if context.base is None:
        raise AdapterFileError(
            f"{file}: the names in it have lost the dots of the module paths, which only the model can tell: "
            "name it (model=..., or --model M)"
        )
    layers = Layers(context.base)
    of_flux = kohya_flux.names(layers)
    meanings = {name: {paths} for name, paths in of_flux.items()}
    for name, meant in _every_name(layers):
        meanings.setdefault(name, set()).add((meant,))
    by_name: dict[str, dict[str, torch.Tensor]] = {}
    for key, tensor in tensors.items():
        name, _, part = key.partition(".")
        by_name.setdefault(name, {})[part] = tensor
    problems: list[str] = []
    factors: dict[str, Factors] = {}
    problems += pipeline.no_such_layers([name for name in sorted(by_name) if name not in meanings], meanings)
    for name in sorted(by_name.keys() & meanings.keys()):
        if len(meanings[name]) > 1:
            problems.append(f"{name}: could mean {' or '.join(sorted(', '.join(paths) for paths in meanings[name]))}")
            continue
        (paths,) = meanings[name]
        if again := [layer for layer in paths if layer in factors]:
            problems.append(f"{name}: a second update of {', '.join(again)}")
            continue
        rows = {layer: layers.shapes[layer][0] for layer in paths}
        try:
            whole = expand(by_name[name], (sum(rows.values()), *layers.shapes[paths[0]][1:]))
        except AdapterFileError as error:
            problems.append(f"{name}: {error}")
            continue
        factors |= kohya_flux.split(name, whole, rows) if name in of_flux else {paths[0]: whole}
    if problems:
        raise AdapterFileError(f"{file}: nothing loaded:\n{bullet_list(problems)}")
    in_order = {layer: factors[layer] for layer in layers.shapes if layer in factors}
    return adapter_of(in_order, layers.shapes, metadata, file)


def _every_name(layers: Layers) -> Iterator[tuple[str, str]]:
    """Every name that means a layer of the model, with the layer's path. One name may come with two paths."""
    for path, name in layers.names.items():
        for prefix in _PREFIXES.get(name.component, ()):
            yield prefix + _underscored(name.path), path
        if name.component == "transformer":
            yield _TRANSFORMER + _underscored(name.path), path
        yield _LYCORIS + _underscored(path), path
    if not layers.names:  # any other model
        for path in layers.shapes:
            yield _LYCORIS + _underscored(path), path
    for released, path in _first_released(layers):
        yield "lora_unet_" + _underscored(released), path


# A residual block's layers, and those around the blocks, in the first release and in diffusers.
_RESNET = {
    "in_layers.2": "conv1",
    "emb_layers.1": "time_emb_proj",
    "out_layers.3": "conv2",
    "skip_connection": "conv_shortcut",
}
_AROUND = {
    "input_blocks.0.0": "conv_in",
    "out.2": "conv_out",
    "time_embed.0": "time_embedding.linear_1",
    "time_embed.2": "time_embedding.linear_2",
    "label_emb.0.0": "add_embedding.linear_1",
    "label_emb.0.2": "add_embedding.linear_2",
}
_RELEASED_SIZES = {ours: theirs for theirs, ours in _AROUND.items() if ours.startswith("add_embedding.")}


def _first_released(layers: Layers) -> Iterator[tuple[str, str]]:
    """(name in the first release of SD and SDXL, path in the model) of every layer of the UNet.

    The release numbers the blocks through: conv_in, then per level each residual block with its attention, then the
    layer that halves the size; the way up likewise, where what doubles the size stands in the last block of its level.
    """
    paths = {name.path: path for name, path in layers.paths.items() if name.component == "unet"}
    blocks = {".".join(path.split(".")[:4]) for path in paths}  # "down_blocks.0.resnets.1"

    def inside(released: str, block: str) -> Iterator[tuple[str, str]]:
        ours = {path.removeprefix(f"{block}."): path for path in paths if path.startswith(f"{block}.")}
        inner = _RESNET if "resnets" in block else {path: path for path in ours}
        yield from ((f"{released}.{theirs}", paths[ours[own]]) for theirs, own in inner.items() if own in ours)

    def levels(way: str) -> Iterator[tuple[int, list[int]]]:
        numbers = [tuple(map(int, block.split(".")[1::2])) for block in blocks if block.startswith(f"{way}.")]
        numbers = [pair for pair in numbers if len(pair) == 2]
        for level in sorted({pair[0] for pair in numbers}):
            count = 1 + max((j for i, j in numbers if i == level), default=-1)
            yield level, list(range(count))

    yield from ((theirs, paths[own]) for theirs, own in _AROUND.items() if own in paths)
    number = 1
    for level, resnets in levels("down_blocks"):
        for j in resnets:
            yield from inside(f"input_blocks.{number}.0", f"down_blocks.{level}.resnets.{j}")
            yield from inside(f"input_blocks.{number}.1", f"down_blocks.{level}.attentions.{j}")
            number += 1
        halving = f"down_blocks.{level}.downsamplers.0.conv"
        if halving in paths:
            yield f"input_blocks.{number}.0.op", paths[halving]
            number += 1
    for part, block in enumerate(("resnets.0", "attentions.0", "resnets.1")):
        yield from inside(f"middle_block.{part}", f"mid_block.{block}")
    number = 0
    for level, resnets in levels("up_blocks"):
        for j in resnets:
            yield from inside(f"output_blocks.{number}.0", f"up_blocks.{level}.resnets.{j}")
            yield from inside(f"output_blocks.{number}.1", f"up_blocks.{level}.attentions.{j}")
            number += 1
        doubling = f"up_blocks.{level}.upsamplers.0.conv"
        if doubling in paths:
            place = 2 if any(block == f"up_blocks.{level}.attentions.{resnets[-1]}" for block in blocks) else 1
            yield f"output_blocks.{number - 1}.{place}.conv", paths[doubling]
