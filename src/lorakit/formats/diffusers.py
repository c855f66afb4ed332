"""The file of diffusers' pipelines, `pytorch_lora_weights.safetensors`.

Tensors are `<component>.<path>.lora_A.weight` (r, in, *kernel) and `.lora_B.weight` (out, r, 1, 1); a component's own
file leaves the component out. Ranks and alphas are PEFT settings in the header, under `lora_adapter_metadata`; a file
without them means scale 1. Older spellings are read too: the attention processors' (`processor.to_q_lora.down.weight`),
`.lora.down.weight`, `.lora_linear_layer.down.weight`, with an `.alpha` or none; and the numbered tensors of the
first trainer (`cloneofsimo`).

Written files have the scale carried by `lora_B`, and a header that says so: whoever loses the header is right too.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from lorakit.adapter.config import LoRAConfig
from lorakit.adapter.value import Adapter, Factors
from lorakit.core import lowrank
from lorakit.errors import AdapterFileError, FileError, bullet_list
from lorakit.files import parse_json, write_safetensors
from lorakit.formats import cloneofsimo, pipeline
from lorakit.formats.assembly import (
    adapter_of,
    factors_of,
    fitted,
    header_names,
    header_of,
    read_tensors,
    tensor_file,
)
from lorakit.formats.codec import Context
from lorakit.formats.lycoris import scale
from lorakit.formats.peft import read_config
from lorakit.formats.peft_nested import by_pattern
from lorakit.formats.pipeline import FileName, Layers

_SETTINGS = "lora_adapter_metadata"  # key in the header

# a tensor's name: the layer's path, which factor it is, and the layer as attention processors spell it
_TENSORS = tuple(
    map(
        re.compile,
        (
            r"(?P<path>.+)\.lora_(?P<matrix>[AB])\.weight",
            r"(?P<path>.+)\.(?:lora|lora_linear_layer)\.(?P<side>down|up)\.weight",
            r"(?P<path>.+?)(?:\.processor)?\.(?P<part>to_(?:q|k|v|out)_lora)\.(?P<side>down|up)\.weight",
            r"(?P<path>.+?)(?:\.processor)?\.(?P<part>to_(?:q|k|v|out)_lora)\.alpha",
            r"(?P<path>.+)\.alpha",
        ),
    )
)
_OTHERS = {
    "lora_magnitude_vector": "DoRA, whose update is not low-rank by itself",
    "dora_scale": "DoRA, whose update is not low-rank by itself",
    "lora_B.bias": "a bias in the update",
}


def recognises(path: Path) -> bool:
    """A .safetensors file, or a folder with the usual one, with low-rank factors under any spelling of diffusers'."""
    names = header_names(path)
    return not any(name.startswith("base_model.") for name in names) and (
        cloneofsimo.recognises(names) or any(_meaning(name) for name in names if name.endswith(".weight"))
    )


# ---------------------------------------------------------------- writing


def obstacles(adapter: Adapter, context: Context) -> list[str]:
    """What is no low-rank update of a pipeline's component."""
    return pipeline.obstacles(adapter, context.base)


def write(adapter: Adapter, path: Path, context: Context) -> Path:
    """Write the file `path`, or one of the usual name in the folder `path`; return the file."""
    names = pipeline.file_names(adapter, context.base)
    ranks: dict[str, dict[str, int]] = {}  # component -> path -> r
    tensors: dict[str, torch.Tensor] = {}
    for layer, f in adapter.folded().factors.items():
        name = names[layer]
        assert name is not None, "obstacles refuses a layer of no component"
        tensors |= {f"{name}.lora_A.weight": f.A, f"{name}.lora_B.weight": f.B}
        ranks.setdefault(name.component, {})[name.path] = f.r
    settings = {f"{c}.{key}": value for c, each in ranks.items() for key, value in _settings(each).items()}
    header = header_of(adapter) | {_SETTINGS: json.dumps(settings, sort_keys=True)}
    write_safetensors(tensor_file(path), tensors, header)
    return tensor_file(path)


def _settings(ranks: Mapping[str, int]) -> dict[str, Any]:
    """PEFT's settings for layers of these ranks and scale 1.

    PEFT takes the names below as ends of paths, so they hold for text encoders with and without `text_model.`.
    """
    r = max(ranks.values())
    ends = {path.removeprefix("text_model."): rank for path, rank in ranks.items()}
    exceptions = {re.escape(path): rank for path, rank in sorted(ends.items()) if rank != r}
    return {
        "peft_type": "LORA",
        "r": r,
        "lora_alpha": r,
        "rank_pattern": exceptions,
        "alpha_pattern": exceptions,
        "target_modules": sorted(ends),
        "bias": "none",
        "lora_dropout": 0.0,
        "use_rslora": False,
        "use_dora": False,
    }


# ---------------------------------------------------------------- reading


