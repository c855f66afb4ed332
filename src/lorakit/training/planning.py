"""What a run will take before it is run: parameters, memory, file size, time. Trains nothing.

Memory is traced, operation by operation, on a skeleton of the model (`training.trace`), so a model needs no weights and
may be larger than the machine. Time is measured, on steps of the run itself, where the model is here.
"""

from __future__ import annotations

import contextlib
import math
import statistics
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch

from lorakit import machine
from lorakit.adapter.attach import attach, invocations_of
from lorakit.core.activated import checkpoint_contexts
from lorakit.data.batches import Batch, collate, plan_evaluation
from lorakit.data.chat import Example
from lorakit.errors import ModelError
from lorakit.models import load_skeleton, weights_size
from lorakit.packing import has_dropout
from lorakit.training.config import TrainConfig
from lorakit.training.loop import Plan, accumulate, ready
from lorakit.training.objectives import mean_loss
from lorakit.training.optim import make_scaler
from lorakit.training.products import products_bytes
from lorakit.training.trace import Traced, trace_evaluation, trace_step

CUDA_CONTEXT = 600_000_000  # bytes that CUDA takes for itself; as others report it, not measured here
HELD_ON_CPU = 350_000_000  # beyond what lives at once: holes between blocks, workspace of products (docs/log.md: plans)
BYTES_TRAINED = 20  # of a trained number in fp32: itself, its gradient, AdamW's two moments, the best so far
RECOMPUTING = 1.33  # time of a step with checkpointing: three passes through the frozen products instead of two
_MOST_COLLATED = 32  # micro-batches looked at, of the longest


@dataclass(frozen=True, kw_only=True)
class Memory:
    """Bytes that a run takes.

    Attributes:
        process: interpreter and libraries; on a GPU, what CUDA takes for itself.
        held: what the C library and the kernels hold beyond what lives at once.
        weights: the base, and what `frozen_products` makes of it.
        adapter: trained tensors with gradients, optimiser state and the best copy; what it holds besides.
        training: beside these, the most of a training step.
        activations: of `training`, what the forward pass keeps for the backward pass.
        logits: of `training`, the logits that are there at once, whose gradient takes their place.
        evaluation: beside weights and adapter, the most of an evaluation.
    """

    process: int
    held: int
    weights: int
    adapter: int
    training: int
    activations: int
    logits: int
    evaluation: int

    @property
    def peak(self) -> int:
        """The most at one time."""
        return self.process + self.held + self.weights + self.adapter + max(self.training, self.evaluation)


@dataclass(frozen=True, kw_only=True)
class Setting:
    """Settings that change memory and time and leave the result as it is but for rounding.

    Attributes:
        micro_batch_tokens: tokens that go through the model at once.
        gradient_checkpointing: whether activations are computed again instead of kept.
        peak: bytes.
        time: of a step, against the same without checkpointing; an estimate.
    """

    micro_batch_tokens: int
    gradient_checkpointing: bool
    peak: int
    time: float


@dataclass(frozen=True, kw_only=True)
class RunPlan:
    """What a run will take.

    Attributes:
        parameters: of the base.
        trained: numbers that are trained.
        adapter_bytes: of the adapter's file.
        steps: optimiser steps.
        tokens: of all rows of all steps.
        computed: share of them that goes through the model; what rows of a step have in common goes once.
        memory: of the settings asked for.
        limit: bytes there are; None: unknown.
        fitting: settings that fit, the fastest first.
        seconds: of all steps and evaluations; None: not measured.
        tokens_per_second: None: not measured.
    """

    parameters: int
    trained: int
    adapter_bytes: int
    steps: int
    tokens: int
    computed: float
    memory: Memory
    limit: int | None
    fitting: tuple[Setting, ...]
    seconds: float | None = None
    tokens_per_second: float | None = None

    @property
    def fits(self) -> bool:
        """Whether the settings asked for fit, as far as is known."""
        return self.limit is None or self.memory.peak <= self.limit

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return {**asdict(self), "memory": {**asdict(self.memory), "peak": self.memory.peak}, "fits": self.fits}


class NotTraceableError(ModelError):
    """A model whose memory cannot be told without running it."""


