"""What codecs of single files share: finding the file, making a layer's factors fit its weight, and the config that an
adapter has whose file holds none. Knows no tensor names.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Collection, Mapping
from pathlib import Path

import torch

from lorakit.adapter.config import LoRAConfig
from lorakit.adapter.value import Adapter, Factors
from lorakit.errors import AdapterFileError, FileError
from lorakit.files import read_safetensors, read_safetensors_header

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
    factors: Mapping[str, Factors], modules: Collection[str], metadata: Mapping[str, str] | None = None
) -> Adapter:
    """The adapter that has these factors and no more, whose scales are alpha / r.

    Args:
        factors: module path -> update.
        modules: all paths of the model, where it is known.
        metadata: strings to keep.
    """
    ranks, alphas = ({path: getattr(f, name) for path, f in factors.items()} for name in ("r", "alpha"))
    r, alpha = (Counter(values.values()).most_common(1)[0][0] if values else 0 for values in (ranks, alphas))
    config = LoRAConfig(
        r=max(int(r), 1),
        alpha=float(alpha) or 1.0,
        target_modules=exactly(factors, modules),
        rank_pattern={path: int(rank) for path, rank in _exceptions(ranks, r).items()},
        alpha_pattern=_exceptions(alphas, alpha),
    )
    return Adapter(config=config, factors=dict(factors), metadata=dict(metadata or {}))


def exactly(paths: Collection[str], modules: Collection[str]) -> str | tuple[str, ...]:
    """`target_modules` that mean these modules and no other: a list, or an expression where a list might mean more."""
    ends = {end for path in {*modules, *paths} for end in _tails(path)}
    known = modules or all("." in path for path in paths)
    return tuple(paths) if known and ends.isdisjoint(paths) else "|".join(map(re.escape, paths))


def _exceptions(values: Mapping[str, float], usual: float) -> dict[str, float]:
    """Pattern -> value for every layer that has not the usual one; anchored where it would mean a longer path too."""
    ends = {end for path in values for end in _tails(path)}
    return {("^" if path in ends else "") + re.escape(path): v for path, v in values.items() if v != usual}


def _tails(path: str) -> list[str]:
    parts = path.split(".")
    return [".".join(parts[start:]) for start in range(1, len(parts))]
