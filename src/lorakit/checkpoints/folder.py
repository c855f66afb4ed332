"""A model's tensors in a safetensors folder, each given its place in the model: read one by one, never all at once.

Knows transformers' ways of naming and of putting parameters together, not what is done with them.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from lorakit import files
from lorakit.checkpoints.parts import Index, gathered
from lorakit.errors import ModelError, bullet_list
from lorakit.quant.formats import Format
from lorakit.quant.tensor import quantised

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"


@dataclass(frozen=True)
class Part:
    """A tensor in a file, and which part of a parameter it is.

    Attributes:
        file: name of the file.
        key: name in the file.
        index: the tensor is `parameter[index]`; (): the whole.
    """

    file: str
    key: str
    index: Index = ()


@dataclass(frozen=True)
class Checkpoint:
    """Where a model's tensors are on disk.

    Attributes:
        folder: that holds the shards.
        shards: file name -> {name in the file: (dtype, shape)}, in the order of the index.
        place: full name of a parameter of the model -> the tensors it is in; tied ones may share theirs.
        shapes: full name -> shape.
    """

    folder: Path
    shards: Mapping[str, Mapping[str, tuple[torch.dtype, tuple[int, ...]]]]
    place: Mapping[str, tuple[Part, ...]]
    shapes: Mapping[str, tuple[int, ...]]

    def dtype(self, name: str) -> torch.dtype:
        """Of a parameter."""
        first = self.place[name][0]
        return self.shards[first.file][first.key][0]

    def read(self, name: str, shards: Mapping[str, Mapping[str, torch.Tensor]]) -> torch.Tensor:
        """A parameter, from the opened files: a view of its file, or put together in memory."""
        parts = self.place[name]
        if len(parts) == 1:
            return shards[parts[0].file][parts[0].key].reshape(self.shapes[name])
        whole = torch.empty(self.shapes[name], dtype=self.dtype(name))
        for part in parts:
            whole[part.index] = shards[part.file][part.key]
        return whole

    @contextlib.contextmanager
    def open(self) -> Iterator[Mapping[str, Mapping[str, torch.Tensor]]]:
        """file name -> its tensors, read from disk when they are asked for."""
        with contextlib.ExitStack() as stack:
            yield _Shards(self.folder, stack)


class _Shards(dict[str, Mapping[str, torch.Tensor]]):
    """file name -> its tensors; a file is opened when it is first asked for, and closed with the stack."""

    def __init__(self, folder: Path, stack: contextlib.ExitStack) -> None:
        super().__init__()
        self._folder, self._stack = folder, stack

    def __missing__(self, name: str) -> Mapping[str, torch.Tensor]:
        self[name] = self._stack.enter_context(files.open_safetensors(self._folder / name))
        return self[name]


class NotStreamableError(ModelError):
    """A model whose files cannot be folded into one by one; loading it whole may still do."""


def find_checkpoint(folder: Path, skeleton: Any) -> Checkpoint:
    """The tensors of a model folder, each given its place in the model.

    Raises:
        NotStreamableError: no safetensors, a quantised model, or tensors that are not the model's (transformers
        converts them while it loads, in another way than by stacking and renaming).
        FileError: a shard is missing or damaged.
    """
    if getattr(skeleton.config, "quantization_config", None) is not None:
        raise NotStreamableError(f"{folder}: the model is stored quantised")
    if (folder / INDEX).is_file():
        weight_map = files.read_json(folder / INDEX)["weight_map"]
        names = list(dict.fromkeys(weight_map.values()))
    elif (folder / WEIGHTS).is_file():
        names = [WEIGHTS]
    else:
        raise NotStreamableError(f"{folder}: no {WEIGHTS} and no {INDEX}")
    dtypes = files.torch_dtypes()
    shards = {
        name: {
            key: (dtypes[dtype], shape)
            for key, (dtype, shape) in files.read_safetensors_header(folder / name)[0].items()
        }
        for name in names
    }
    where = {key: Part(name, key) for name, shard in shards.items() for key in shard}
    held = {key: shape for shard in shards.values() for key, (_, shape) in shard.items()}
    place: dict[str, tuple[Part, ...]] = {}
    prefix = f"{getattr(skeleton, 'base_model_prefix', '')}."
    tied: dict[int, list[str]] = {}
    shapes: dict[str, tuple[int, ...]] = {}
    for name, tensor in skeleton.named_parameters(remove_duplicate=False):
        if "lorakit_updates." not in name:
            tied.setdefault(id(tensor), []).append(name)
            shapes[name] = tuple(tensor.shape)
    unknown: list[list[str]] = []
    for names_of_one in tied.values():
        found = {}
        for name in names_of_one:
            # files of a bare model (GPT-2's) leave out the prefix that its language model gives it, and the reverse
            for spelling in (name, name.removeprefix(prefix), prefix + name):
                if held.get(spelling) == shapes[name]:
                    found[name] = (where[spelling],)
                    break
        if not found:
            unknown.append(names_of_one)
        place |= {name: found.get(name, next(iter(found.values()))) for name in names_of_one if found}
    if unknown:
        taken = {part.key for parts in place.values() for part in parts}
        left = {key: shape for key, shape in held.items() if key not in taken}
        parts_of = gathered(skeleton, shapes, left)
        for names_of_one in unknown:
            parts = next((parts_of[name] for name in names_of_one if name in parts_of), None)
            if parts is None or (len(parts) > 1 and len(names_of_one) > 1):
                continue
            if len({shards[where[key].file][key][0] for key in parts}) == 1:  # of one dtype
                place |= dict.fromkeys(names_of_one, tuple(replace(where[key], index=i) for key, i in parts.items()))
    missing = [f"{names[0]} {shapes[names[0]]}" for names in unknown if names[0] not in place]
    if missing:
        raise NotStreamableError(f"{folder}: not in its files under that name and shape:\n{bullet_list(missing, 5)}")
    return Checkpoint(folder, shards, place, shapes)


@dataclass(frozen=True)
class QuantisedCheckpoint(Checkpoint):
    """A model on disk with the numbers that some of its matrices have once they have been quantised.

    Attributes:
        inner: the model as it is on disk.
        keys: names in the files of those matrices.
        format: in which.
    """

    inner: Checkpoint
    keys: frozenset[str]
    format: Format

    @classmethod
    def of(cls, inner: Checkpoint, names: set[str], format: Format) -> QuantisedCheckpoint:
        """Of a checkpoint, and the names of the parameters."""
        keys = frozenset(part.key for name in names for part in inner.place[name])
        shards = {
            file: {key: (torch.float32 if key in keys else dtype, shape) for key, (dtype, shape) in held.items()}
            for file, held in inner.shards.items()
        }
        return cls(inner.folder, shards, inner.place, inner.shapes, inner, keys, format)

    @contextlib.contextmanager
    def open(self) -> Iterator[Mapping[str, Mapping[str, torch.Tensor]]]:
        """As `Checkpoint.open`."""
        with self.inner.open() as shards:
            yield {name: _Requantised(shards[name], self) for name in self.shards}


class _Requantised(dict[str, torch.Tensor]):
    """A file's tensors, quantised and made dense again where they are to be."""

    def __init__(self, tensors: Mapping[str, torch.Tensor], of: QuantisedCheckpoint) -> None:
        super().__init__()
        self._tensors, self._of = tensors, of

    def __missing__(self, key: str) -> torch.Tensor:
        tensor = self._tensors[key]
        if key not in self._of.keys:
            return tensor
        return quantised(tensor, self._of.format, torch.float32, key).dense()
