"""What diffusion files call the layers of a pipeline, and which layer of the model at hand each name means.

An adapter of a pipeline has paths that begin with the component: `unet.`, `transformer.`, `text_encoder.`,
`text_encoder_2.`; its model is an `nn.ModuleDict` of the components. A component alone is a model too; its paths begin
with its own blocks, by which the component is known.

Text encoders: files always say `text_model.`, as transformers did when the formats arose. Where the model's own paths
lack it (transformers 5 flattened `CLIPTextModel`), it is added in files and taken off again.
"""

from __future__ import annotations

import bisect
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from lorakit.adapter.value import Adapter
from lorakit.errors import nearest
from lorakit.formats.codec import BaseFacts, whole_tensors

COMPONENTS = ("unet", "transformer", "text_encoder", "text_encoder_2", "text_encoder_3")

# paths by which a component that stands alone is known
_ALONE = {
    "unet": re.compile(r"(down_blocks|mid_block|up_blocks)\..+"),
    "transformer": re.compile(r"(transformer_blocks|single_transformer_blocks)\..+"),
    "text_encoder": re.compile(r"(text_model\.)?encoder\.layers\.\d+\.(self_attn|mlp)\..+"),
}
# what language models call `transformer`, which is no component of a pipeline
_LANGUAGE_MODEL = re.compile(r"transformer\.((h|layer)\.\d+\..+|w[tp]e)")
_FLATTENED = re.compile(r"(embeddings|encoder\.layers|final_layer_norm)(\..+)?")


@dataclass(frozen=True)
class FileName:
    """What files call a layer: the component and the path within it, `text_model.` included."""

    component: str
    path: str

    def __str__(self) -> str:
        return f"{self.component}.{self.path}"


def split(name: str, alone: str | None) -> FileName | None:
    """The component of a module path, and the rest of it as files have it.

    Args:
        name: path in a model, or in a file.
        alone: the component all paths belong to, where they do not begin with one.

    Returns:
        None where the path belongs to no component.
    """
    if _LANGUAGE_MODEL.fullmatch(name):
        return None
    first, _, rest = name.partition(".")
    component = first if first in COMPONENTS and rest else alone
    if component is None:
        return None
    path = rest if component == first else name
    if component.startswith("text_encoder") and _FLATTENED.fullmatch(path):
        path = f"text_model.{path}"
    return FileName(component, path)


def alone(paths: Iterable[str]) -> str | None:
    """The component that a model or a file with these paths is by itself; None: it is a pipeline, or no such thing."""
    paths = list(paths)
    if any(split(path, None) for path in paths):
        return None
    return next((name for name, known in _ALONE.items() if any(map(known.fullmatch, paths))), None)


class Layers:
    """Every layer of a model by what files call it."""

    def __init__(self, base: BaseFacts) -> None:
        self.shapes = base.modules
        self.alone = alone(base.modules)
        self.names = {path: name for path in base.modules if (name := split(path, self.alone))}
        self.paths: Mapping[FileName, str] = {name: path for path, name in self.names.items()}

    @property
    def components(self) -> set[str]:
        """Which there are."""
        return {name.component for name in self.names.values()}


def no_such_layers(names: Sequence[str], known: Iterable[str]) -> list[str]:
    """A sentence on each layer of a file that the model has not, with the nearest for the first few.

    The nearest are looked for among the neighbours in the alphabet: comparing with all names of a big model takes
    seconds.
    """
    ordered, sentences = sorted(known), []
    for count, name in enumerate(names):
        place = bisect.bisect(ordered, name)
        guess = nearest(name, ordered[max(place - 20, 0) : place + 20], count=1) if count < 5 else ()
        sentences.append(f"{name}: no such layer in the model" + (f"; nearest: {guess[0]}" if guess else ""))
    return sentences


def file_names(adapter: Adapter, base: BaseFacts | None) -> dict[str, FileName | None]:
    """What files call each layer of an adapter; None where it belongs to no component of a pipeline."""
    own = alone(base.modules if base is not None else adapter.factors)
    return {path: split(path, own) for path in adapter.factors}


def obstacles(adapter: Adapter, base: BaseFacts | None) -> list[str]:
    """What of an adapter neither kohya's nor diffusers' files can carry, a sentence each."""
    problems = []
    if str(adapter.config.delta) != "lora":
        problems.append(f"delta {adapter.config.delta!r}: only plain low-rank updates")
    names = file_names(adapter, base)
    strange = sorted(path for path, name in names.items() if name is None)
    if strange and len(strange) == len(names):
        others = " and others" if len(strange) > 1 else ""
        problems.append(
            f"{strange[0]}{others}: of no component of a diffusion pipeline; paths begin with one "
            f"({', '.join(COMPONENTS)}), or the model is one: name it, if it is"
        )
    else:
        problems += [f"{path}: of no component of a diffusion pipeline" for path in strange]
    for path, f in adapter.factors.items():
        if f.kind in ("attention", "experts"):
            problems.append(f"{path}: the update of {'a MultiheadAttention' if f.kind == 'attention' else 'experts'}")
        elif f.kind == "embedding":
            problems.append(f"{path}: the update of an embedding")
        elif f.B.ndim > 1 and f.B.shape[1] != f.r:
            problems.append(f"{path}: the update of a grouped convolution")
    return problems + whole_tensors(adapter, "a tool for diffusion models")
