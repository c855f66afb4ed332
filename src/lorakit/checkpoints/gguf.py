"""A GGUF model's tensors, each given its place in the transformers model: in their blocks, or dense, one by one.

transformers' own tables say what llama.cpp calls a parameter and what its converter did to it. What they undo to rows
(llama.cpp permutes those of queries and keys in some architectures) is done to the blocks' rows, which stay as they are
otherwise.
"""

from __future__ import annotations

import contextlib
import math
import types
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from lorakit.checkpoints.folder import WEIGHTS, Checkpoint, Part
from lorakit.core.sites import EMBEDDING, LINEAR, TRANSPOSED_LINEAR, site_of
from lorakit.errors import ModelError, bullet_list
from lorakit.gguf_cache import opened_gguf
from lorakit.quant.blocks import BLOCKS
from lorakit.quant.tensor import AT_ONCE, QuantizedTensor

_VIEWS = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
_PLAIN = (*_VIEWS, "F64")
_INSTEAD = "load it dense: quantize 'none' (--quantize none)"


@dataclass(frozen=True)
class _Place:
    """Where a parameter is in the file.

    Attributes:
        tensor: its name there.
        kept_as: the type whose bytes are taken as they are; None: its numbers are worked on in fp32.
        rows: the order in which to take the stored rows; None: as they are.
        transposed: whether the model has the transpose.
    """

    tensor: str
    kept_as: str | None
    rows: torch.Tensor | None = None
    transposed: bool = False


def holds_blocks(path: Path) -> bool:
    """Whether a GGUF file stores any matrix in fewer bits than a floating-point number has.

    Raises:
        ModelError: it cannot be read, or is no GGUF file.
    """
    file = opened_gguf(path)
    return any(file.kind(name) not in _PLAIN for name in file.header.entries)


