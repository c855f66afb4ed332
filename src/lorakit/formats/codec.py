"""What a codec is, and what it is told of the base. Every module of this package named in `lorakit.formats.CODECS` is
one: these four functions, no class.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol, Self

from torch import nn

from lorakit.adapter.value import Adapter
from lorakit.core.layer import base_modules


@dataclass(frozen=True, kw_only=True)
class BaseFacts:
    """What some formats need to know of the base model and an adapter does not hold.

    Attributes:
        modules: module path -> shape of its weight, of every module that has one, in the model's order. Formats that
        flatten paths (kohya) or rename layers (GGUF) build their name map from it and invert it.
        config: the base's config.json, for the number of heads and the like.
    """

    modules: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    config: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def of(cls, model: nn.Module) -> Self:
        """The facts of a model in memory (on the meta device will do)."""
        modules = {
            path: tuple(weight.shape)
            for path, module in base_modules(model)
            if isinstance(weight := getattr(module, "weight", None), nn.Parameter)
        }
        to_dict = getattr(getattr(model, "config", None), "to_dict", None)
        return cls(modules=modules, config=to_dict() if to_dict else {})


@dataclass(frozen=True, kw_only=True)
class Context:
    """What the caller knows and a file may not say.

    Attributes:
        base: facts of the base, where a model was named.
        alpha: numerator of the scale, for formats that do not store it (loralib).
    """

    base: BaseFacts | None = None
    alpha: float | None = None


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
