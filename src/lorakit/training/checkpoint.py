"""Checkpoints: everything that determines the remaining steps of a run, in `checkpoints/step-N/`. Knows no training.

A checkpoint is a folder committed whole, its manifest last: adapter and optimiser (safetensors, fp32 exact), what the
adapter holds besides and no step changes, the best adapter so far, and the cursor (JSON). There is no generator state
to store: every draw of a run is a function of integers.
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import torch

from lorakit.errors import FileError, RunError
from lorakit.files import (
    atomic_folder,
    read_json,
    read_safetensors,
    remove_leftovers,
    verify_folder,
    write_json,
    write_safetensors,
)

_NAME = re.compile(r"step-(\d+)")


@dataclass
class Cursor:
    """Where a run stands: the numbers beside the tensors."""

    step: int = 0
    """Optimiser steps done."""

    updates: int = 0
    """Those that changed the adapter: not at a rate of zero (first of a warm-up), nor skipped by the fp16 scaler."""

    tokens: int = 0
    """Tokens that went through the model for training."""

    seconds: float = 0.0
    """Wall time of the steps done."""

    metric_rows: int = 0
    """Lines of metrics.jsonl that belong to the run up to here."""

    evaluated_step: int = -1
    """Step of the newest evaluation; an interrupted run may owe one."""

    initial_loss: float | None = None
    """Validation loss before the first step."""

    best_step: int | None = None
    best_loss: float | None = None
    evaluations_without_better: int = 0

    scaler: dict[str, Any] = field(default_factory=dict)
    """State of the fp16 loss scaler; empty where none is used."""

    skipped_in_a_row: int = 0
    """Newest steps that the fp16 scaler skipped, one after the other."""


@dataclass(frozen=True)
class Checkpoint:
    """What was read back, verified."""

    path: Path
    cursor: Cursor
    adapter: dict[str, torch.Tensor]
    optimizer: dict[str, torch.Tensor]
    best: dict[str, torch.Tensor]
    """The best adapter so far; empty before the first evaluation that counts."""

    fixed: dict[str, torch.Tensor]
    """What the adapter holds and no step changes; empty for most."""


def save_checkpoint(
    folder: Path,
    cursor: Cursor,
    adapter: Mapping[str, torch.Tensor],
    optimizer: Mapping[str, torch.Tensor],
    best: Mapping[str, torch.Tensor],
    fixed: Mapping[str, torch.Tensor],
    identity: Mapping[str, Any],
    keep: int,
) -> Path:
    """Commit `folder/step-N`, then prune to the `keep` newest sound checkpoints.

    Args:
        folder: the run's `checkpoints` folder.
        cursor: stands at the step to save.
        adapter: tensors by name, as trained.
        optimizer: their optimiser state by name.
        best: the best adapter so far, or nothing.
        fixed: what the adapter holds and no step changes: a start that was computed may come out otherwise on another
        machine.
        identity: what the run is of (hashes of config, data, base, template), written into the manifest.
        keep: checkpoints kept, this one included.
    """
    target = folder / f"step-{cursor.step}"
    with atomic_folder(target, manifest={"step": cursor.step, "identity": dict(identity)}) as building:
        write_safetensors(building / "adapter.safetensors", adapter)
        write_safetensors(building / "optimizer.safetensors", optimizer)
        write_safetensors(building / "best.safetensors", best)
        write_safetensors(building / "fixed.safetensors", fixed)
        write_json(building / "cursor.json", asdict(cursor))
    sound = 1  # the one just committed: its hashes were taken from what was written
    for path in (path for path in _newest_first(folder) if path != target):
        if sound < keep and _is_sound(path):
            sound += 1
        else:
            shutil.rmtree(path)
    return target


def load_newest(folder: Path) -> tuple[Checkpoint | None, dict[str, Any], list[str]]:
    """The newest checkpoint that verifies, falling back to its elders.

    Also removes what a killed process left half written; the caller holds the run folder's lock, so nobody is writing.

    Returns:
        (checkpoint or None where there is none at all, its identity, what was wrong with each newer one)

    Raises:
        RunError: there are checkpoints and none is sound.
    """
    remove_leftovers(folder)
    damages: list[str] = []
    for path in _newest_first(folder):
        try:
            identity = _verify(path)
            return _read(path), identity, damages
        except FileError as error:
            damages.append(str(error))
    if damages:
        raise RunError(
            f"{folder}: no checkpoint is sound:\n" + "\n".join(damages) + "\nStart anew in another output folder."
        )
    return None, {}, []


def _newest_first(folder: Path) -> list[Path]:
    found = [(int(match[1]), path) for path in folder.glob("step-*") if (match := _NAME.fullmatch(path.name))]
    return [path for _, path in sorted(found, reverse=True)]


def _verify(path: Path) -> dict[str, Any]:
    """Check a checkpoint folder against its manifest and return the identity recorded there."""
    manifest = verify_folder(path)
    identity = manifest.get("identity")
    if not isinstance(identity, dict) or path.name != f"step-{manifest.get('step')}":
        raise FileError(f"{path}: its manifest is of another checkpoint")
    return identity


def _is_sound(path: Path) -> bool:
    try:
        _verify(path)
    except FileError:
        return False
    return True


def _read(path: Path) -> Checkpoint:
    values = read_json(path / "cursor.json")
    if not isinstance(values, dict) or set(values) != {f.name for f in fields(Cursor)}:
        raise FileError(f"{path / 'cursor.json'}: not a cursor of this version of lorakit")
    adapter, _ = read_safetensors(path / "adapter.safetensors")
    optimizer, _ = read_safetensors(path / "optimizer.safetensors")
    best, _ = read_safetensors(path / "best.safetensors")
    fixed, _ = read_safetensors(path / "fixed.safetensors")
    return Checkpoint(path, Cursor(**values), adapter, optimizer, best, fixed)
