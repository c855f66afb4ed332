"""The settings of a run, decided: what a config leaves open is chosen by machine, data and plan, or taken from the run
that is gone on with. Loads no weights.
"""

from __future__ import annotations

import math
from pathlib import Path

import torch

from lorakit import machine
from lorakit.data.prepare import Data
from lorakit.data.sources import located
from lorakit.errors import ModelError, RunError
from lorakit.files import read_json
from lorakit.models import resolve, storage_of
from lorakit.report import size
from lorakit.training.config import TrainConfig
from lorakit.training.events import OnEvent, Phase, Planned
from lorakit.training.loop import Plan
from lorakit.training.planning import Planner

EVALUATIONS = 4  # a run, unless eval_steps says otherwise or they would take more than their share of its time
EVALUATION_SHARE = 0.1
CHECKPOINTS = 8  # a run, unless save_steps or eval_steps says otherwise
FULL_CHECKPOINTS = 2  # a run that trains all weights: each holds four times the model


def resolved(config: TrainConfig, device: torch.device, plan: Plan, valid_tokens: int) -> TrainConfig:
    """Every "auto" and None that stands for a number, replaced by what it comes to here."""
    full = config.method == "full"
    dtype = machine.resolve_dtype("fp32" if full and config.dtype == "auto" else config.dtype, device)
    checkpoints = FULL_CHECKPOINTS if full else CHECKPOINTS
    return config.replace(
        quantize="none" if full else storage_of(config.model, config.quantize),
        device=str(device),
        dtype=next(name for name, known in machine.DTYPES.items() if known == dtype),
        eval_steps=config.eval_steps
        or math.ceil(plan.total_steps / _evaluations(plan, valid_tokens, config.early_stop)),
        save_steps=config.save_steps or config.eval_steps or math.ceil(plan.total_steps / checkpoints),
    )


def _evaluations(plan: Plan, valid_tokens: int, early_stop: int | None = None) -> int:
    """How often a run evaluates: four times, less often where that would take long, at least twice, and often enough
    for `early_stop` to have its say.

    A token costs half as much in evaluation as in training: the forward pass, where the backward pass through frozen
    weights costs the same once more.
    """
    affordable = EVALUATION_SHARE * plan.tokens / (valid_tokens / 2)
    return max(2, min(EVALUATIONS, int(affordable)), 0 if early_stop is None else max(EVALUATIONS, 2 * early_stop))


def made_to_fit(config: TrainConfig, data: Data, on_event: OnEvent) -> tuple[TrainConfig, int]:
    """What goes through the model at once, and checkpointing, so that the run fits into the memory there is, where the
    config leaves it to us (`gradient_checkpointing` or `batch_size` auto); nothing is left open afterwards.

    Returns:
        (the config, bytes that come and go with a step; 0 where that cannot be told)

    Raises:
        RunError: nothing would fit; says what it takes.
        ConfigError: `cache_trunk` is not for such a model.
    """
    on_event(Phase("planning"))
    limit = machine.memory_for(config.device)
    try:
        planner = Planner(config, data.train.examples, data.valid.examples)
        chosen = planner.chosen(limit)
    except ModelError as error:  # one that cannot be found is told when it is loaded
        on_event(Planned(None, limit, str(error)))
        return _unplanned(config, data), 0
    if planner.left_open and limit is not None and chosen.peak > limit:
        kept = planner.trunk
        raise RunError(
            f"this run would take {size(chosen.peak)}{f', {size(kept)} of it for cache_trunk,' if kept else ''} and "
            f"more than the {size(limit)} there are, whatever leaves the result as it is: "
            f"{'set --cache-trunk disk, ' if kept else ''}lower --max-length, use --quantize nf4, --dtype bf16 or a "
            "smaller model (lorakit plan shows what takes how much, and what would fit); --gradient-checkpointing on "
            "or off with a --batch-size of rows tries it all the same"
        )
    decided = chosen.applied(config)
    changed = []
    if config.batch_size == "auto":
        changed.append(f"{chosen.rows} rows at once, {decided.batch_size} a step")
    if decided.micro_batch_tokens != config.micro_batch_tokens:
        changed.append(f"micro-batches of {decided.micro_batch_tokens:,} tokens")
    if chosen.gradient_checkpointing and config.gradient_checkpointing == "auto":
        changed.append("checkpointing on")
    on_event(Planned(chosen.peak, limit, ", ".join(changed)))
    return decided, chosen.passing


def _unplanned(config: TrainConfig, data: Data) -> TrainConfig:
    """The config with nothing left open where a plan cannot be made: an evaluation takes no more tokens at once than
    the largest micro-batch of a step has.
    """
    examples = data.train.examples
    groups = [rows for step in Plan.of(config, examples).epoch() for rows in step]
    return config.replace(
        batch_size=config.rows,
        eval_batch_tokens=config.eval_batch_tokens or max(sum(len(examples[i].ids) for i in rows) for rows in groups),
        gradient_checkpointing="on" if config.gradient_checkpointing == "on" else "off",
    )


def with_whole_paths(config: TrainConfig, folder: Path) -> TrainConfig:
    """For `run.yaml`: paths made absolute, so that it holds from any folder; Hub ids and aliases as they are."""
    return config.replace(
        model=resolve(config.model).name,
        data=located(config.data),
        validation=None if config.validation is None else located(config.validation),
        loftq_original=None if config.loftq_original is None else resolve(config.loftq_original).name,
        output=str(folder.resolve()),
        resume=False,
    )


def as_begun(config: TrainConfig, folder: Path) -> TrainConfig:
    """A config to resume with: what it leaves to us ("auto", None) is as `run.yaml` resolved it.

    Raises:
        RunError: there is no run to go on with, or it is finished.
    """
    if not (folder / "run.yaml").exists():
        raise RunError(f"{folder} holds no run to go on with (no run.yaml in it); leave --resume out to begin one")
    if (folder / "result.json").exists() and not read_json(folder / "result.json")["interrupted"]:
        raise RunError(
            f"{folder} holds a finished run: its adapter is {folder / 'best'}. "
            "For other settings choose another output folder."
        )
    begun = TrainConfig.from_yaml(folder / "run.yaml")
    chosen = ("dtype", "quantize", "device", "gradient_checkpointing", "batch_size")
    left_open = {name: getattr(begun, name) for name in chosen if getattr(config, name) == "auto"}
    if "batch_size" in left_open:  # what goes through the model at once was then left to the plan
        left_open["micro_batch_tokens"] = begun.micro_batch_tokens
    unset = ("eval_steps", "save_steps", "learning_rate", "eval_batch_tokens", "loftq_original")
    left_open |= {name: getattr(begun, name) for name in unset if getattr(config, name) is None}
    return config.replace(**left_open)
