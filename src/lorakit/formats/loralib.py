"""loralib's state dicts: `X.lora_A`, `X.lora_B` and biases, in a safetensors file or one of `torch.save`.

What is not in such a file: the scale (`Context.alpha`; files written here carry it in their header), which kind of
layer X is (told from the base, which is needed to read), and which parts of a MergedLinear have an update
(`Context.enable_lora`, where not all have). Shapes, r being what the layer was made with:

- Linear: A (r, in), B (out, r). Embedding: A (r, vocabulary), B (dim, r).
- MergedLinear with k of n parts enabled: A (k r, in), B (k out/n, r). Read as one update of rank k r.
- Conv2d with a k x k kernel: A (k r, k in), B (k out/groups, k r) (`loralib_convolution`).
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Literal

import torch

from lorakit import files
from lorakit.adapter.value import Adapter, Factors
from lorakit.errors import AdapterFileError, FileError, bullet_list, nearest
from lorakit.formats import loralib_convolution
from lorakit.formats.codec import (
    BaseFacts,
    Context,
    config_of,
    more_than_low_rank,
    our_metadata,
    plain_layers,
    read_our_metadata,
)

FILE = "lora.safetensors"
_TORCH = (".pt", ".pth", ".bin")
_A, _B, _BIAS = ".lora_A", ".lora_B", ".bias"
_ALPHA = "lora_alpha"


def recognises(path: Path) -> bool:
    """A safetensors file with such names, or a file of `torch.save` with such names (or one that cannot be read, so
    that reading it says why).
    """
    if not path.is_file() or path.suffix not in (".safetensors", *_TORCH):
        return False
    try:
        names = files.read_torch(path) if path.suffix in _TORCH else files.read_safetensors_header(path)[0]
    except FileError:
        return path.suffix in _TORCH
    return any(name.endswith(_A) for name in names)


# ---------------------------------------------------------------- writing


def obstacles(adapter: Adapter, context: Context) -> list[str]:
    """Modules trained whole, biases of B, and convolutions of a shape that loralib has not."""
    problems = [
        f"{name}: trained whole (modules_to_save), which loralib's state dicts do not hold" for name in adapter.replaced
    ]
    problems += [f"{path}: rows of tokens trained whole, which loralib has not" for path in adapter.tokens]
    problems += more_than_low_rank(adapter, "loralib") + plain_layers(adapter, "loralib")
    for path, f in adapter.factors.items():
        if f.kind == "convolution" and (why := loralib_convolution.obstacle(f)):
            problems.append(f"{path}: {why}")
    return problems


def write(adapter: Adapter, path: Path, context: Context) -> Path:
    """Write what `load_state_dict(strict=False)` of a model made with loralib takes; return the file.

    Its layers are made with each layer's rank and `lora_alpha=context.alpha`, by default the adapter's own alpha. Where
    a layer's scale is another one (patterns, rsLoRA), B makes up for it.

    Args:
        adapter: what to write.
        path: a file ending in .pt, .pth or .bin (torch.save) or .safetensors; else a folder for lora.safetensors.
        context: alpha counts.
    """
    alpha = context.alpha if context.alpha is not None else adapter.config.alpha
    tensors: dict[str, torch.Tensor] = {}
    for layer, f in adapter.factors.items():
        factor = adapter.scale(layer) * f.r / alpha
        A, B = f.A, f.B if factor == 1.0 else f.B.float() * factor
        if f.kind == "convolution":
            A, B = loralib_convolution.stacked(A, B)
        tensors |= {layer + _A: A, layer + _B: B}
    for layer, bias in adapter.biases.items():
        convolution = layer in adapter.factors and adapter.factors[layer].kind == "convolution"
        tensors[f"{layer}.conv{_BIAS}" if convolution else layer + _BIAS] = bias
    file = path if path.suffix in (".safetensors", *_TORCH) else path / FILE
    if file.suffix in _TORCH:
        files.write_torch(file, tensors)
    else:
        metadata = {"format": "pt", _ALPHA: repr(float(alpha)), "lorakit": our_metadata(adapter)}
        files.write_safetensors(file, tensors, metadata)
    return file


# ---------------------------------------------------------------- reading


def read(path: Path, context: Context) -> Adapter:
    """Read a state dict of low-rank factors and biases.

    Raises:
        AdapterFileError: damaged, the base or alpha is not given, or a tensor has no place in the base, no partner or
        another shape.
    """
    metadata: Mapping[str, str] = {}
    try:
        if path.suffix in _TORCH:
            tensors = files.read_torch(path)
        else:
            tensors, metadata = files.read_safetensors(path)
    except FileError as error:
        raise AdapterFileError(str(error)) from error
    alpha = _alpha(metadata, context, path)
    if context.base is None:
        raise AdapterFileError(
            f"{path}: loralib's files do not tell linear layers from embeddings: give the base model"
        )
    problems: list[str] = []
    factors, biases = _sorted_tensors(tensors, alpha, context.base, context.enable_lora, problems)
    if not factors and not problems:
        problems.append(f"holds no {_A} and {_B}")
    if problems:
        raise AdapterFileError(f"{path}: nothing loaded:\n{bullet_list(problems)}")
    base, extra = read_our_metadata(metadata.get("lorakit"), path)
    bias: Literal["none", "all", "lora_only"] = (
        "none" if not biases else "all" if biases.keys() - factors else "lora_only"
    )
    config = config_of(factors, modules=context.base.modules, bias=bias)
    return Adapter(config=config, factors=factors, biases=biases, base=base, metadata=extra)


def _alpha(metadata: Mapping[str, str], context: Context, path: Path) -> float:
    """The numerator of the scale, from the caller or from our own header."""
    try:
        in_file = float(metadata[_ALPHA]) if _ALPHA in metadata else None
    except ValueError:
        raise AdapterFileError(f"{path}: {_ALPHA} in its header is {metadata[_ALPHA]!r}, not a number") from None
    if context.alpha is None and in_file is None:
        raise AdapterFileError(f"{path}: loralib's files do not hold the scale: give alpha, the lora_alpha of training")
    if context.alpha is not None and in_file is not None and in_file != context.alpha:
        raise AdapterFileError(f"{path}: alpha is {in_file:g} by its header, {context.alpha:g} as given; leave it out")
    alpha = in_file if context.alpha is None else context.alpha
    assert alpha is not None
    if not 0 < alpha < float("inf"):
        raise AdapterFileError(f"{path}: alpha must be a positive number (got {alpha})")
    return alpha


def _sorted_tensors(
    tensors: Mapping[str, torch.Tensor],
    alpha: float,
    base: BaseFacts,
    enable_lora: tuple[bool, ...] | None,
    problems: list[str],
) -> tuple[dict[str, Factors], dict[str, torch.Tensor]]:
    """Give every tensor its place, or add to `problems` that it has none."""
    pairs: dict[str, dict[str, torch.Tensor]] = {}
    biases: dict[str, torch.Tensor] = {}
    for key in sorted(tensors):
        end = next((end for end in (_A, _B, _BIAS) if key.endswith(end)), None)
        if end is None:
            problems.append(f"{key}: unexpected; such a file holds lora_state_dict(model), not the model's weights")
            continue
        path = _module(key.removesuffix(end), base)
        if path is None:
            guess = nearest(key.removesuffix(end), base.modules, 1)
            problems.append(f"{key}: no such layer in the base{f'; nearest: {guess[0]}' if guess else ''}")
        elif end == _BIAS:
            biases[path] = tensors[key]
        else:
            pairs.setdefault(path, {})[end[-1]] = tensors[key].float()
    factors = {}
    for path in base.modules:  # the model's order
        pair = pairs.get(path)
        if pair is None:
            continue
        if len(pair) == 1:
            problems.append(f"{path}: lora_{'B' if 'A' in pair else 'A'} is missing")
        elif pair["A"].ndim != 2 or pair["B"].ndim != 2:
            problems.append(f"{path}: lora_A and lora_B must be matrices")
        else:
            try:
                factors[path] = _factors(
                    pair["A"], pair["B"], alpha, base.modules[path], base.kinds.get(path), enable_lora
                )
            except ValueError as error:
                problems.append(f"{path}: {error}")
    return factors, biases


def _module(name: str, base: BaseFacts) -> str | None:
    """The path in the base of what loralib calls `name`: its convolutions hold theirs in `conv`, and the base may be a
    plain model or one made of them.
    """
    for path in (name, f"{name}.conv", name.removesuffix(".conv")):
        if path in base.modules:
            return path
    return None


def _factors(
    A: torch.Tensor,
    B: torch.Tensor,
    alpha: float,
    weight: tuple[int, ...],
    kind: str | None,
    enable_lora: tuple[bool, ...] | None,
) -> Factors:
    """The plain update of one layer with a weight of this shape.

    Raises:
        ValueError: the shapes do not fit, or `enable_lora` is needed and not given.
    """
    if kind == "convolution":
        return loralib_convolution.factors(A, B, alpha, weight)
    mismatch = ValueError(f"A {tuple(A.shape)} and B {tuple(B.shape)} do not fit its weight {tuple(weight)}")
    if kind == "embedding":
        if A.shape[0] != B.shape[1] or (A.shape[1], B.shape[0]) != weight:
            raise mismatch
        return Factors(A=A, B=B, alpha=alpha, kind="embedding")
    if len(weight) != 2 or A.shape[1] not in weight:
        raise mismatch
    out = weight[0] if A.shape[1] == weight[1] else weight[1]  # the latter: stored transposed (fan_in_fan_out)
    if (B.shape[0], B.shape[1]) == (out, A.shape[0]):
        return Factors(A=A, B=B, alpha=alpha)
    r = B.shape[1]
    k = A.shape[0] // r if r else 0
    if k == 0 or A.shape[0] % r or B.shape[0] % k or out % (B.shape[0] // k):
        raise mismatch
    parts = out // (B.shape[0] // k)
    if enable_lora is None and k == parts:
        enable_lora = (True,) * parts
    if enable_lora is None or len(enable_lora) != parts or sum(enable_lora) != k:
        given = "" if enable_lora is None else f"; enable_lora={list(enable_lora)} says otherwise"
        raise ValueError(
            f"a MergedLinear with {k} of {parts} parts, and the file does not say which: give enable_lora{given}"
        )
    wide = B.new_zeros(parts, out // parts, k, r)  # block-diagonal: part p of the output reads the rows of A of its own
    for block, part in enumerate(part for part, enabled in enumerate(enable_lora) if enabled):
        wide[part, :, block] = B.view(k, out // parts, r)[block]
    return Factors(A=A, B=wide.reshape(out, k * r), alpha=alpha * k)  # of rank k r, so that the scale stays alpha / r
