"""A folder from which `ollama create NAME` makes a model: a GGUF adapter (`gguf`) and a Modelfile that names its base.

Template, stop words and parameters are the base's, so the Modelfile leaves them out: what it repeated could differ.
"""

from __future__ import annotations

from pathlib import Path

from lorakit import files
from lorakit.adapter.value import Adapter
from lorakit.errors import AdapterFileError, FileError
from lorakit.formats import gguf
from lorakit.formats.codec import Context, more_than_low_rank

FILE = "Modelfile"


def recognises(path: Path) -> bool:
    """A folder with a Modelfile, or that file, with an adapter in it."""
    modelfile = path / FILE if path.is_dir() else path
    try:
        return modelfile.name == FILE and modelfile.is_file() and bool(_adapters(modelfile))
    except FileError:
        return False


def obstacles(adapter: Adapter, context: Context) -> list[str]:
    """Those of GGUF, and a base that has no name for Ollama."""
    problems = gguf.obstacles(adapter, context) + more_than_low_rank(adapter, "Ollama")
    reference = _reference(adapter, context)
    if reference is None:
        known_as = (adapter.base.published or adapter.base.name) if adapter.base else None
        problems.append(
            f"Ollama's name for the base{f' {known_as}' if known_as else ''} is not known (FROM in the Modelfile): "
            "give it as base_reference: an Ollama model such as llama3.2, a .gguf file, or a folder of safetensors"
        )
    elif "\n" in reference or not reference.strip():
        problems.append(f"the name of the base, {reference!r}, is no line of a Modelfile")
    return problems


def write(adapter: Adapter, folder: Path, context: Context) -> Path:
    """Write both files into `folder` (created if need be), the Modelfile last; return the folder."""
    gguf.write(adapter, folder / gguf.FILE, context)
    files.write_text(folder / FILE, f"FROM {_reference(adapter, context)}\nADAPTER ./{gguf.FILE}\n")
    return folder


def read(path: Path, context: Context) -> Adapter:
    """Read the GGUF adapter that the Modelfile names.

    Raises:
        AdapterFileError: it names none, several, or one that is not there; and those of GGUF.
    """
    modelfile = path / FILE if path.is_dir() else path
    try:
        named = _adapters(modelfile)
    except FileError as error:
        raise AdapterFileError(str(error)) from error
    if len(named) != 1:
        raise AdapterFileError(f"{modelfile}: names {len(named)} adapters ({', '.join(named)}); one is read")
    target = modelfile.parent / named[0]
    if not gguf.recognises(target):
        raise AdapterFileError(f"{modelfile}: its adapter {target} is no GGUF file; read that one by itself")
    return gguf.read(target, context)


def _adapters(modelfile: Path) -> list[str]:
    """What the ADAPTER lines of a Modelfile name."""
    lines = files.read_bytes(modelfile).decode("utf-8", "replace").splitlines()
    split = [line.strip().split(None, 1) for line in lines]
    return [words[1].strip().strip('"') for words in split if len(words) == 2 and words[0].upper() == "ADAPTER"]


def _reference(adapter: Adapter, context: Context) -> str | None:
    """What to write after FROM: what the caller said, or the place of a base that is a file or folder here."""
    if context.base_reference is not None:
        return context.base_reference
    name = adapter.base.name if adapter.base else None
    return name if name and Path(name).is_absolute() else None
