"""What a codec is, and what it is told of the base. Every module of this package named in `lorakit.formats.CODECS` is
one: these four functions, no class.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal, Protocol, Self

from torch import nn

from lorakit.adapter.config import LoRAConfig
from lorakit.adapter.naming import ends_of, names_meaning
from lorakit.adapter.value import Adapter, BaseInfo, Factors
from lorakit.core.layer import base_modules
from lorakit.errors import AdapterFileError, FileError
from lorakit.files import parse_json
from lorakit.version import __version__


@dataclass(frozen=True, kw_only=True)
class BaseFacts:
    """What some formats need to know of the base model and an adapter does not hold.

    Attributes:
        modules: module path -> shape of its weight, of every module that has one, in the model's order. Formats that
        flatten paths (kohya) or rename layers (GGUF) build their name map from it and invert it.
        config: the base's config.json, for the number of heads and the like.
        kinds: module path -> "embedding" or "convolution", of the modules that are one; all others multiply by a
        matrix.
    """

    modules: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    config: Mapping[str, Any] = field(default_factory=dict)
    kinds: Mapping[str, str] = field(default_factory=dict)

    @classmethod
    def of(cls, model: nn.Module) -> Self:
        """The facts of a model in memory (on the meta device will do)."""
        modules, kinds = {}, {}
        for path, module in base_modules(model):
            if isinstance(weight := getattr(module, "weight", None), nn.Parameter):
                modules[path] = tuple(weight.shape)
                if isinstance(module, nn.Embedding):
                    kinds[path] = "embedding"
                elif isinstance(module, nn.modules.conv._ConvNd):
                    kinds[path] = "convolution"
        to_dict = getattr(getattr(model, "config", None), "to_dict", None)
        return cls(modules=modules, config=to_dict() if to_dict else {}, kinds=kinds)


@dataclass(frozen=True, kw_only=True)
class Context:
    """What the caller knows and a file may not say.

    Attributes:
        base: facts of the base, where a model was named.
        alpha: numerator of the scale, for formats that do not store it (loralib). Reading: what the file was trained
        with; writing: what its reader will be made with.
        enable_lora: which equal parts of a layer's output have an update, for loralib's MergedLinear.
        tensor_type: of the tensors written, where the format has a choice (GGUF).
        base_reference: what the base is called where the adapter goes: Ollama's FROM, vLLM's model.
    """

    base: BaseFacts | None = None
    alpha: float | None = None
    enable_lora: tuple[bool, ...] | None = None
    tensor_type: Literal["f32", "f16"] = "f32"
    base_reference: str | None = None


class Codec(Protocol):
    """One file format of adapters."""

    def recognises(self, path: Path) -> bool:
        """Whether the file or folder is of this format, from names and headers alone; never raises for a file it can
        open.
        """
        ...

    def read(self, path: Path, context: Context) -> Adapter:
        """Read strictly: every tensor has its place or the error lists it.

        Raises:
            AdapterFileError: damaged, or not understood in full, or the context lacks what the format leaves out.
        """
        ...

    def obstacles(self, adapter: Adapter, context: Context) -> list[str]:
        """What of this adapter the format cannot carry, a sentence each; empty where `write` will succeed. Needs no
        trained tensors: a fresh adapter (or one on the meta device) gives the same answer.
        """
        ...

    def write(self, adapter: Adapter, path: Path, context: Context) -> Path:
        """Write what has no obstacles; return what was written (a file, or a folder)."""
        ...


# ---------------------------------------------------------------- what several codecs need


def config_of(
    factors: Mapping[str, Factors],
    *,
    modules: Mapping[str, Any] | None = None,
    bias: Literal["none", "all", "lora_only"] = "none",
) -> LoRAConfig:
    """The config of an adapter whose file has none: names of the layers, the most common rank and alpha, and patterns
    for the others.

    Args:
        factors: module path -> update, whose scale is alpha / r; at least one.
        modules: paths of all modules of the base. Where every module of one name is adapted the name stands for them.
        bias: which biases are in the file.
    """
    r = Counter(f.r for f in factors.values()).most_common(1)[0][0]
    alpha = Counter(f.alpha for f in factors.values()).most_common(1)[0][0]
    # an exception is anchored where it would mean a longer path too
    ends = {end for path in factors for end in ends_of(path) if end != path}
    pattern = {path: ("^" if path in ends else "") + re.escape(path) for path in factors}
    return LoRAConfig(
        r=r,
        alpha=alpha,
        target_modules=names_meaning(factors, modules),
        rank_pattern={pattern[path]: f.r for path, f in factors.items() if f.r != r},
        alpha_pattern={pattern[path]: f.alpha for path, f in factors.items() if f.alpha != alpha},
        bias=bias,
    )


def whole_tensors(adapter: Adapter, consumer: str, *, invoked: bool = False) -> list[str]:
    """The obstacles of a format that carries low-rank updates and nothing else.

    Args:
        adapter: to be written.
        consumer: who is to read it.
        invoked: it knows activated adapters.
    """
    return [
        *(f"{path}: a trained bias, which {consumer} does not read; train with bias='none'" for path in adapter.biases),
        *(
            f"{name}: trained whole (modules_to_save), which {consumer} does not read; merge instead"
            for name in adapter.replaced
        ),
        *(f"{path}: rows of tokens trained whole, which {consumer} does not read; merge" for path in adapter.tokens),
        *more_than_low_rank(adapter, consumer, invoked=invoked),
    ]


def more_than_low_rank(adapter: Adapter, consumer: str, *, invoked: bool = False) -> list[str]:
    """The obstacles of a format whose updates are s B A and nothing else; arguments as `whole_tensors`."""
    if adapter.prompt is not None:
        return [
            f"a soft prompt, {adapter.prompt}, which {consumer} does not read; PEFT's form carries it, and "
            "adapter.without_prompt() is an adapter without it"
        ]
    if adapter.config.alora_invocation_tokens and not invoked:
        return [
            f"it is activated by tokens {list(adapter.config.alora_invocation_tokens)} (aLoRA), and {consumer} would "
            "apply it to all; PEFT's folder and GGUF hold such adapters"
        ]
    if adapter.config.delta == "dora":
        return [f"its updates are DoRA's, which {consumer} does not read; merge instead, or train with delta 'lora'"]
    return [
        f"{path}: B has a bias (lora_bias), which {consumer} does not read; train without, or merge into a base with "
        "biases"
        for path, f in adapter.factors.items()
        if f.bias is not None
    ]


def plain_layers(adapter: Adapter, consumer: str) -> list[str]:
    """The obstacles of a format that knows neither torch's MultiheadAttention nor stacked experts."""
    return [
        f"{path}: of torch's MultiheadAttention, which {consumer} does not adapt"
        if f.kind == "attention"
        else f"{path}: stacked experts, whose updates {consumer} does not read as lorakit and PEFT write them"
        for path, f in adapter.factors.items()
        if f.kind in ("attention", "experts")
    ]


def our_metadata(adapter: Adapter) -> str:
    """What lorakit knows of an adapter and no other tool asks for, as a string for a file's header."""
    base = asdict(adapter.base) if adapter.base else None
    return json.dumps({"version": __version__, "base": base, "metadata": dict(adapter.metadata)}, sort_keys=True)


def read_our_metadata(text: str | None, where: Path) -> tuple[BaseInfo | None, dict[str, str]]:
    """Undo `our_metadata`: the base and the adapter's own metadata.

    Raises:
        AdapterFileError: it is not as we wrote it.
    """
    if text is None:
        return None, {}
    try:
        ours = parse_json(text, f"{where} (lorakit metadata)")
        base = ours["base"]
        return (BaseInfo(**{**base, "samples": tuple(base["samples"])}) if base else None), dict(ours["metadata"])
    except (FileError, KeyError, TypeError) as error:
        raise AdapterFileError(f"{where}: its lorakit metadata is damaged: {error}") from None