def read(path: Path, context: Context) -> Adapter:
    """Read one file. Where the model is not named, paths are the file's.

    Raises:
        AdapterFileError: damaged; a tensor that is missing, not understood, twice there, or of a wrong shape; a layer
        the model has not; a setting that is not supported. All of them at once.
    """
    file = tensor_file(path)
    tensors, metadata = read_tensors(path)
    layers = Layers(context.base) if context.base is not None else None
    if cloneofsimo.recognises(tensors):
        return cloneofsimo.read(file, tensors, metadata, layers)
    problems: list[str] = []
    parts = _by_layer(tensors, problems)
    alone = pipeline.alone(parts)
    if alone is None and layers is not None:
        alone = layers.alone
    settings = _read_settings(metadata, alone, file)
    factors: dict[str, Factors] = {}
    absent: list[str] = []
    for written in sorted(parts):
        name = pipeline.split(_current(written), alone)
        if name is None:
            problems.append(f"{written}: of no component of a pipeline ({', '.join(pipeline.COMPONENTS)})")
            continue
        layer = _current(written) if layers is None else layers.paths.get(name)
        if layer is None:
            absent.append(str(name))
            continue
        if layer in factors:
            problems.append(f"{written}: a second update of {layer}")
            continue
        try:
            shape = layers.shapes[layer] if layers is not None else None
            factors[layer] = _factors(parts[written], name, settings.get(name.component), shape)
        except AdapterFileError as error:
            problems.append(f"{written}: {error}")
    problems += pipeline.no_such_layers(absent, map(str, layers.paths) if layers is not None else ())
    if problems:
        raise AdapterFileError(f"{file}: nothing loaded:\n{bullet_list(problems)}")
    in_order = {layer: factors[layer] for layer in (layers.shapes if layers else factors) if layer in factors}
    return adapter_of(in_order, layers.shapes if layers else None, metadata, file)


def _meaning(name: str) -> tuple[str, str] | None:
    """(path as it is written, A or B or alpha) of a tensor; None for what is no part of an update."""
    match = next((match for pattern in _TENSORS if (match := pattern.fullmatch(name))), None)
    if match is None:
        return None
    found = match.groupdict()
    which = found.get("matrix") or {"down": "A", "up": "B", None: "alpha"}[found.get("side")]
    return f"{match['path']}.{found['part']}" if "part" in found else match["path"], which


def _by_layer(tensors: Mapping[str, torch.Tensor], problems: list[str]) -> dict[str, dict[str, torch.Tensor]]:
    """Path as it is written -> A, B and alpha."""
    parts: dict[str, dict[str, torch.Tensor]] = {}
    for key in sorted(tensors):
        meaning = _meaning(key)
        if meaning is None:
            other = next((what for end, what in _OTHERS.items() if end in key), "unexpected; no low-rank factor")
            problems.append(f"{key}: {other}")
            continue
        path, which = meaning
        if which in parts.setdefault(path, {}):
            problems.append(f"{key}: a second {which} of {path}")
        parts[path][which] = tensors[key]
    return parts


def _current(written: str) -> str:
    """The module path behind an attention processor's spelling."""
    path, _, last = written.rpartition(".")
    if not last.endswith("_lora"):
        return written.replace(".processor.", ".")
    part = last.removesuffix("_lora").removeprefix("to_")
    if ".self_attn" in path:  # a text encoder
        return f"{path}.{part}_proj"
    return f"{path}.to_{part}" + (".0" if part == "out" else "")


def _read_settings(metadata: Mapping[str, str], alone: str | None, file: Path) -> dict[str, LoRAConfig]:
    """Component -> settings in the header; none for components it does not speak of.

    Raises:
        AdapterFileError: not PEFT's settings, or such as are not supported.
    """
    if not metadata.get(_SETTINGS):
        return {}
    where = f"{file} ({_SETTINGS})"
    try:
        values = parse_json(metadata[_SETTINGS], where)
    except FileError as error:
        raise AdapterFileError(str(error)) from error
    if not isinstance(values, dict):
        raise AdapterFileError(f"{where}: expected an object, found {type(values).__name__}")
    by_component: dict[str, dict[str, Any]] = {}
    for key, value in values.items():
        component, _, setting = key.partition(".")
        if component in pipeline.COMPONENTS and setting:
            by_component.setdefault(component, {})[setting] = value
        elif alone is not None:
            by_component.setdefault(alone, {})[key] = value
        else:
            raise AdapterFileError(f"{where}: {key} is a setting of no component")
    configs = {component: read_config(each, f"{where}: {component}") for component, each in by_component.items()}
    doras = [f"{component}.use_dora is True" for component, config in configs.items() if config.delta == "dora"]
    if doras:
        raise AdapterFileError(f"{where}: {', '.join(doras)}: this is read from PEFT's folders only")
    return configs


def _factors(
    parts: Mapping[str, torch.Tensor], name: FileName, settings: LoRAConfig | None, shape: tuple[int, ...] | None
) -> Factors:
    missing = [f"lora_{which}" for which in "AB" if which not in parts]
    if missing:
        raise AdapterFileError(f"{' and '.join(missing)} is missing")
    A, B = fitted(parts["A"], parts["B"], shape)
    if settings is None:
        return factors_of(A, B, scale(parts.get("alpha"), A.shape[0]))
    if "alpha" in parts:
        raise AdapterFileError("has an alpha of its own and one in the header")
    spellings = (name.path, name.path.removeprefix("text_model."))
    r = _setting(settings.rank_pattern, spellings, settings.r)
    if r != A.shape[0]:
        raise AdapterFileError(f"rank {A.shape[0]} in the tensors, {r:g} in the header, so its scale is unknown")
    alpha = _setting(settings.alpha_pattern, spellings, settings.alpha)
    return factors_of(A, B, lowrank.scale(alpha, A.shape[0], settings.scaling))


def _setting(patterns: Mapping[str, float], spellings: tuple[str, ...], otherwise: float) -> float:
    missing = float("nan")
    values = (by_pattern(dict(patterns), path, missing) for path in spellings)
    return next((value for value in values if value == value), otherwise)
