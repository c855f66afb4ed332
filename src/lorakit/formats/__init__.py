"""Adapter file formats: one strict codec each, and the one place that tells them apart."""

from __future__ import annotations

from pathlib import Path

from lorakit.adapter.value import Adapter
from lorakit.errors import AdapterError, AdapterFileError, nearest
from lorakit.formats import peft

FORMATS = ("peft",)


def load_adapter(path: str | Path) -> Adapter:
    """Read an adapter of any known format; every tensor is accounted for, and the content is sound.

    Raises:
        AdapterFileError: missing, damaged, hostile, or not an adapter.
    """
    path = Path(path)
    if not path.exists():
        siblings = [p.name for p in path.parent.iterdir()] if path.parent.is_dir() else []
        guess = nearest(path.name, siblings)
        raise AdapterFileError(
            f"{path}: no such file or folder" + (f"; did you mean {path.parent / guess[0]}?" if guess else "")
        )
    adapter = peft.read(path)
    try:
        adapter.check()
    except AdapterError as error:
        raise AdapterFileError(f"{path}: {error}") from None
    return adapter


def save_adapter(adapter: Adapter, path: str | Path, *, format: str = "peft") -> Path:
    """Write an adapter as the folder `path`.

    Raises:
        AdapterFileError: unknown format, or the adapter is not sound; nothing is written.
    """
    if format not in FORMATS:
        raise AdapterFileError(f"unknown adapter format {format!r}; this version writes {', '.join(FORMATS)}")
    try:
        adapter.check(allow_zero=True)
    except AdapterError as error:
        raise AdapterFileError(f"{path}: not written: {error}") from None
    return peft.write(adapter, Path(path))