class GgufWeights:
    """The tensors of a GGUF file by the names that their parameters have in a model.

    Args:
        path: of the file.
        skeleton: the transformers model, on the meta device.

    Raises:
        ModelError: no sound GGUF file, or it lacks a parameter or holds one in a way that cannot be kept; lists them.
    """

    def __init__(self, path: Path, skeleton: Any) -> None:
        self.file = opened_gguf(path)
        self._architecture = str(self.file.header.metadata.get("general.architecture"))
        if int(self.file.header.metadata.get("split.count", 1)) > 1:
            raise ModelError(
                f"{path}: one of several files of a split model; join them first (llama-gguf-split --merge)"
            )
        tables = _tables(path, self._architecture, skeleton.config.model_type)
        make = tables.TENSOR_PROCESSORS.get(self._architecture, tables.TensorProcessor)
        self._processor = make(config=skeleton.config.to_dict())
        self._places: dict[str, _Place] = {}
        problems = []
        modules = dict(skeleton.named_modules())
        # an adapter may be attached to the skeleton already
        tensors = [*skeleton.named_parameters(remove_duplicate=False), *skeleton.state_dict(keep_vars=True).items()]
        own = {name: tensor for name, tensor in tensors if "lorakit_updates." not in name}
        shapes = {name: tuple(tensor.shape) for name, tensor in own.items()}
        self._names = _names(tables, skeleton, self._processor, list(own))
        for tensor in self.file.header.entries:
            try:
                found = self._place(tensor, modules)
            except ModelError as error:
                problems.append(str(error))
                continue
            if found is not None and found[0] in shapes:
                name, place, shape = found
                self._places[name] = place
                if shape != shapes[name]:
                    problems.append(f"{tensor}: of shape {shape}, where {name} has {shapes[name]}")
        tied: dict[int, list[str]] = {}
        for name, each in own.items():
            tied.setdefault(id(each), []).append(name)
        for group in tied.values():
            held = [name for name in group if name in self._places]
            if held:
                self._places |= {name: self._places[held[0]] for name in group if name not in held}
            else:
                problems.append(f"missing: {group[0]}")
        if problems:
            raise ModelError(f"{path}: cannot be used in its blocks:\n{bullet_list(problems)}\nWays out: {_INSTEAD}")
        self.shapes = {name: shapes[name] for name in self._places}

    def nbytes(self, name: str, dtype: torch.dtype) -> int:
        """What a parameter takes in memory when it is loaded by `stored`."""
        place = self._places[name]
        return (
            self.file.nbytes(place.tensor) if place.kept_as in BLOCKS else math.prod(self.shapes[name]) * dtype.itemsize
        )

    def stored(self, name: str, dtype: torch.dtype) -> torch.Tensor:
        """A parameter in its blocks, to be computed with in `dtype`; what is stored in no blocks, as plain numbers of
        that dtype. Blocks whose rows stay where they are are not copied out of the file.
        """
        place = self._places[name]
        if place.kept_as is None:
            made = self._processed(place.tensor, self.file.values(place.tensor))[1]
            return torch.from_numpy(np.ascontiguousarray(made)).to(dtype)
        packed = self.file.raw(place.tensor)
        packed = packed if place.rows is None else packed.index_select(0, place.rows)
        if place.kept_as in _VIEWS:
            plain = packed.view(_VIEWS[place.kept_as]).to(dtype)
            return plain.t().contiguous() if place.transposed else plain
        columns = self.file.header.entries[place.tensor].shape[-1]
        return QuantizedTensor.of(BLOCKS[place.kept_as], (packed,), columns, dtype, transposed=place.transposed)

    def dense(self, name: str) -> torch.Tensor:
        """A parameter in fp32."""
        stored = self.stored(name, torch.float32)
        return stored.dense() if isinstance(stored, QuantizedTensor) else stored

    def own_dtype(self, name: str) -> torch.dtype:
        """In which a parameter's plain numbers are stored; fp32 for blocks, which are worked on in it."""
        return _VIEWS.get(self.file.kind(self._places[name].tensor), torch.float32)

    def kinds(self, names: Iterable[str]) -> tuple[str, ...]:
        """ggml's types of the tensors that some parameters are in."""
        return tuple(sorted({self.file.kind(self._places[name].tensor) for name in names}))

    def unwritable(self, name: str) -> str | None:
        """Why a parameter cannot be put back into the file; None where it can."""
        place = self._places[name]
        kind = self.file.kind(place.tensor)
        if place.kept_as in _VIEWS or (place.kept_as in BLOCKS and BLOCKS[place.kept_as].pack is not None):
            return None
        if place.kept_as in BLOCKS or kind in BLOCKS:
            return f"stored as {kind}, which lorakit reads and does not write"
        if kind not in _VIEWS:
            return f"stored as {kind}"
        values = self.file.values(place.tensor)
        same = np.array_equal(np.asarray(self._processed(place.tensor, values)[1]), values)
        return None if same else "its numbers are put in another order, or changed, by llama.cpp's converter"

    def raw(self, name: str, stored: torch.Tensor) -> tuple[str, torch.Tensor]:
        """(the tensor's name in the file, its bytes there) of a parameter as `stored` gives it, in `own_dtype`; the
        parameter is not `unwritable`.
        """
        place = self._places[name]
        if isinstance(stored, QuantizedTensor):
            (packed,) = stored.parts
        else:
            assert stored.dtype == self.own_dtype(name), "what is written is what was measured"
            plain = (stored.t() if place.transposed else stored).contiguous()
            packed = plain.view(torch.uint8).reshape(len(plain), -1)
        if place.rows is not None:
            packed = torch.empty_like(packed).index_copy_(0, place.rows, packed)
        return place.tensor, packed

    # ------------------------------------------------------------ placing

    def _place(self, tensor: str, modules: Mapping[str, nn.Module]) -> tuple[str, _Place, tuple[int, ...]] | None:
        """(a parameter's name, where it is, its shape), or None for a tensor that the model has not.

        Raises:
            ModelError: it is stored in a way that can neither be kept nor made dense alone.
        """
        if tensor not in self._names:
            return None
        shape, kind = self.file.header.entries[tensor].shape, self.file.kind(tensor)
        moved = self._moved_rows(tensor, shape[0]) if len(shape) == 2 and (kind in BLOCKS or kind in _VIEWS) else None
        if moved is not None:
            name, order, transposed = moved
            module = modules.get(name.rpartition(".")[0])
            multiplies = module is not None and site_of(module) in (LINEAR, TRANSPOSED_LINEAR, EMBEDDING)
            if kind in _VIEWS or multiplies:
                return name, _Place(tensor, kind, order, transposed), shape[::-1] if transposed else shape
            reason = f"{name} is no plain linear layer or embedding, and is stored as {kind}"
        elif kind in BLOCKS:
            what = (
                f"a stack of {shape[0]} matrices (experts)"
                if len(shape) == 3
                else "its numbers are put in another order"
            )
            reason = f"{what}, stored as {kind}"
        else:
            reason = f"stored as {kind}; kept are {', '.join(BLOCKS)}"
        if kind in _PLAIN or (len(shape) <= 2 and math.prod(shape) <= AT_ONCE):  # it can be made dense alone
            # of the values only the shape is asked for: nothing is read
            found, values = self._processed(tensor, np.broadcast_to(np.float32(-1), shape))
            return None if found is None else (found, _Place(tensor, None), values.shape)
        raise ModelError(f"{tensor}: {reason}")

    def _processed(self, tensor: str, values: np.ndarray) -> tuple[str | None, np.ndarray]:
        """(the parameter's name, its values) by transformers' code; the name is None for what the model has not."""
        put: dict[str, Any] = {"tensors": {}}
        result = self._processor.process(
            weights=values, name=tensor, tensor_key_mapping=self._names, parsed_parameters=put
        )
        if result.name is None and len(put["tensors"]) == 1:  # it has given it its place itself
            ((name, made),) = put["tensors"].items()
            return name, made.numpy()
        return self._names.get(result.name), result.weights

    def _moved_rows(self, tensor: str, rows: int) -> tuple[str, torch.Tensor | None, bool] | None:
        """What transformers' code does to the rows of a matrix, learnt from a matrix of places with two columns.

        Returns:
            (the parameter's name, order of the rows or None, whether it transposes), or None where it does more.
        """
        places = np.arange(2 * rows).reshape(rows, 2)
        try:
            name, moved = self._processed(tensor, places)
        except (ValueError, KeyError, TypeError):  # it needs the matrix whole
            return None
        transposed = moved.shape == (2, rows) and rows != 2
        moved = moved.T if transposed else moved
        if name is None or moved.shape != places.shape:
            return None
        order = moved[:, 0] // 2
        if not (np.array_equal(places[order], moved) and np.array_equal(np.sort(order), np.arange(rows))):
            return None
        stays = np.array_equal(order, np.arange(rows))
        return name, None if stays else torch.from_numpy(np.ascontiguousarray(order)), transposed


