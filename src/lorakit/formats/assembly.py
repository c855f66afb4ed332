"""What the codecs of diffusion files share: finding the file, making a layer's factors fit its weight, and the adapter
of what was found. Knows no names of tensors.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from lorakit.adapter.value import Adapter, Factors
from lorakit.errors import AdapterFileError, FileError
from lorakit.files import read_safetensors, read_safetensors_header
from lorakit.formats.codec import config_of, our_metadata, read_our_metadata

# entries of a header: ours; and such as no longer hold once the tensors are written anew
_OURS = "lorakit"
_STALE = re.compile(rf"format|{_OURS}|lora_adapter_metadata|(ss_network_|sshs_).*")

WEIGHTS_NAME = "pytorch_lora_weights.safetensors"  # what pipelines look for in a folder


def tensor_file(path: Path) -> Path:
    """The file that `path` means: itself, or the one of the usual name in a folder (or, to be written, in a name
    without the ending).
    """
    return path if path.suffix == ".safetensors" and not path.is_dir() else path / WEIGHTS_NAME


def header_names(path: Path) -> tuple[str, ...]:
    """Names of the tensors in the file that `path` means; none where there is no such file, or no sound one."""
    file = tensor_file(path)
    try:
        return tuple(read_safetensors_header(file)[0]) if file.is_file() else ()
    except FileError:
        return ()


def read_tensors(path: Path) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """All tensors and the metadata of the file that `path` means.

    Raises:
        AdapterFileError: missing or damaged.
    """
    try:
        return read_safetensors(tensor_file(path))
    except FileError as error:
        raise AdapterFileError(str(error)) from error


def fitted(A: torch.Tensor, B: torch.Tensor, shape: tuple[int, ...] | None) -> tuple[torch.Tensor, torch.Tensor]:
    """The factors in the dimensions of a weight of `shape`; as they are where it is not known.

    A linear layer and a convolution of one pixel are the same product, and files hold either's factors for either.

    Raises:
        AdapterFileError: they are of another shape.
    """
    if A.ndim < 2 or B.ndim < 2 or A.shape[0] < 1 or B.shape[1] != A.shape[0] or any(n != 1 for n in B.shape[2:]):
        raise AdapterFileError(f"its two factors {tuple(A.shape)} and {tuple(B.shape)} do not belong together")
    if shape is None:
        return A, B.reshape(*B.shape[:2], *(1 for _ in A.shape[2:]))
    r, kernel = A.shape[0], shape[2:]
    pixels = (1 for _ in kernel)
    same_kernel = A.shape[2:] == kernel or {*A.shape[2:], *kernel} <= {1}
    if not same_kernel or A.shape[1] != shape[1] or B.shape[0] != shape[0]:
        raise AdapterFileError(
            f"its factors {tuple(A.shape)} and {tuple(B.shape)} do not fit the model's weight {tuple(shape)}"
        )
    return A.reshape(r, *shape[1:]), B.reshape(shape[0], r, *pixels)


def factors_of(A: torch.Tensor, B: torch.Tensor, scale: float) -> Factors:
    """An update with its scale in alpha."""
    return Factors(A=A, B=B, alpha=scale * A.shape[0], kind="convolution" if A.ndim > 2 else "matrix")


def adapter_of(
    factors: Mapping[str, Factors], modules: Mapping[str, Any] | None, header: Mapping[str, str], file: Path
) -> Adapter:
    """The adapter that has these factors and no more, whose scales are alpha / r.

    Args:
        factors: module path -> update.
        modules: all modules of the model by path, where it is known.
        header: of the file: our metadata, and strings to keep.
        file: where it was read.

    Raises:
        AdapterFileError: there is no factor, or our metadata is damaged.
    """
    if not factors:
        raise AdapterFileError(f"{file}: holds no update")
    base, _ = read_our_metadata(header.get(_OURS), file)
    kept = {key: value for key, value in header.items() if not _STALE.fullmatch(key)}
    return Adapter(config=config_of(factors, modules=modules), factors=dict(factors), base=base, metadata=kept)


def header_of(adapter: Adapter) -> dict[str, str]:
    """What `adapter_of` finds again: the adapter's own strings, and the name of its base.

    Not the base's fingerprint: an adapter of some components fits every pipeline that has them.
    """
    header = {**{key: text for key, text in adapter.metadata.items() if not _STALE.fullmatch(key)}, "format": "pt"}
    if adapter.base is not None and adapter.base.name is not None:
        named = replace(adapter.base, architecture="", dtype="", structure="", samples=())
        header[_OURS] = our_metadata(replace(adapter, base=named, metadata={}))
    return header
