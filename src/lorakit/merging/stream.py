"""Fold adapters into a model on disk, tensor by tensor: shards in, shards out, the model never whole in memory.

The model's skeleton (on the meta device) with the adapters attached says what changes; for each adapted module its own
tensors are read, folded by `adapter.folding`, and written in their place. Knows safetensors folders, not how users name
models, and nothing of how a merge is judged.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from lorakit import files
from lorakit.adapter import fingerprint, folding
from lorakit.adapter.attach import AttachedAdapters
from lorakit.adapter.folding import FoldedLayer, FoldReport
from lorakit.adapter.value import BaseInfo
from lorakit.core.active import Selection
from lorakit.core.layer import AdaptedModule, base_parameters
from lorakit.errors import AdapterError, ModelError, bullet_list

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"


@dataclass(frozen=True)
class Checkpoint:
    """Where a model's tensors are on disk.

    Attributes:
        folder: that holds the shards.
        shards: file name -> {name in the file: (dtype, shape)}, in the order of the index.
        place: full name of a parameter of the model -> (file name, name in the file); tied ones may share a place.
    """

    folder: Path
    shards: Mapping[str, Mapping[str, tuple[torch.dtype, tuple[int, ...]]]]
    place: Mapping[str, tuple[str, str]]

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
        NotStreamableError: no safetensors, a quantised model, or tensors whose names are not the model's (transformers
        converts them while it loads).
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
    where = {key: (name, key) for name, shard in shards.items() for key in shard}
    place: dict[str, tuple[str, str]] = {}
    unknown = []
    prefix = f"{getattr(skeleton, 'base_model_prefix', '')}."
    tied: dict[int, list[str]] = {}
    for name, tensor in skeleton.named_parameters(remove_duplicate=False):
        if "lorakit_updates." not in name:
            tied.setdefault(id(tensor), []).append(name)
    for names_of_one in tied.values():
        shape = tuple(skeleton.get_parameter(names_of_one[0]).shape)
        found = {}
        for name in names_of_one:
            # files of a bare model (GPT-2's) leave out the prefix that its language model gives it, and the reverse
            for spelling in (name, name.removeprefix(prefix), prefix + name):
                if spelling in where and shards[where[spelling][0]][spelling][1] == shape:
                    found[name] = where[spelling]
                    break
        if not found:
            unknown.append(f"{names_of_one[0]} {shape}")
        else:
            place |= {name: found.get(name, next(iter(found.values()))) for name in names_of_one}
    if unknown:
        raise NotStreamableError(f"{folder}: not in its files under that name and shape:\n{bullet_list(unknown, 5)}")
    return Checkpoint(folder, shards, place)


def base_info(checkpoint: Checkpoint, skeleton: nn.Module) -> BaseInfo:
    """The fingerprint of the model in the files, as `attach` takes it of one in memory."""
    with checkpoint.open() as shards:
        places = {name: checkpoint.place[name] for name in base_parameters(skeleton)}  # tied ones once
        tensors = [(name, shards[file][key]) for name, (file, key) in places.items()]
        return fingerprint.of(skeleton, tensors)  # type: ignore[arg-type]


@dataclass
class Stream:
    """A merge under way: what has been folded and not yet written, and what was reported.

    Attributes:
        checkpoint: the model on disk.
        handle: the adapters, attached to its skeleton, those to fold in active.
        dtype: of storage for floating-point tensors; None: as they are.
        seed: of stochastic rounding; None: to the nearest.
    """

    checkpoint: Checkpoint
    handle: AttachedAdapters
    dtype: torch.dtype | None
    seed: int | None
    _ready: dict[str, torch.Tensor] = field(default_factory=dict)
    _layers: list[FoldedLayer] = field(default_factory=list)

    def run(self, target: Path) -> FoldReport:
        """Write every shard into `target`, under its own name, and the index.

        Raises:
            AdapterError: an update cannot be folded in.
            FileError: a file could not be read or written.
        """
        modules, selection = self.handle.adapted_modules(), self.handle.active_selection()
        folding.require_biases(modules, selection)
        if any(folding.trained_buffers(modules, selection)):
            raise NotStreamableError("the adapter holds whole modules with statistics of their own (batch norms)")
        owners = {
            name: path
            for path, module in modules.items()
            for name in folding.changed_parameters(path, module, selection)
        }
        weight_map, total = {}, 0
        for file in self.checkpoint.shards:
            written = self._written(file, owners)
            layout = {key: (self._stored(dtype), shape) for key, (_, _, dtype, shape) in written.items()}
            with files.SafetensorsWriter(target / file, layout) as writer, self.checkpoint.open() as shards:
                for key, (source, name, _, _) in written.items():
                    if name is None:
                        tensor = shards[file][source]
                    else:
                        tensor = self._folded(name, owners[name], modules[owners[name]], selection, shards)
                    writer.write(key, tensor.to(layout[key][0]))
                    weight_map[key] = file
                    total += tensor.numel() * layout[key][0].itemsize
        assert not self._ready, "every folded tensor has been written"
        if (self.checkpoint.folder / INDEX).is_file():
            files.write_json(target / INDEX, {"metadata": {"total_size": total}, "weight_map": weight_map})
        kinds = {self._stored(self._entry(name)[0]) for name in owners}
        return FoldReport(
            layers=tuple(self._layers),
            dtypes=tuple(sorted(str(kind).removeprefix("torch.") for kind in kinds)),
            untied=tuple(sorted(folding.shared_parameters(self.handle.model) & owners.keys())),
        )

    def _written(
        self, file: str, owners: Mapping[str, str]
    ) -> dict[str, tuple[str, str | None, torch.dtype, tuple[int, ...]]]:
        """What the shard will hold: name -> (name of the tensor it comes from, parameter to fold or None, dtype and
        shape of that tensor). Tied parameters stand under one name until one of them changes; then each has its own.
        """
        written = {}
        names_at: dict[str, list[str]] = {}
        for name, (at, key) in self.checkpoint.place.items():
            if at == file:
                names_at.setdefault(key, []).append(name)
        for key, (dtype, shape) in self.checkpoint.shards[file].items():
            names = names_at.get(key, [])
            own = next(
                (name for name in names if name == key or name.endswith(f".{key}") or key.endswith(f".{name}")), None
            )
            written[key] = (key, own if own in owners else None, dtype, shape)
            if any(name in owners for name in names):
                for name in names:
                    if name != own:
                        written[name] = (key, name if name in owners else None, dtype, shape)
        return written

    def _entry(self, name: str) -> tuple[torch.dtype, tuple[int, ...]]:
        file, key = self.checkpoint.place[name]
        return self.checkpoint.shards[file][key]

    def _stored(self, dtype: torch.dtype) -> torch.dtype:
        return self.dtype if self.dtype is not None and dtype.is_floating_point else dtype

    def _folded(
        self,
        name: str,
        path: str,
        module: AdaptedModule,
        selection: Selection,
        shards: Mapping[str, Mapping[str, torch.Tensor]],
    ) -> torch.Tensor:
        """A parameter with the update in it. All of its module's are folded at once, since an update may need them."""
        if name not in self._ready:
            kept = dict(base_parameters(module))
            try:
                for own_name in kept:
                    file, key = self.checkpoint.place[f"{path}.{own_name}" if path else own_name]
                    _put(module, own_name, nn.Parameter(shards[file][key], requires_grad=False))
                for (full, _, _), stored, layer in folding.folded_parameters(
                    {path: module}, selection, self.seed, dtype=self.dtype
                ):
                    self._ready[full] = stored
                    self._layers.append(layer)
            finally:
                for own_name, parameter in kept.items():
                    _put(module, own_name, parameter)
        return self._ready.pop(name)


def _put(module: nn.Module, name: str, parameter: nn.Parameter) -> None:
    path, _, last = name.rpartition(".")
    module.get_submodule(path)._parameters[last] = parameter


def check_base(adapters: Mapping[str, BaseInfo | None], here: BaseInfo) -> None:
    """Refuse adapters made on another base than the one in the files.

    Raises:
        AdapterError: with every difference.
    """
    problems = [
        f"{name}: {problem}"
        for name, base in adapters.items()
        if base is not None
        for problem in fingerprint.differences(base, here)
    ]
    if problems:
        raise AdapterError(f"the adapter was not made on this base; nothing was written:\n{bullet_list(problems)}")
