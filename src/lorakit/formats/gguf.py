"""llama.cpp's adapter file: a GGUF file of type "adapter" with two tensors a layer, `NAME.weight.lora_a` (r, in) and
`NAME.weight.lora_b` (out, r).

The scale is folded into B, so that it is 1 whatever a reader does with alpha: alpha is the rank where all layers have
the same, and 0, which llama.cpp takes for "no scale", where they differ. Names and the order of rows are the base's in
llama.cpp (`gguf_names`), so that a base is needed to write and to read. Of the token embedding, `lora_a` is transposed
(vocabulary, r): llama.cpp looks its rows up.
"""

from __future__ import annotations

from pathlib import Path

import torch

from lorakit.adapter.value import Adapter, BaseInfo, Factors
from lorakit.errors import AdapterFileError, FileError, bullet_list
from lorakit.formats import gguf_container
from lorakit.formats.codec import Context, config_of, our_metadata, plain_layers, read_our_metadata, whole_tensors
from lorakit.formats.gguf_names import OUTPUT, TOKEN_EMBEDDING, Names, names_of

FILE = "adapter.gguf"
_HUB = "https://huggingface.co/"
_INVOCATION = "adapter.alora.invocation_tokens"  # llama.cpp applies the adapter from their last occurrence on
_A, _B = ".weight.lora_a", ".weight.lora_b"


def recognises(path: Path) -> bool:
    """A file that begins as GGUF files do."""
    if not path.is_file():
        return False
    with path.open("rb") as file:
        return file.read(4) == gguf_container.MAGIC


# ---------------------------------------------------------------- writing


def obstacles(adapter: Adapter, context: Context) -> list[str]:
    """Biases and modules, layers that llama.cpp has not or in another form, and an unknown base."""
    problems = whole_tensors(adapter, "llama.cpp", invoked=True) + plain_layers(adapter, "llama.cpp")
    try:
        names = names_of(context.base)
    except AdapterFileError as error:
        return [*problems, str(error)]
    return problems + [
        problem
        for path, f in adapter.factors.items()
        if f.kind not in ("attention", "experts") and (problem := _obstacle(path, f, names))
    ]


def _obstacle(path: str, f: Factors, names: Names) -> str | None:
    """Why the update of one layer cannot be carried, or None."""
    if f.kind == "convolution":
        return f"{path}: a convolution, which llama.cpp's adapters do not cover"
    name = names.of_path.get(path)
    if name is None:
        return f"{path}: has no counterpart of its own in llama.cpp's {names.architecture}"
    if f.kind == "embedding" and name != TOKEN_EMBEDDING:
        return f"{path}: llama.cpp adapts no embedding but that of tokens"
    if names.tied and name == OUTPUT:
        return f"{path}: tied to the token embedding, so that llama.cpp has no such matrix to adapt"
    if names.tied and name == TOKEN_EMBEDDING:
        return f"{path}: tied to the output, where llama.cpp would apply the update too, and cannot; leave it out"
    if name in names.heads and f.B.shape[0] % (2 * names.heads[name]):
        return f"{path}: {f.B.shape[0]} outputs do not divide into {names.heads[name]} heads of even size"
    return None


def write(adapter: Adapter, path: Path, context: Context) -> Path:
    """Write one file: `path` if it ends in .gguf, else adapter.gguf in that folder; return the file."""
    names = names_of(context.base)
    tensors: dict[str, torch.Tensor] = {}
    folded = adapter.folded()
    for layer, f in folded.factors.items():
        name = names.of_path[layer]
        A, B = f.A, f.B
        if name in names.heads:
            B = _interleaved(B, names.heads[name])
        tensors |= {f"{name}{_A}": A.T if name == TOKEN_EMBEDDING else A, f"{name}{_B}": B}
    ranks = {f.r for f in folded.factors.values()}
    invocation = list(adapter.config.alora_invocation_tokens)
    metadata: dict[str, str | int | float | list[int]] = {
        "general.architecture": names.architecture,
        "general.type": "adapter",
        "general.file_type": 0 if context.tensor_type == "f32" else 1,
        **_base_metadata(adapter.base),
        "adapter.type": "lora",
        "adapter.lora.alpha": float(ranks.pop()) if len(ranks) == 1 else 0.0,
        **({_INVOCATION: invocation} if invocation else {}),
        "lorakit": our_metadata(adapter),
    }
    file = path if path.suffix == ".gguf" else path / FILE
    gguf_container.write(file, metadata, tensors, context.tensor_type)
    return file


def _base_metadata(base: BaseInfo | None) -> dict[str, str | int | float]:
    """Which base the adapter is for, under the keys of llama.cpp's converters."""
    known_as = (base.published or base.name) if base else None
    if not known_as:
        return {}
    organisation, _, name = known_as.rpartition("/")
    if not organisation or Path(known_as).is_absolute():
        return {"general.base_model.count": 1, "general.base_model.0.name": name}
    return {
        "general.base_model.count": 1,
        "general.base_model.0.name": name.replace("-", " "),
        "general.base_model.0.organization": organisation,
        "general.base_model.0.repo_url": _HUB + known_as,
    }