class Planner:
    """A skeleton of the model with the adapter attached, on which settings are tried.

    Args:
        config: with `dtype`, `quantize` and `device` resolved.
        train: training rows.
        valid: validation rows; may be none.

    Raises:
        ModelError: the model cannot be found, or is of no class that transformers knows.
        TargetError: the adapter's config names what is not in the model.
        ConfigError: `frozen_products` is not for this model.
        NotTraceableError: its operations need numbers, or its rows cannot be packed.
    """

    def __init__(self, config: TrainConfig, train: Sequence[Example], valid: Sequence[Example] = ()) -> None:
        self.config, self.train, self.valid = config, train, valid
        self.model = load_skeleton(config.model).to(machine.DTYPES[config.dtype])
        self.parameters = sum(p.numel() for p in self.model.parameters())
        self.weights = weights_size(self.model, config.model, config.quantize, machine.DTYPES[config.dtype])
        full = config.method == "full"
        handle = None if full else attach(self.model, config.lora, check_base=False)
        self.model.to("meta")
        self.share = not has_dropout(self.model)  # as `loop.ready` has it
        self.trained = sum(p.numel() for p in self.model.parameters() if p.requires_grad)
        self.fixed = (
            sum(t.numel() for name in handle.names for t in handle.fixed_tensors(name).values()) if handle else 0
        )
        # trained weights are counted as weights
        self.adapter = (BYTES_TRAINED - 4 * full) * self.trained + 4 * self.fixed
        self.weights += products_bytes(self.model, config.frozen_products)
        self.process = machine.resident_memory() if torch.device(config.device).type == "cpu" else CUDA_CONTEXT

    def plan(self, limit: int | None) -> RunPlan:
        """What the run will take, and settings with which it takes at most `limit` bytes."""
        steps = Plan.of(self.config, self.train)
        memory = self.asked()
        batches = [self._collated(self.train, rows) for rows in _spread(steps)]
        read = sum(len(batch.ids) for batch in batches)
        return RunPlan(
            parameters=self.parameters,
            trained=self.trained,
            adapter_bytes=4 * (self.trained + self.fixed),  # in fp32, as they are trained
            steps=steps.total_steps,
            tokens=round(steps.tokens),
            computed=read / sum(len(self.train[row].ids) for batch in batches for row in batch.rows),
            memory=memory,
            limit=limit,
            fitting=tuple(self.fitting(memory, limit)),
        )

    def asked(self) -> Memory:
        """What a run with the settings of the config takes, without checkpointing if that is left open."""
        return self.memory(self.config.micro_batch_tokens, checkpointing=self.config.gradient_checkpointing == "on")

    def fitting(self, asked: Memory, limit: int | None) -> list[Setting]:
        """Settings that take at most `limit` bytes, the fastest first; `asked` is what `asked()` said."""
        return sorted(self._fitting(asked, limit), key=lambda setting: setting.time)

    def memory(self, micro_batch_tokens: int, *, checkpointing: bool) -> Memory:
        """What a run with these settings takes."""
        step = self._trace(micro_batch_tokens, checkpointing)
        evaluation = self._trace_evaluation(micro_batch_tokens) if self.valid else Traced(0, 0, 0)
        return Memory(
            process=self.process,
            held=HELD_ON_CPU if torch.device(self.config.device).type == "cpu" else 0,
            weights=self.weights,
            adapter=self.adapter,
            training=step.peak,
            activations=step.kept,
            logits=step.logits,
            evaluation=evaluation.peak,
        )

    def _fitting(self, asked: Memory, limit: int | None) -> Iterator[Setting]:
        config = self.config
        longest = max(len(example.ids) for example in self.train)
        for checkpointing in {"on": (True,), "off": (False,), "auto": (False, True)}[config.gradient_checkpointing]:
            tokens = config.micro_batch_tokens
            time_of = RECOMPUTING if checkpointing else 1.0
            while True:
                if tokens == config.micro_batch_tokens and checkpointing == (config.gradient_checkpointing == "on"):
                    memory = asked
                else:
                    memory = self.memory(tokens, checkpointing=checkpointing)
                if limit is None or memory.peak <= limit:
                    yield Setting(
                        micro_batch_tokens=tokens,
                        gradient_checkpointing=checkpointing,
                        peak=memory.peak,
                        time=time_of,
                    )
                    break
                if tokens <= longest:
                    break
                tokens, time_of = max(longest, tokens // 2), time_of * 1.05  # smaller products are less efficient

    def _trace(self, micro_batch_tokens: int, checkpointing: bool) -> Traced:
        steps = Plan.of(self.config.replace(micro_batch_tokens=micro_batch_tokens), self.train)
        batch = self._heaviest([rows for step in _epoch(steps) for rows in step])
        try:
            checkpoint_activations(self.model, on=checkpointing)
            with _tracing(self.model):
                return trace_step(self.model, batch)
        finally:
            checkpoint_activations(self.model, on=False)

    def _trace_evaluation(self, micro_batch_tokens: int) -> Traced:
        lengths = [len(example.ids) for example in self.valid]
        groups = plan_evaluation(lengths, micro_batch_tokens=micro_batch_tokens)
        heaviest = max(groups, key=lambda rows: sum(lengths[row] for row in rows))
        with _tracing(self.model):
            return trace_evaluation(self.model, self._collated(self.valid, heaviest))

    def _collated(self, examples: Sequence[Example], rows: Sequence[int]) -> Batch:
        return collate(examples, rows, share=self.share, invocations=invocations_of(self.model))

    def _heaviest(self, groups: Sequence[Sequence[int]]) -> Batch:
        """Of micro-batches, the one of which most goes through the model."""
        by_length = sorted(groups, key=lambda rows: -sum(len(self.train[row].ids) for row in rows))
        batches = [self._collated(self.train, rows) for rows in by_length[:_MOST_COLLATED]]
        return max(batches, key=lambda batch: len(batch.ids))


@contextlib.contextmanager
def _tracing(model: Any) -> Iterator[None]:
    try:
        yield
    except (NotImplementedError, RuntimeError, ValueError, TypeError) as error:
        raise NotTraceableError(f"{type(model).__name__} cannot be traced: {error}") from error


def checkpoint_activations(model: Any, *, on: bool) -> None:
    """Have a transformers model keep only what enters its layers, and compute the rest again in the backward pass."""
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    disable = getattr(model, "activation_checkpointing_disable", None) or model.gradient_checkpointing_disable
    if on:
        enable({"use_reentrant": False, "context_fn": checkpoint_contexts})
    elif any(getattr(module, "gradient_checkpointing", False) for module in model.modules()):
        disable()


def _epoch(steps: Plan) -> Iterator[list[list[int]]]:
    of_epoch = math.ceil(len(steps.lengths) / steps.rows_per_step)
    for step, _ in zip(steps.steps(0), range(min(of_epoch, steps.total_steps)), strict=False):
        yield step


def _spread(steps: Plan) -> list[list[int]]:
    """Micro-batches of the first epoch, evenly spread, at most `_MOST_COLLATED`."""
    groups = [rows for step in _epoch(steps) for rows in step]
    return groups[:: math.ceil(len(groups) / _MOST_COLLATED)]


def timed(
    plan: RunPlan, config: TrainConfig, model: Any, train: Sequence[Example], valid: Sequence[Example], *, steps: int
) -> RunPlan:
    """The plan with the time that a few of the run's own steps and one evaluation take here; trains nothing.

    Args:
        plan: of the same run.
        config: of the run, resolved.
        model: the base, loaded, with the adapter attached and active.
        train: training rows.
        valid: validation rows.
        steps: how many, spread over the first epoch.
    """

    def tokens(step: Sequence[Sequence[int]]) -> int:
        return sum(len(train[row].ids) for rows in step for row in rows)

    epoch = list(_epoch(Plan.of(config, train)))
    # the largest one first, uncounted: it touches all the memory that the others will have
    chosen = [max(epoch, key=tokens), *epoch[:: math.ceil(len(epoch) / steps)]]
    scaler = make_scaler(next(model.parameters()).dtype, next(model.parameters()).device)
    rates = []
    longest = max(len(example.ids) for example in (*train, *valid))
    with ready(model, longest, config.frozen_products) as share:
        mean_loss(model, valid, micro_batch_tokens=config.micro_batch_tokens)
        for number, step in enumerate(chosen):
            start = time.perf_counter()
            accumulate(model, train, step, scaler, config.seed, number, share=share)
            model.zero_grad(set_to_none=True)
            rates.append(tokens(step) / (time.perf_counter() - start))
        start = time.perf_counter()
        mean_loss(model, valid, micro_batch_tokens=config.micro_batch_tokens)
        evaluation = time.perf_counter() - start
    rate = statistics.median(rates[1:])
    assert config.eval_steps is not None, "the caller resolves it"
    evaluations = 1 + math.ceil(plan.steps / config.eval_steps)
    return replace(plan, tokens_per_second=rate, seconds=plan.tokens / rate + evaluations * evaluation)
