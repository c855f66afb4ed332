"""What a run tells whoever watches it: plain values, in the order they happen. Knows no display."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class DataReady:
    """Both data sets passed the gate."""

    train_rows: int
    valid_rows: int
    lines: tuple[str, ...]
    """What a person should know of them."""


@dataclass(frozen=True)
class ModelReady:
    """The base is loaded and the adapter attached."""

    parameters: int
    dtype: str
    storage: str
    """How the base is held: "none" (in `dtype`), "blocks" of its file, "int8" or "nf4"."""

    products: str
    """How frozen weights multiply in steps: exact or int8."""

    device: str
    layers: int
    ranks: tuple[int, ...]
    trained: int
    virtual_tokens: int = 0
    """Of a soft prompt."""


@dataclass(frozen=True)
class Planned:
    """What the run will take, in bytes; settings that were left to lorakit are chosen by it."""

    peak: int | None
    """Most that it takes at once; None: cannot be told."""

    limit: int | None
    note: str
    """What was chosen so that it fits, or why the peak cannot be told; empty where there is nothing to say."""


@dataclass(frozen=True)
class TrunkKept:
    """What the layers below the trained ones put out is computed once for each row, and kept."""

    layers: int
    tokens: int
    nbytes: int
    where: str


@dataclass(frozen=True)
class Resumed:
    """The run goes on from a checkpoint; newer ones were `damaged`, and this of the machine has `changed`."""

    step: int
    damaged: tuple[str, ...] = ()
    changed: tuple[str, ...] = ()


@dataclass(frozen=True)
class StepDone:
    """One optimiser step."""

    step: int
    total_steps: int
    loss: float
    learning_rate: float
    tokens: int
    seconds: float


@dataclass(frozen=True)
class Evaluated:
    """One pass over the validation rows."""

    step: int
    loss: float
    best: bool
    seconds: float
    base: float | None = None
    """Before the first step, of the base alone, where the adapter begins with an update."""


@dataclass(frozen=True)
class Checkpointed:
    """A checkpoint was committed."""

    step: int
    path: Path


@dataclass(frozen=True)
class Phase:
    """Something that takes a while begins, in words for a person ("sampling before training")."""

    text: str


Event = DataReady | Planned | ModelReady | TrunkKept | Resumed | StepDone | Evaluated | Checkpointed | Phase
OnEvent = Callable[[Event], None]
