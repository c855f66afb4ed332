"""Adapter file formats: one strict codec each, and the one place that tells them apart."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import cast

from lorakit.adapter.value import Adapter
from lorakit.errors import AdapterError, AdapterFileError, bullet_list, nearest
from lorakit.formats.codec import BaseFacts, Codec, Context

__all__ = [
    "CODECS",
    "BaseFacts",
    "Codec",
    "Context",
    "codec",
    "load_adapter",
    "locate",
    "obstacles",
    "recognise",
    "save_adapter",
]

# name -> module, in the order in which a file is offered to them: the most telling first
CODECS = {
    "peft": "lorakit.formats.peft",
    "ollama": "lorakit.formats.ollama",
    "gguf": "lorakit.formats.gguf",
    "vllm": "lorakit.formats.vllm",
    "loralib": "lorakit.formats.loralib",
    "kohya": "lorakit.formats.kohya",
    "diffusers": "lorakit.formats.diffusers",
}


def codec(name: str) -> Codec:
    """The codec called `name`.

    Raises:
        AdapterFileError: there is none, with the nearest names.
    """
    if name not in CODECS:
        guess = nearest(name, CODECS)
        hint = f"did you mean {guess[0]!r}?" if guess else f"there are {', '.join(CODECS)}"
        raise AdapterFileError(f"unknown adapter format {name!r}; {hint}")
    return cast("Codec", importlib.import_module(CODECS[name]))


def recognise(path: str | Path) -> str:
    """The name of the format of a file or folder. Errors as in `locate`."""
    return locate(path)[1]


def locate(path: str | Path) -> tuple[Path, str]:
    """Where the adapter is, and the name of its format: the path itself, or the one file in a folder that is one.

    Raises:
        AdapterFileError: missing, of no format lorakit reads, or a folder of several.
    """
    path = Path(path)
    if not path.exists():
        siblings = [p.name for p in path.parent.iterdir()] if path.parent.is_dir() else []
        guess = nearest(path.name, siblings)
        raise AdapterFileError(
            f"{path}: no such file or folder" + (f"; did you mean {path.parent / guess[0]}?" if guess else "")
        )
    name = _format_of(path)
    if name is not None:
        return path, name
    if path.is_dir():
        inside = {
            file: name
            for file in sorted(path.iterdir())
            if file.is_file() and file.stem != "adapter_model" and (name := _format_of(file))  # PEFT's, but half of it
        }
        if len(inside) > 1:
            raise AdapterFileError(
                f"{path}: holds several adapters; name one of {', '.join(file.name for file in inside)}"
            )
        return next(iter(inside.items()), (path, "peft"))  # whose reader says what is missing in the folder
    raise AdapterFileError(f"{path}: not an adapter in any format lorakit reads ({', '.join(CODECS)})")


def _format_of(path: Path) -> str | None:
    return next((name for name in CODECS if codec(name).recognises(path)), None)


def load_adapter(path: str | Path, *, format: str | None = None, context: Context | None = None) -> Adapter:
    """Read an adapter; every tensor is accounted for, and the content is sound.

    Args:
        path: file or folder.
        format: a name in `CODECS`; None: recognised from names and headers.
        context: what the file may not say.

    Raises:
        AdapterFileError: missing, damaged, hostile, or not an adapter.
    """
    path, format = (Path(path), format) if format else locate(path)
    adapter = codec(format).read(path, context or Context())
    try:
        adapter.check()
    except AdapterError as error:
        raise AdapterFileError(f"{path}: {error}") from None
    return adapter


def obstacles(adapter: Adapter, format: str, context: Context | None = None) -> list[str]:
    """What of `adapter` the format cannot carry; empty where it can be saved.

    Raises:
        AdapterFileError: unknown format.
    """
    context = context or Context()
    return _misfits(adapter, context) + codec(format).obstacles(adapter, context)


def _misfits(adapter: Adapter, context: Context) -> list[str]:
    """Layers that have another size in the base that was named: the adapter is not for it."""
    modules = context.base.modules if context.base is not None else {}
    problems = []
    for path, f in adapter.factors.items():
        if path in modules and f.kind in ("matrix", "embedding"):
            sizes = {f.A.shape[1], f.B.shape[0]}
            if sizes != set(modules[path]):
                problems.append(
                    f"{path}: an update of {f.B.shape[0]} x {f.A.shape[1]}, and the base has {modules[path]} there"
                )
    return problems


def save_adapter(adapter: Adapter, path: str | Path, *, format: str = "peft", context: Context | None = None) -> Path:
    """Write an adapter and return what was written: a folder or a file, as the format has it.

    Raises:
        AdapterFileError: unknown format, the adapter is not sound, or the format cannot carry it; nothing is written.
    """
    writer, context = codec(format), context or Context()
    try:
        adapter.check(allow_zero=True)
    except AdapterError as error:
        raise AdapterFileError(f"{path}: not written: {error}") from None
    problems = _misfits(adapter, context) + writer.obstacles(adapter, context)
    if problems:
        raise AdapterFileError(f"{path}: not written; the format {format} cannot carry this:\n{bullet_list(problems)}")
    return writer.write(adapter, Path(path), context)
