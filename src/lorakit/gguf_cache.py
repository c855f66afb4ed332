"""GGUF files as transformers folders, with weights or without: made once, kept in the user's cache, found again by
their content.

Also what every load through transformers needs: quiet on the screen, and no weight left to chance. Knows paths, not how
users name models.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib
import importlib.util
import io
import logging
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from lorakit import files
from lorakit.errors import FileError, MissingDependencyError, ModelError, bullet_list
from lorakit.formats import gguf_container

_CACHE_FORMAT = 1  # part of the cache key: raise it when what a conversion writes changes

_log = logging.getLogger(__name__)


def converted_gguf(path: str | Path) -> Path:
    """A transformers folder with the weights of a GGUF file, dequantised (fp32, exact), and its tokenizer.

    Made on first use and kept under the SHA-256 of the file, so a moved or renamed file is not converted again and a
    changed one is.

    Raises:
        ModelError: transformers cannot read the file.
        MissingDependencyError: transformers needs accelerate to read GGUF files.
    """
    return _made(f"{files.sha256_file(path)}-v{_CACHE_FORMAT}", lambda folder: _convert_gguf(Path(path), folder))


def described_gguf(path: str | Path) -> Path:
    """A transformers folder with a GGUF file's config, tokenizer and settings of generation, and no weights.

    Made on first use and kept under the SHA-256 of the file's header, which is all it depends on.

    Raises:
        ModelError: no sound GGUF file, or transformers cannot read its header.
    """
    digest = hashlib.sha256(opened_gguf(path).header_bytes).hexdigest()
    return _made(f"{digest}-about-v{_CACHE_FORMAT}", lambda folder: _describe_gguf(Path(path), folder))


def opened_gguf(path: str | Path) -> gguf_container.MappedFile:
    """A GGUF file mapped into memory.

    Raises:
        ModelError: it cannot be read, or is no sound GGUF file.
    """
    try:
        return gguf_container.MappedFile(Path(path))
    except FileError as error:
        raise ModelError(str(error)) from error


def _made(name: str, make: Callable[[Path], None]) -> Path:
    """The folder of that name in the cache, made if it is not there. Safe with several processes: one makes it, the
    others wait.
    """
    import filelock

    folder = files.cache_folder() / "gguf" / name
    if _is_whole(folder):
        return folder
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        lock = filelock.FileLock(folder.with_suffix(".lock"))
        with lock:
            if not _is_whole(folder):  # another process may have made it while we waited
                make(folder)
    except OSError as error:
        if isinstance(error, FileError):
            raise
        raise FileError(
            f"{folder}: could not be written: {error.strerror or error}. "
            "Choose another place with the environment variable LORAKIT_CACHE."
        ) from error
    return folder


def _is_whole(folder: Path) -> bool:
    """Whether a conversion is complete: it came in one rename; sizes show later damage cheaply."""
    if not (folder / files.MANIFEST).is_file():
        return False
    listing = files.read_json(folder / files.MANIFEST)["files"]
    return all(
        (folder / name).is_file() and (folder / name).stat().st_size == entry["bytes"]
        for name, entry in listing.items()
    )


def _convert_gguf(path: Path, folder: Path) -> None:
    if importlib.util.find_spec("accelerate") is None:
        raise MissingDependencyError(
            "transformers needs the package accelerate to read GGUF files: pip install accelerate"
        )
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    _log.info("converting %s once; kept in %s", path, folder)
    place: dict[str, Any] = {"gguf_file": path.name, "local_files_only": True}
    try:
        # transformers draws this conversion's progress with a bare tqdm, which only stderr can silence.
        with quiet(progress_bars=False), contextlib.redirect_stderr(io.StringIO()):
            tokenizer: Any = AutoTokenizer.from_pretrained(path.parent, **place)
            auto_model: Any = AutoModelForCausalLM
            model, report = auto_model.from_pretrained(
                path.parent,
                dtype=torch.float32,
                quantization_config=GgufConfig(dequantize=True),
                output_loading_info=True,
                **place,
            )
    except Exception as error:
        raise ModelError(f"{path}: transformers cannot read this GGUF file: {error}") from error
    refuse_missing(report, str(path))
    # The weights are plain tensors now; with these marks left on, saving refuses and loading would look for blocks.
    model.hf_quantizer = None
    model.config.__dict__.pop("quantization_config", None)
    _save(path, folder, model, tokenizer)


def _describe_gguf(path: Path, folder: Path) -> None:
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    place: dict[str, Any] = {"gguf_file": path.name, "local_files_only": True}
    auto_model: Any = AutoModelForCausalLM
    try:
        with quiet(progress_bars=False), contextlib.redirect_stderr(io.StringIO()):
            tokenizer: Any = AutoTokenizer.from_pretrained(path.parent, **place)
            config: Any = AutoConfig.from_pretrained(path.parent, **place)
            with torch.device("meta"):
                model = auto_model.from_config(config, dtype=torch.float32)
    except Exception as error:
        raise ModelError(f"{path}: transformers cannot read this GGUF file: {error}") from error
    model.config.architectures = [type(model).__name__]
    _save(path, folder, model, tokenizer, weights=False)


def _save(path: Path, folder: Path, model: Any, tokenizer: Any, *, weights: bool = True) -> None:
    for key in ("is_local", "local_files_only"):
        tokenizer.init_kwargs.pop(key, None)
    about = {"source": path.name, "format": _CACHE_FORMAT}
    with files.atomic_folder(folder, manifest=about) as building, quiet(progress_bars=False):
        if weights:
            model.save_pretrained(building)
        else:
            model.config.save_pretrained(building)
            model.generation_config.save_pretrained(building)
        tokenizer.save_pretrained(building)


# ---------------------------------------------------------------- loading through transformers


def refuse_missing(report: Mapping[str, Any], where: str) -> None:
    """transformers fills weights it does not find with random numbers and only remarks on it; left-overs do no harm."""
    problems = [f"missing: {name}" for name in sorted(report["missing_keys"])]
    problems += [f"of another shape: {entry[0]}" for entry in sorted(report["mismatched_keys"])]
    problems += [str(message) for message in report["error_msgs"]]
    if problems:
        raise ModelError(f"{where}: the file does not hold all weights of the model:\n{bullet_list(problems)}")


@contextlib.contextmanager
def quiet(*, progress_bars: bool) -> Iterator[None]:
    """Keep transformers' remarks (and, unless asked for, progress bars) off the screen while we load."""
    settings: Any = importlib.import_module("transformers.utils.logging")
    verbosity, had_bars = settings.get_verbosity(), settings.is_progress_bar_enabled()
    settings.set_verbosity_error()
    if not progress_bars:
        settings.disable_progress_bar()
    try:
        yield
    finally:
        settings.set_verbosity(verbosity)
        if had_bars:
            settings.enable_progress_bar()
