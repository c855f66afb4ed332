"""What a plan says, as values: memory by what takes it, settings that fit, suggestions. Knows no model."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, Literal

from lorakit.training.config import TrainConfig


@dataclass(frozen=True, kw_only=True)
class Memory:
    """Bytes that a run takes.

    Attributes:
        process: interpreter and libraries, with what will be loaded; on a GPU, what CUDA takes for itself.
        held: on a CPU, what the C library holds and cannot use again, and kernels made for shapes of products.
        weights: the base as it is held, with what of a quantised one is dense at one time, and what `frozen_products`
            makes of it.
        adapter: trained tensors with gradients, optimiser state and the best copy; what it holds besides.
        trunk: what `cache_trunk` keeps in the same memory.
        training: beside these, the most of a training step.
        activations: of `training`, what the forward pass keeps for the backward pass.
        logits: of `training`, the logits that are there at once, whose gradient takes their place.
        evaluation: as `training`, the most of an evaluation.
    """

    process: int
    held: int
    weights: int
    adapter: int
    trunk: int
    training: int
    activations: int
    logits: int
    evaluation: int

    @property
    def peak(self) -> int:
        """The most at one time."""
        return self.process + self.held + self.weights + self.adapter + self.trunk + self.passing

    @property
    def passing(self) -> int:
        """Of the peak, what comes and goes with a step or an evaluation."""
        return max(self.training, self.evaluation)


@dataclass(frozen=True, kw_only=True)
class Setting:
    """Settings that change memory and time and leave the result as it is but for rounding.

    Attributes:
        micro_batch_tokens: tokens that go through the model at once.
        gradient_checkpointing: whether activations are computed again instead of kept.
        eval_batch_tokens: tokens that go through the model at once in evaluations.
        rows: that go through the model at once, at most.
        micro_batches: into which a step is divided, at most; their gradients are accumulated.
        peak: bytes.
        passing: bytes of `peak` that come and go with a step or an evaluation.
        time: of a step, against the fastest setting without checkpointing; an estimate.
    """

    micro_batch_tokens: int
    gradient_checkpointing: bool
    eval_batch_tokens: int
    rows: int
    micro_batches: int
    peak: int
    passing: int
    time: float

    def applied(self, config: TrainConfig) -> TrainConfig:
        """The config with these settings, and nothing of them left open."""
        return config.replace(
            batch_size=config.rows,
            micro_batch_tokens=self.micro_batch_tokens,
            eval_batch_tokens=self.eval_batch_tokens,
            gradient_checkpointing="on" if self.gradient_checkpointing else "off",
        )


@dataclass(frozen=True, kw_only=True)
class Suggestion:
    """A change after which a run fits, or fits without checkpointing, and which is the user's to make.

    Attributes:
        flag: what to change.
        value: to what.
        rows_cut: training rows that lose tokens by it.
        setting: the fastest that fits then.
    """

    flag: Literal["max_length", "dtype", "quantize"]
    value: int | str
    rows_cut: int
    setting: Setting

    @property
    def same_result(self) -> bool:
        """Whether the result stays as it is but for rounding: the blocks of a file hold the same numbers."""
        return self.value == "blocks"


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
        memory: of `chosen`.
        limit: bytes there are; None: unknown.
        asked: the settings asked for; where batch_size is auto, as much at once as is worth trying.
        chosen: those, or where they do not fit and the config leaves it open, the fastest that do.
        fitting: settings that fit, the fastest first.
        suggestions: where nothing fits without checkpointing, what would with a base in fewer bits; where nothing fits
            at all, also what would with a narrower dtype or shorter rows.
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
    asked: Setting
    chosen: Setting
    fitting: tuple[Setting, ...]
    suggestions: tuple[Suggestion, ...] = ()
    seconds: float | None = None
    tokens_per_second: float | None = None

    @property
    def fits(self) -> bool:
        """Whether the chosen settings fit, as far as is known."""
        return self.limit is None or self.memory.peak <= self.limit

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return {**asdict(self), "memory": {**asdict(self.memory), "peak": self.memory.peak}, "fits": self.fits}
