"""Files of the first LoRA trainer for diffusion models (cloneofsimo/lora), which the diffusers codec reads.

Their tensors have numbers for names: `unet:7:down` (r, in) and `unet:7:up` (out, r) belong to the eighth linear layer
below the classes that the header lists for `unet`, counted in the order of the model's modules. The scale is 1. Which
layer that is follows from the model; since blocks of the time stood in another order than today's, the order is the one
in which every tensor fits.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path

import torch

from lorakit.adapter.value import Adapter, Factors
from lorakit.errors import AdapterFileError, FileError, bullet_list
from lorakit.files import parse_json
from lorakit.formats.assembly import adapter_of, factors_of, fitted
from lorakit.formats.pipeline import Layers

_NAME = re.compile(r"(?P<component>unet|text_encoder):(?P<number>\d{1,6}):(?P<side>up|down)")
# class in the header -> where its layers are in today's models
_BELOW = {
    "CrossAttention": r"attn\d",
    "Attention": r"attn\d",
    "GEGLU": r"ff\.net\.0",
    "CLIPAttention": r"self_attn",
}
_THEN = re.compile(r"(?P<block>.*\.transformer_blocks\.\d+)\.(?P<part>attn1|ff|attn2)\..*")


def recognises(names: Iterable[str]) -> bool:
    """Whether tensors are numbered so."""
    return any(map(_NAME.fullmatch, names))


def read(
    file: Path, tensors: Mapping[str, torch.Tensor], metadata: Mapping[str, str], layers: Layers | None
) -> Adapter:
    """The adapter in such a file.

    Raises:
        AdapterFileError: no model to count the layers of; a class that is not known; a tensor without partner, of no
        layer, or not understood.
    """
    if layers is None:
        raise AdapterFileError(
            f"{file}: its tensors are numbered by the layers of the model: name it (model=..., or --model M)"
        )
    problems = [f"{name}: {_what(name, metadata)}" for name in sorted(tensors) if not _NAME.fullmatch(name)]
    factors: dict[str, Factors] = {}
    for component in ("unet", "text_encoder"):
        pairs: dict[int, dict[str, torch.Tensor]] = {}
        for name, tensor in tensors.items():
            match = _NAME.fullmatch(name)
            if match and match["component"] == component:
                pairs.setdefault(int(match["number"]), {})[match["side"]] = tensor
        problems += [
            f"{component}:{number}:{side} is missing"
            for number, pair in sorted(pairs.items())
            for side in ("up", "down")
            if side not in pair
        ]
        if sorted(pairs) != list(range(len(pairs))):
            problems.append(f"{component}: its {len(pairs)} layers are not numbered from 0 to {len(pairs) - 1}")
        if pairs and not problems:
            try:
                factors |= _placed(component, pairs, _classes(component, metadata), layers)
            except AdapterFileError as error:
                problems.append(str(error))
    if problems:
        raise AdapterFileError(f"{file}: nothing loaded:\n{bullet_list(problems)}")
    return adapter_of({path: factors[path] for path in layers.shapes if path in factors}, layers.shapes, {}, file)


def _what(name: str, metadata: Mapping[str, str]) -> str:
    return "a word's embedding, no low-rank update" if metadata.get(name) == "<embed>" else "unexpected"


def _classes(component: str, metadata: Mapping[str, str]) -> list[str]:
    try:
        classes = parse_json(metadata.get(component, "null"), f"{component} in the header")
    except FileError as error:
        raise AdapterFileError(str(error)) from error
    if not isinstance(classes, list) or not classes:
        raise AdapterFileError(f"{component}: the header does not list the classes whose layers are numbered")
    unknown = [str(each) for each in classes if each not in _BELOW]
    if unknown:
        raise AdapterFileError(f"{component}: layers of {', '.join(unknown)}; known are those of {', '.join(_BELOW)}")
    return classes


def _placed(
    component: str, pairs: Mapping[int, Mapping[str, torch.Tensor]], classes: Collection[str], layers: Layers
) -> dict[str, Factors]:
    """Path -> factors, in the order of layers in which all fit."""
    below = re.compile("|".join(rf".*\.{_BELOW[name]}\..+" for name in classes))
    paths = [
        path
        for path, name in layers.names.items()
        if name.component == component and len(layers.shapes[path]) == 2 and below.fullmatch(path)
    ]
    if len(paths) != len(pairs):
        raise AdapterFileError(f"{component}: {len(pairs)} pairs of factors for the model's {len(paths)} such layers")
    first_error = None
    for order in (paths, _as_of_old(paths)):
        try:
            return {
                path: factors_of(*fitted(pairs[number]["down"], pairs[number]["up"], layers.shapes[path]), 1.0)
                for number, path in enumerate(order)
            }
        except AdapterFileError as error:
            first_error = first_error or error
    raise AdapterFileError(f"{component}: {first_error}")


def _as_of_old(paths: list[str]) -> list[str]:
    """Blocks of transformers in the order they had: the feed-forward layer between the two attentions."""
    parts = ("attn1", "ff", "attn2")
    blocks = {path: (match["block"], parts.index(match["part"])) for path in paths if (match := _THEN.fullmatch(path))}
    places: dict[str, int] = {}
    for path in paths:
        places.setdefault(blocks[path][0] if path in blocks else path, len(places))
    return sorted(
        paths, key=lambda path: (places[blocks[path][0]], blocks[path][1]) if path in blocks else (places[path], 0)
    )