def _interleaved(B: torch.Tensor, heads: int) -> torch.Tensor:
    """transformers' order of rows within a head (first halves of the rotated pairs, then second) -> llama.cpp's (pair
    by pair).
    """
    return B.reshape(heads, 2, B.shape[0] // heads // 2, B.shape[1]).transpose(1, 2).reshape(B.shape)


def _halved(B: torch.Tensor, heads: int) -> torch.Tensor:
    """Undo `_interleaved`."""
    return B.reshape(heads, B.shape[0] // heads // 2, 2, B.shape[1]).transpose(1, 2).reshape(B.shape)


# ---------------------------------------------------------------- reading


def read(path: Path, context: Context) -> Adapter:
    """Read an adapter file with the base it is for; its config says what the tensors show.

    Raises:
        AdapterFileError: damaged, a model, of another architecture, a tensor without place or partner; no base given.
    """
    try:
        metadata, tensors = gguf_container.read(path)
    except FileError as error:
        raise AdapterFileError(str(error)) from error
    kind = metadata.get("general.type", "model")
    if kind != "adapter":
        raise AdapterFileError(f"{path}: a GGUF file of type {kind!r}, not of an adapter; name it as the base model")
    try:
        names = names_of(context.base)
    except AdapterFileError as error:
        raise AdapterFileError(f"{path}: {error}") from None
    problems = _unsupported(metadata, names)
    factors = _factors(tensors, float(metadata.get("adapter.lora.alpha", 0.0)), names, context, problems)
    if not factors and not problems:
        problems.append("holds no tensor")
    if problems:
        raise AdapterFileError(f"{path}: nothing loaded:\n{bullet_list(problems)}")
    base, extra = read_our_metadata(metadata.get("lorakit"), path)
    base = base or _base_of(metadata)
    assert context.base is not None, "names_of has refused"
    config = config_of(factors, modules=context.base.modules)
    config = config.replace(alora_invocation_tokens=metadata.get(_INVOCATION, ()))
    return Adapter(config=config, factors=factors, base=base, metadata=extra)


def _unsupported(metadata: dict[str, object], names: Names) -> list[str]:
    problems = []
    if metadata.get("adapter.type") != "lora":
        problems.append(f"adapter.type is {metadata.get('adapter.type')!r}; this version reads 'lora'")
    if metadata.get("general.architecture") != names.architecture:
        problems.append(
            f"made for the architecture {metadata.get('general.architecture')!r}, the base is a {names.architecture!r}"
        )
    if not isinstance(metadata.get("adapter.lora.alpha", 0.0), float):
        problems.append(f"adapter.lora.alpha is {metadata['adapter.lora.alpha']!r}, not a number of type float32")
        metadata["adapter.lora.alpha"] = 0.0
    tokens = metadata.get(_INVOCATION, [])
    if not isinstance(tokens, list) or not all(isinstance(token, int) and token >= 0 for token in tokens):
        problems.append(f"{_INVOCATION} is {str(tokens)[:80]}, not a list of token ids")
    known = {"adapter.type", "adapter.lora.alpha", _INVOCATION}
    problems += [
        f"{key} is {str(value)[:80]}, which this version does not support"
        for key, value in metadata.items()
        if key.startswith("adapter.") and key not in known and value not in (0, "", [])
    ]
    return problems


def _factors(
    tensors: dict[str, torch.Tensor], alpha: float, names: Names, context: Context, problems: list[str]
) -> dict[str, Factors]:
    """Give every tensor its layer, or add to `problems` that it has none."""
    assert context.base is not None
    paths = {name: path for path, name in names.of_path.items()}
    pairs: dict[str, dict[str, torch.Tensor]] = {}
    for key in sorted(tensors):
        name, letter = key.removesuffix(_A).removesuffix(_B), "A" if key.endswith(_A) else "B"
        if name == key:
            problems.append(f"{key}: unexpected; neither {_A} nor {_B}")
        elif name not in paths:
            problems.append(f"{key}: no layer of the base is called {name} in llama.cpp's {names.architecture}")
        else:
            pairs.setdefault(name, {})[letter] = tensors[key]
    factors = {}
    for path, name in names.of_path.items():  # the model's order
        if name not in pairs:
            continue
        if len(pairs[name]) == 1:
            problems.append(f"{name}: lora_{'b' if 'A' in pairs[name] else 'a'} is missing")
            continue
        A, B = pairs[name]["A"], pairs[name]["B"]
        if name == TOKEN_EMBEDDING:
            A = A.T.contiguous()
        embedding = context.base.kinds.get(path) == "embedding"
        ends = tuple(reversed(context.base.modules[path])) if embedding else context.base.modules[path]
        sizes = (B.shape[0], A.shape[-1])
        if A.ndim != 2 or B.ndim != 2 or A.shape[0] != B.shape[1] or sorted(sizes) != sorted(ends):
            problems.append(
                f"{name}: A {tuple(A.shape)} and B {tuple(B.shape)} do not fit the layer {path}, {tuple(ends)}"
            )
            continue
        if name in names.heads:
            B = _halved(B, names.heads[name]).contiguous()
        r = A.shape[0]
        factors[path] = Factors(A=A, B=B, alpha=alpha or float(r), kind="embedding" if embedding else "matrix")
    return factors


def _base_of(metadata: dict[str, object]) -> BaseInfo | None:
    url = metadata.get("general.base_model.0.repo_url")
    if not isinstance(url, str) or not url.startswith(_HUB):
        return None
    return BaseInfo(name=url.removeprefix(_HUB), architecture="", dtype="", structure="", samples=())
