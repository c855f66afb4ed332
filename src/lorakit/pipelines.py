"""Diffusion pipelines without weights: every component an adapter can change, on the meta device, from its config.

A pipeline is a folder with `model_index.json`, or a Hub id; a component alone is a folder whose config.json names a
class of diffusers. Needs diffusers (`pip install "lorakit[diffusion]"`), which is imported here and nowhere else. Knows
no adapters.
"""

from __future__ import annotations

import contextlib
import importlib
from pathlib import Path
from typing import Any

import torch
from torch import nn

from lorakit.errors import FileError, MissingDependencyError, ModelError
from lorakit.files import read_json
from lorakit.formats.pipeline import COMPONENTS
from lorakit.gguf_cache import quiet

_INDEX = "model_index.json"
_CONFIGS = [_INDEX, "config.json", *(f"{component}/config.json" for component in COMPONENTS)]


def folder_of(spec: str) -> Path | None:
    """The folder of a pipeline or of a component of one; None if `spec` names another kind of model, or none.

    For a Hub id that is not in the local cache the configs are downloaded, unless HF_HUB_OFFLINE is set.
    """
    path = Path(spec).expanduser()
    if path.exists():
        return path if path.is_dir() and _is_pipeline(path) else None
    if path.suffix or spec.count("/") != 1 or spec.startswith((".", "/", "~")):
        return None
    from huggingface_hub import snapshot_download, try_to_load_from_cache
    from huggingface_hub.constants import is_offline_mode

    def cached(name: str) -> str | None:
        found = try_to_load_from_cache(spec, name)
        return found if isinstance(found, str) else None

    if not cached("config.json") and not cached(_INDEX) and not is_offline_mode():
        with contextlib.suppress(Exception):  # no such id, no network: whoever loads the model will say so
            snapshot_download(spec, allow_patterns=_CONFIGS)
    found = cached(_INDEX) or cached("config.json")
    return Path(found).parent if found and _is_pipeline(Path(found).parent) else None


def _is_pipeline(folder: Path) -> bool:
    return (folder / _INDEX).is_file() or "_class_name" in _config(folder)


def _config(folder: Path) -> dict[str, Any]:
    try:
        values = read_json(folder / "config.json") if (folder / "config.json").is_file() else {}
    except FileError:  # whoever loads the model will say so
        return {}
    return values if isinstance(values, dict) else {}


def load_skeleton(folder: Path) -> nn.Module:
    """An `nn.ModuleDict` of a pipeline's components, or the component that the folder is.

    Raises:
        ModelError: a component is missing, or of a class that is not known.
        MissingDependencyError: diffusers is not installed.
        FileError: a file cannot be read.
    """
    if not (folder / _INDEX).is_file():
        return _component(folder, "diffusers", str(_config(folder)["_class_name"]))
    index = read_json(folder / _INDEX)
    entries = {name: index[name] for name in COMPONENTS if isinstance(index, dict) and name in index}
    parts = {}
    for name, entry in entries.items():
        if not isinstance(entry, list) or len(entry) != 2:
            raise ModelError(f"{folder / _INDEX}: {name} is {entry!r}, not a library and a class")
        if entry[1] is not None:  # as a pipeline says that it goes without
            parts[name] = _component(folder / name, *map(str, entry))
    if not parts:
        raise ModelError(f"{folder}: a pipeline without any of {', '.join(COMPONENTS)}")
    return nn.ModuleDict(parts).eval()


def _component(folder: Path, library: str, name: str) -> nn.Module:
    if library not in ("diffusers", "transformers"):
        raise ModelError(f"{folder}: {name} is a class of {library}; known are those of diffusers and transformers")
    try:
        made_by = importlib.import_module(library)
    except ImportError as error:
        raise MissingDependencyError(
            f'{folder}: models of diffusion need diffusers: pip install "lorakit[diffusion]"'
        ) from error
    cls = getattr(made_by, name, None)
    if not isinstance(cls, type) or not issubclass(cls, nn.Module):
        raise ModelError(f"{folder}: the installed {library} has no model {name!r}; a newer one may have it")
    maker: Any = cls
    try:
        with torch.device("meta"), quiet(progress_bars=False):
            if library == "diffusers":
                model = maker.from_config(maker.load_config(folder, local_files_only=True))
            else:
                model = maker(maker.config_class.from_pretrained(folder, local_files_only=True))
    except Exception as error:  # readers of other people's files raise anything
        raise ModelError(f"{folder}: {name} could not be made: {str(error).splitlines()[0]}") from error
    return model.eval()  # type: ignore[no-any-return]
