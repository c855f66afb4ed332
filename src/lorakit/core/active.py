"""Which adapters a forward pass uses: one small object per model that all its adapted layers read.

Adapters go by slot, a number given when they are added. Choosing replaces one object and visits no layer, so its cost
depends neither on the number of layers nor on how many adapters are resident.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from contextvars import ContextVar
from dataclasses import dataclass
from types import MappingProxyType

import torch
from torch import nn

from lorakit.errors import AdapterError

Rows = slice | torch.Tensor
"""Places along the first dimension of a tensor: a slice where they are neighbours, else indices."""


@dataclass(frozen=True)
class Selection:
    """Adapters for the whole batch.

    Attributes:
        weights: (slot, weight), in the order of activation.
    """

    weights: tuple[tuple[str, float], ...] = ()

    @property
    def slots_in_use(self) -> tuple[str, ...]:
        """Slots of the adapters."""
        return tuple(slot for slot, _ in self.weights)


class Route:
    """One adapter, or none, for each row of a batch.

    Attributes:
        slots: slot or None, one a row.
        length: tokens a row in the running forward pass, where the model was told a (rows, length, ...) tensor.
        stacks: what layers keep for the length of the route (`core.routed`).
    """

    def __init__(self, slots: Sequence[str | None]) -> None:
        self.slots = tuple(slots)
        self.length: int | None = None
        self.stacks: dict[nn.Module, object] = {}
        self._places: dict[tuple[int, torch.device], dict[str, Rows]] = {}

    @property
    def slots_in_use(self) -> tuple[str, ...]:
        """Slots of the adapters, each once."""
        return tuple(slot for slot in dict.fromkeys(self.slots) if slot is not None)

    def places(self, x: torch.Tensor, where: str) -> dict[str, Rows]:
        """slot -> the places of its rows along the first dimension of a layer's input `x`: (rows, ...), or
        (rows * length, ...) where a model lays its tokens in one line, row after row.

        Raises:
            AdapterError: the first dimension is neither.
        """
        rows, size = len(self.slots), x.shape[0]
        repeat = 1 if size == rows else self.length
        if repeat is None or size != rows * repeat:
            raise AdapterError(
                f"{where}: its input of shape {tuple(x.shape)} does not begin with the {rows} rows of the route"
                + (f" or their {rows} x {self.length} tokens" if self.length else "")
                + "; give one name for each row the model computes (beams and guidance repeat rows)"
            )
        key = (size, x.device)
        if key not in self._places:
            self._places[key] = {
                slot: _rows([i for i, own in enumerate(self.slots) if own == slot], repeat, x.device)
                for slot in self.slots_in_use
            }
        return self._places[key]

    def check_batch(self, rows: int, length: int | None) -> None:
        """Note the shape of what the model is called with.

        Raises:
            AdapterError: the batch has another number of rows.
        """
        if rows != len(self.slots):
            raise AdapterError(
                f"the batch has {rows} rows, the route names {len(self.slots)}: give one name (or None) a row; with "
                "beams or guidance the model computes each row several times, so repeat its name"
            )
        self.length = length


def _rows(indices: list[int], repeat: int, device: torch.device) -> Rows:
    if indices == list(range(indices[0], indices[-1] + 1)):
        return slice(indices[0] * repeat, (indices[-1] + 1) * repeat)
    places = torch.tensor(indices, device=device)
    return places if repeat == 1 else (places[:, None] * repeat + torch.arange(repeat, device=device)).flatten()


NOTHING = Selection()

# What blocks (`with handle.disabled(): ...`) chose, by model: of this thread or task alone. One variable for all
# models, since a ContextVar is never freed.
_chosen_here: ContextVar[Mapping[int, Selection | Route]] = ContextVar("lorakit", default=MappingProxyType({}))


class ActiveState:
    """Which adapters a model uses: for all threads what `activate` set; within a block, what the block chose for the
    thread (or asyncio task) that runs it.

    Attributes:
        everywhere: what counts outside blocks.
        folded: adapters are folded into the weights for now, so that no layer may add them again.
    """

    def __init__(self) -> None:
        self.everywhere = NOTHING
        self.folded = False

    def current(self) -> Selection | Route:
        """What the running forward pass uses.

        Raises:
            AdapterError: another thread has folded adapters into the weights, under a block of this one.
        """
        here = _chosen_here.get().get(id(self))
        if self.folded:
            if here is not None:
                raise AdapterError("another thread is inside merged(): this one's route or disabled() cannot hold")
            return NOTHING
        return self.everywhere if here is None else here

    @property
    def in_block(self) -> bool:
        """Whether this thread is inside a block."""
        return id(self) in _chosen_here.get()

    def choose(self, selection: Selection) -> None:
        """Use `selection`: to the end of the block if this thread is in one, else everywhere."""
        if self.in_block:
            _chosen_here.set({**_chosen_here.get(), id(self): selection})
        else:
            self.everywhere = selection

    @contextlib.contextmanager
    def block(self, selection: Selection | Route) -> Iterator[None]:
        """Within the block this thread uses `selection`; afterwards what it used before, whatever is raised."""
        token = _chosen_here.set({**_chosen_here.get(), id(self): selection})
        try:
            yield
        finally:
            _chosen_here.reset(token)
