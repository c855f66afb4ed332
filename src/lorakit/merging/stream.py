"""Fold adapters into a model on disk, tensor by tensor: shards in, shards out, the model never whole in memory.

The model's skeleton (on the meta device) with the adapters attached says what changes; for each adapted module its own
tensors are read, folded by `adapter.folding`, and written in their place. Knows safetensors folders, not how users name
models, and nothing of how a merge is judged.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
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
from lorakit.merging.parts import Index, gathered

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


def base_info(checkpoint: Checkpoint, skeleton: nn.Module) -> BaseInfo:
    """The fingerprint of the model in the files, as `attach` takes it of one in memory."""
    shapes = {name: checkpoint.shapes[name] for name in base_parameters(skeleton)}  # tied ones once
    empty = [(n, torch.empty(shape, dtype=checkpoint.dtype(n), device="meta")) for n, shape in shapes.items()]
    with checkpoint.open() as shards:
        return fingerprint.of(skeleton, empty, lambda name: checkpoint.read(name, shards))


@dataclass(frozen=True)
class _Output:
    """A tensor to be written.

    Attributes:
        source: name in the base's file of the tensor it comes from, or is like.
        folded: the parameter to fold, whose part `index` it is; None: it is written as it is.
    """

    source: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    folded: str | None = None
    index: Index = ()


@dataclass
class Stream:
    """A merge under way: what has been folded and not yet written in all its parts, and what was reported.

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
    _unwritten: dict[str, int] = field(default_factory=dict)
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
            layout = {key: (self._stored(output.dtype), output.shape) for key, output in written.items()}
            with files.SafetensorsWriter(target / file, layout) as writer, self.checkpoint.open() as shards:
                for key, output in written.items():
                    if output.folded is None:
                        tensor = shards[file][output.source]
                    else:
                        path = owners[output.folded]
                        tensor = self._folded(output, path, modules[path], selection, shards)
                    writer.write(key, tensor.to(layout[key][0]))
                    weight_map[key] = file
                    total += tensor.numel() * layout[key][0].itemsize
        assert not self._ready, "every folded tensor has been written"
        if (self.checkpoint.folder / INDEX).is_file():
            files.write_json(target / INDEX, {"metadata": {"total_size": total}, "weight_map": weight_map})
        kinds = {self._stored(self.checkpoint.dtype(name)) for name in owners}
        return FoldReport(
            layers=tuple(self._layers),
            dtypes=tuple(sorted(str(kind).removeprefix("torch.") for kind in kinds)),
            untied=tuple(sorted(folding.shared_parameters(self.handle.model) & owners.keys())),
        )

    def _written(self, file: str, owners: Mapping[str, str]) -> dict[str, _Output]:
        """What the shard will hold, by name. Tied parameters stand under one name until one of them changes; then each
        has its own.
        """
        written = {}
        at: dict[str, dict[str, Part]] = {}
        for name, parts in self.checkpoint.place.items():
            for part in parts:
                if part.file == file:
                    at.setdefault(part.key, {})[name] = part
        for key, (dtype, shape) in self.checkpoint.shards[file].items():
            here = at.get(key, {})
            own = next(
                (name for name in here if name == key or name.endswith(f".{key}") or key.endswith(f".{name}")), None
            )
            if own is None and len(here) == 1:  # transformers has another name for it
                (own,) = here
            outputs = {key: own} | {name: name for name in here if name != own and here.keys() & owners.keys()}
            for output, parameter in outputs.items():
                if parameter is None or parameter not in owners:
                    written[output] = _Output(key, dtype, shape)
                else:
                    written[output] = _Output(key, dtype, shape, parameter, here[parameter].index)
        return written

    def _stored(self, dtype: torch.dtype) -> torch.dtype:
        return self.dtype if self.dtype is not None and dtype.is_floating_point else dtype

    def _folded(
        self,
        output: _Output,
        path: str,
        module: AdaptedModule,
        selection: Selection,
        shards: Mapping[str, Mapping[str, torch.Tensor]],
    ) -> torch.Tensor:
        """A parameter with the update in it, or a part of one. All of its module's are folded at once, since an update
        may need them.
        """
        name = output.folded
        assert name is not None, "called for what is to be folded"
        if name not in self._ready:
            kept = dict(base_parameters(module))
            try:
                for own_name in kept:
                    tensor = self.checkpoint.read(f"{path}.{own_name}" if path else own_name, shards)
                    _put(module, own_name, nn.Parameter(tensor, requires_grad=False))
                for (full, _, _), stored, layer in folding.folded_parameters(
                    {path: module}, selection, self.seed, dtype=self.dtype
                ):
                    self._ready[full] = stored
                    self._unwritten[full] = len(self.checkpoint.place[full])
                    self._layers.append(layer)
            finally:
                for own_name, parameter in kept.items():
                    _put(module, own_name, parameter)
        self._unwritten[name] -= 1
        return (self._ready[name] if self._unwritten[name] else self._ready.pop(name))[output.index]


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
