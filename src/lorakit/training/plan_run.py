"""A whole plan, from a config to what `lorakit plan` tells. Knows the order of things, as `training.run` does."""

from __future__ import annotations

import torch

from lorakit import machine
from lorakit.adapter.attach import attach
from lorakit.adapter.config import FOUND_OUT, LoRAConfig
from lorakit.data.chat import Example
from lorakit.data.sources import Origin
from lorakit.errors import ConfigError
from lorakit.models import load_model
from lorakit.training.config import TrainConfig
from lorakit.training.invocation import with_invocation
from lorakit.training.loop import Plan
from lorakit.training.planned import RunPlan
from lorakit.training.planning import Planner
from lorakit.training.recomputing import checkpoint_activations
from lorakit.training.run import read
from lorakit.training.settings import resolved
from lorakit.training.timing import timed


def plan_run(
    config: TrainConfig, *, memory: int | None = None, length: int | None = None, steps_timed: int = 4
) -> RunPlan:
    """What a run with this config will take.

    Args:
        config: as `train` takes it; nothing is written.
        memory: bytes there are; None: what the device has free here.
        length: instead of reading `config.data`: a step of rows of this many tokens, all of them trained.
        steps_timed: steps of the run to measure the time on, for which the model is loaded; 0: no time.

    Raises:
        DataError: the rows cannot be read, or would train nothing or the wrong thing.
        ModelError: the model cannot be found, or cannot be traced.
        TargetError: the adapter's config names what is not in the model.
    """
    config = with_invocation(config)
    device, here = _device(config.device)
    if not here:  # dtype cannot be probed
        config = config.replace(dtype="bf16" if config.dtype == "auto" else config.dtype)
    if length is None:
        data = read(config)
        train, valid = data.train.examples, data.valid.examples
    else:
        train = tuple(_row(number, length) for number in range(config.rows_per_step))
        valid = train[:1]
    config = resolved(config, device, Plan.of(config, train), sum(len(example.ids) for example in valid))
    if memory is None and here:
        memory = machine.memory_for(device)
    plan = Planner(config, train, valid).plan(memory)
    if not steps_timed or not plan.fits or not here:
        return plan
    config = plan.chosen.applied(config)
    machine.keep_few_kernels()
    machine.keep_freed_memory()
    model, tokenizer = load_model(config.model, config.dtype, config.device, config.quantize)
    checkpoint_activations(model, on=config.gradient_checkpointing == "on")
    attach(model, _as_costly(config.lora), prompt=config.prompt, tokenizer=tokenizer)
    return timed(plan, config, model, train, valid, steps=steps_timed)


def _as_costly(config: LoRAConfig) -> LoRAConfig:
    """A config whose steps take as long, and that needs neither rows nor an original to begin."""
    if config.init not in FOUND_OUT:
        return config
    return config.replace(init="olora" if config.from_start else "default")


def _device(name: str) -> tuple[torch.device, bool]:
    """A device, and whether it is here: a plan may be for another machine's GPU."""
    try:
        return machine.resolve_device(name), True
    except ConfigError:
        if name.partition(":")[0] not in ("cuda", "mps"):
            raise
        return torch.device(name), False


def _row(number: int, length: int) -> Example:
    """A row that shares no beginning with another."""
    return Example([number] * length, [False] + [True] * (length - 1), Origin("rows of one length", number + 1))