def _tables(path: Path, architecture: str, model_type: str) -> Any:
    """transformers' module that knows how a GGUF file of this architecture becomes its model.

    Raises:
        ModelError: it does not, or not by these tables.
    """
    import importlib
    import importlib.util

    tables: Any = importlib.import_module("transformers.modeling_gguf_pytorch_utils")
    elsewhere: set[str] = set()
    if importlib.util.find_spec("transformers.integrations.gguf") is not None:
        elsewhere = set(importlib.import_module("transformers.integrations.gguf").GGUF_ARCHS)
    known = set(tables.GGUF_SUPPORTED_ARCHITECTURES) - elsewhere
    if not known & {architecture, model_type}:
        raise ModelError(f"{path}: blocks of the architecture {architecture!r} cannot be kept yet; {_INSTEAD}")
    return tables


def _names(tables: Any, skeleton: Any, processor: Any, own: list[str]) -> dict[str, str]:
    """llama.cpp's name of a tensor -> the parameter's: transformers' table, for the model and (llama.cpp converts some
    architectures without their head) for the model inside.

    transformers looks into every module by itself, and builds gguf's table anew for each: half a minute for 30 layers.
    """

    def looked_up(prefix: str) -> dict[str, str]:
        inside = [name.removeprefix(prefix) for name in own if name.startswith(prefix)]
        level = types.SimpleNamespace(
            config=skeleton.config, state_dict=lambda: dict.fromkeys(inside), named_children=list
        )
        found: dict[str, str] = tables.get_gguf_hf_weights_map(level, processor, qual_name=prefix)
        return found

    return {**looked_up(f"{skeleton.base_model_prefix}."), **looked_up("")}


@dataclass(frozen=True)
class GgufCheckpoint(Checkpoint):
    """A GGUF model as if it were a folder with one file of fp32 tensors, each made dense when it is read."""

    weights: GgufWeights

    @classmethod
    def of(cls, weights: GgufWeights, about: Path) -> GgufCheckpoint:
        """Of a file, and the folder that has its config."""
        key_of = {place.tensor: name for name, place in reversed(weights._places.items())}
        place = {name: (Part(WEIGHTS, key_of[each.tensor]),) for name, each in weights._places.items()}
        held = {name: (torch.float32, weights.shapes[name]) for name in dict.fromkeys(key_of.values())}
        return cls(about, {WEIGHTS: held}, place, weights.shapes, weights)

    @contextlib.contextmanager
    def open(self) -> Iterator[Mapping[str, Mapping[str, torch.Tensor]]]:
        """As `Checkpoint.open`."""
        yield {WEIGHTS: _Dense(self.weights)}


class _Dense(dict[str, torch.Tensor]):
    """name -> parameter, dense for as long as somebody holds it."""

    def __init__(self, weights: GgufWeights) -> None:
        super().__init__()
        self._weights = weights

    def __missing__(self, name: str) -> torch.Tensor:
        return self._weights.dense(name)
