"""Fold adapters into a model on disk, tensor by tensor: shards in, shards out, the model never whole in memory.

The model's skeleton (on the meta device) with the adapters attached says what changes; for each adapted module its own
tensors are read, folded by `adapter.folding`, and written in their place. Knows safetensors folders, not how users name
models, and nothing of how a merge is judged.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import nn

from lorakit import files
from lorakit.adapter import fingerprint, folding
from lorakit.adapter.attach import AttachedAdapters
from lorakit.adapter.folding import FoldedLayer, FoldReport
from lorakit.adapter.value import BaseInfo
from lorakit.checkpoints.folder import INDEX, Checkpoint, NotStreamableError, Part
from lorakit.checkpoints.parts import Index
from lorakit.core.active import Selection
from lorakit.core.layer import AdaptedModule, base_parameters
from lorakit.errors import AdapterError, bullet_list


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
            with holding(module, path, lambda full: self.checkpoint.read(full, shards)):
                for (full, _, _), stored, layer in folding.folded_parameters(
                    {path: module}, selection, self.seed, dtype=self.dtype
                ):
                    self._ready[full] = stored
                    self._unwritten[full] = len(self.checkpoint.place[full])
                    self._layers.append(layer)
        self._unwritten[name] -= 1
        return (self._ready[name] if self._unwritten[name] else self._ready.pop(name))[output.index]


@contextlib.contextmanager
def holding(module: AdaptedModule, path: str, read: Callable[[str], torch.Tensor]) -> Iterator[None]:
    """Within the block an adapted module of a skeleton has its own parameters, read by their full names."""
    kept = dict(base_parameters(module))
    try:
        for name in kept:
            _put(module, name, nn.Parameter(read(f"{path}.{name}" if path else name), requires_grad=False))
        yield
    finally:
        for name, parameter in kept.items():
            _put(module, name, parameter)


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
