"""What a run will take before it is run: parameters, memory, file size; and settings with which it fits.

Memory is traced, operation by operation, on a skeleton of the model (`training.trace`), so a model needs no weights and
may be larger than the machine. Time is `training.timing`'s.
"""

from __future__ import annotations

import contextlib
import copy
import math
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import torch

from lorakit import machine
from lorakit.adapter.attach import attach
from lorakit.adapter.in_use import first_tokens, soft_prompt_of
from lorakit.data.batches import Batch, plan_evaluation
from lorakit.data.chat import Example
from lorakit.errors import ModelError
from lorakit.models import blocks_of, load_skeleton, weights_size
from lorakit.packing import collated, packed_attention
from lorakit.training.config import TrainConfig
from lorakit.training.loop import Plan, ready
from lorakit.training.planned import Memory, RunPlan, Setting, Suggestion
from lorakit.training.products import products_bytes
from lorakit.training.recomputing import checkpoint_activations
from lorakit.training.trace import AsOnDevices, Traced, trace_evaluation, trace_step
from lorakit.training.trunk import trunk_of

CUDA_CONTEXT = 600_000_000  # bytes that CUDA takes for itself; as others report it, not measured here
# Bytes that the process itself grows by on a CPU from here to the end of a run: what planning leaves, libraries that
# are loaded later, buffers of threads. Measured on a run of a model of 1M parameters (docs/log.md, as below).
LOADED_LATER = 65_000_000
# Of what a forward pass allocates and gives back, how much the C library cannot use again for blocks of the same size,
# because something small that stays lies beside it: a node of autograd beside each operation that is recorded, less
# where nothing is. Measured with glibc 2.36 on two settings, checked on others (docs/log.md: what plans left out).
SCATTERED, SCATTERED_RECORDED = 0.15, 0.36
KERNEL = 650_000  # bytes that a product of one shape in bf16 keeps on a CPU, code and all (docs/log.md, likewise)
BYTES_TRAINED = 20  # of a trained number in fp32: itself, its gradient, AdamW's two moments, the best so far
RECOMPUTING = 1.33  # time of a step with checkpointing: three passes through the frozen products instead of two
_SMALLER = 1.05  # time of a step in micro-batches of half the size: smaller products are less efficient; an estimate
_MOST_COLLATED = 32  # micro-batches looked at, of the longest
_SHORTER = (0.75, 0.5, 0.25, 0.125)  # of the longest row: lengths that are tried as a suggestion
_FEWER_BITS = ("int8", "nf4")  # ways to hold a base that are tried as a suggestion, the nearest to the original first


class NotTraceableError(ModelError):
    """A model whose memory cannot be told without running it."""


class _Tried(NamedTuple):
    memory: Memory
    eval_batch_tokens: int
    rows: int  # that go through the model at once, at most
    micro_batches: int  # of a step, at most


class Planner:
    """A skeleton of the model with the adapter attached, on which settings are tried.

    Args:
        config: with `dtype`, `quantize` and `device` resolved.
        train: training rows.
        valid: validation rows; may be none.

    Raises:
        ModelError: the model cannot be found, or is of no class that transformers knows.
        TargetError: the adapter's config names what is not in the model.
        ConfigError: `frozen_products` or `cache_trunk` is not for this model.
        NotTraceableError: its operations need numbers.
    """

    def __init__(self, config: TrainConfig, train: Sequence[Example], valid: Sequence[Example] = ()) -> None:
        self.config, self.train, self.valid = config, train, valid
        self.model = load_skeleton(config.model).to(machine.DTYPES[config.dtype])
        self.parameters = sum(p.numel() for p in self.model.parameters())
        self.weights = weights_size(self.model, config.model, config.quantize, machine.DTYPES[config.dtype])
        full = config.method == "full"
        handle = None if full else attach(self.model, config.lora, prompt=config.prompt, check_base=False)
        self.model.to("meta")
        self.first = first_tokens(self.model)  # of every row
        self.trained = sum(p.numel() for p in self.model.parameters() if p.requires_grad)
        self.fixed = (
            sum(t.numel() for name in handle.names for t in handle.fixed_tensors(name).values()) if handle else 0
        )
        self.encoded = _saved_otherwise(self.model)
        # trained weights are counted as weights
        self.adapter = (BYTES_TRAINED - 4 * full) * self.trained + 4 * self.fixed
        self.weights += products_bytes(self.model, config.frozen_products)
        self.on_cpu = torch.device(config.device).type == "cpu"
        self.process = machine.resident_memory() + LOADED_LATER if self.on_cpu else CUDA_CONTEXT
        self.trunk = 0
        if config.cache_trunk != "off":
            trunk = trunk_of(self.model, (*train, *valid))
            self.trunk = trunk.nbytes if config.cache_trunk == "memory" and self.on_cpu else 0
        self._tried: dict[tuple[int, bool], _Tried] = {}

    def plan(self, limit: int | None) -> RunPlan:
        """What the run will take, and settings with which it takes at most `limit` bytes."""
        asked, chosen, fitting = self.asked(), self.chosen(limit), self.fitting(limit)
        steps = Plan.of(chosen.applied(self.config), self.train)
        with ready(self.model, self._context) as share:
            batches = [collated(self.model, self.train, rows, share=share) for rows in _spread(steps)]
        read = sum(len(batch.ids) for batch in batches)
        rows = [row for batch in batches for row in batch.rows]
        return RunPlan(
            parameters=self.parameters,
            trained=self.trained,
            adapter_bytes=4 * (self.trained + self.fixed) + self.encoded,  # in fp32, as they are trained
            steps=steps.total_steps,
            tokens=round(steps.tokens),
            computed=read / sum(len(self.first) + len(self.train[row].ids) for row in rows),
            memory=self.memory(chosen.micro_batch_tokens, checkpointing=chosen.gradient_checkpointing),
            limit=limit,
            asked=asked,
            chosen=chosen,
            fitting=tuple(fitting),
            suggestions=() if limit is None else tuple(self.suggestions(limit)),
        )

    @property
    def longest(self) -> int:
        """Tokens of the longest row."""
        return max(len(example.ids) for example in (*self.train, *self.valid))

    @property
    def _context(self) -> int:
        """Places of the longest row, virtual tokens included."""
        return self.config.prompt.in_context + self.longest

    @property
    def left_open(self) -> bool:
        """Whether the config leaves it to the plan to find settings that fit."""
        return self.config.batch_size == "auto" or self.config.gradient_checkpointing == "auto"

    def asked(self) -> Setting:
        """The settings of the config, without checkpointing if that is left open."""
        return self._setting(self._most_tokens(), checkpointing=self.config.gradient_checkpointing == "on")

    def chosen(self, limit: int | None) -> Setting:
        """The settings asked for, or where they do not fit and the config leaves it open, the fastest that do."""
        asked = self.asked()
        if limit is None or asked.peak <= limit or not self.left_open:
            return asked
        return next(iter(self.fitting(limit)), asked)

    def fitting(self, limit: int | None) -> list[Setting]:
        """Settings that take at most `limit` bytes, the fastest first; with and without checkpointing, if that is left
        open, in the largest micro-batches that fit.
        """
        return sorted(self._fitting(limit), key=lambda setting: setting.time)

    def suggestions(self, limit: int) -> Iterator[Suggestion]:
        """Where nothing fits without checkpointing, a base in fewer bits that would; where nothing fits at all, also
        half the bytes a number, or rows cut shorter (to the longest of a few lengths).
        """
        fitting = self.fitting(limit)
        if any(not setting.gradient_checkpointing for setting in fitting):
            return
        for way in self._fewer_bits():
            best = next(iter(self._otherwise(quantize=way).fitting(limit)), None)
            if best is not None and not (fitting and best.gradient_checkpointing):
                yield Suggestion(flag="quantize", value=way, rows_cut=0, setting=best)
        if fitting:
            return
        if self.config.dtype == "fp32" and self.config.method != "full":
            for setting in self._otherwise(dtype="bf16").fitting(limit)[:1]:
                yield Suggestion(flag="dtype", value="bf16", rows_cut=0, setting=setting)
        for share in _SHORTER:
            length = int(share * self.longest)
            for setting in self._with_rows_cut(length).fitting(limit)[:1] if length >= 2 else ():
                cut = sum(len(example.ids) > length for example in self.train)
                yield Suggestion(flag="max_length", value=length, rows_cut=cut, setting=setting)
                return

    def memory(self, micro_batch_tokens: int, *, checkpointing: bool) -> Memory:
        """What a run with these settings takes."""
        return self._try(micro_batch_tokens, checkpointing).memory

    def _try(self, micro_batch_tokens: int, checkpointing: bool) -> _Tried:
        key = (micro_batch_tokens, checkpointing)
        if key not in self._tried:
            steps = list(Plan.of(self.config.replace(micro_batch_tokens=micro_batch_tokens), self.train).epoch())
            groups = [rows for step in steps for rows in step]
            step = self._trace(groups, checkpointing)
            evaluation, eval_batch_tokens = self._trace_evaluation(micro_batch_tokens, step.peak)
            memory = Memory(
                process=self.process,
                held=self._held(step) if self.on_cpu else 0,
                weights=self.weights,
                adapter=self.adapter,
                trunk=self.trunk,
                training=step.peak,
                activations=step.kept,
                logits=step.logits,
                evaluation=evaluation,
            )
            rows, micro_batches = max(map(len, groups)), max(map(len, steps))
            self._tried[key] = _Tried(memory, eval_batch_tokens, rows, micro_batches)
        return self._tried[key]

    def _held(self, step: Traced) -> int:
        kernels = 0
        if self.config.dtype == "bf16":  # each micro-batch has its own number of tokens
            kernels = min(machine.MOST_KERNELS, step.products * Plan.of(self.config, self.train).total_steps)
        return round(SCATTERED * step.freed + SCATTERED_RECORDED * step.freed_recorded) + KERNEL * kernels

    def _most_tokens(self) -> int:
        """The largest micro-batch worth trying. Where batch_size is auto and the device a GPU, a whole step; a CPU is
        no faster with more than the default at once.
        """
        asked = self.config.micro_batch_tokens
        if self.config.batch_size != "auto" or self.on_cpu:
            return asked
        steps = Plan.of(self.config, self.train).epoch()
        return max(asked, *(sum(len(self.train[row].ids) for rows in step for row in rows) for step in steps))

    def _fitting(self, limit: int | None) -> Iterator[Setting]:
        if limit is not None and self.process + self.weights + self.adapter + self.trunk > limit:
            return
        longest = max(len(example.ids) for example in self.train)
        for checkpointing in {"on": (True,), "off": (False,), "auto": (False, True)}[
            self.config.gradient_checkpointing
        ]:
            tokens, halved = self._most_tokens(), 0
            while True:
                setting = self._setting(tokens, checkpointing=checkpointing, halved=halved)
                if limit is None or setting.peak <= limit:
                    yield setting
                    break
                if tokens <= longest:
                    break
                tokens, halved = max(longest, tokens // 2), halved + 1

    def _setting(self, tokens: int, *, checkpointing: bool, halved: int = 0) -> Setting:
        memory, eval_batch_tokens, rows, micro_batches = self._try(tokens, checkpointing)
        return Setting(
            micro_batch_tokens=tokens,
            gradient_checkpointing=checkpointing,
            eval_batch_tokens=eval_batch_tokens,
            rows=rows,
            micro_batches=micro_batches,
            peak=memory.peak,
            passing=memory.passing,
            time=(RECOMPUTING if checkpointing else 1.0) * _SMALLER**halved,
        )

    def _fewer_bits(self) -> tuple[str, ...]:
        """Other ways to hold the base, none where it is held in few bits already or all of it is trained."""
        config = self.config
        if config.quantize != "none" or config.method == "full" or config.frozen_products != "exact":
            return ()
        return ("blocks",) if blocks_of(config.model) else _FEWER_BITS

    def _otherwise(self, **changes: Any) -> Planner:
        """The same with other settings."""
        other = Planner(self.config.replace(**changes), self.train, self.valid)
        other.process = self.process  # which has grown by what planning took
        return other

    def _with_rows_cut(self, length: int) -> Planner:
        """The same with rows of at most `length` tokens: their last ones, where answers are."""

        def cut(example: Example) -> Example:
            ids, trained = example.ids[-length:], example.trained[-length:]
            return replace(example, ids=ids, trained=[False, *trained[1:]]) if len(example.ids) > length else example

        shorter = copy.copy(self)
        shorter.train, shorter.valid = [cut(e) for e in self.train], [cut(e) for e in self.valid]
        shorter._tried = {}
        return shorter

    def _trace(self, groups: Sequence[Sequence[int]], checkpointing: bool) -> Traced:
        batch = self._heaviest(groups)
        try:
            checkpoint_activations(self.model, on=checkpointing, again=AsOnDevices)
            with _tracing(self.model):
                return trace_step(self.model, batch, self._context)
        finally:
            checkpoint_activations(self.model, on=False)

    def _trace_evaluation(self, micro_batch_tokens: int, step_peak: int) -> tuple[int, int]:
        """What an evaluation takes, and with how many tokens at once: as in steps, unless the config says how many or
        that takes more than a step; then fewer, down to the longest row.
        """
        lengths = [len(example.ids) for example in self.valid]
        tokens = self.config.eval_batch_tokens or micro_batch_tokens
        if not lengths:
            return 0, tokens
        while True:
            peak = self._evaluation_peak(lengths, tokens)
            if peak <= step_peak or tokens <= max(lengths) or self.config.eval_batch_tokens is not None:
                return peak, tokens
            tokens = max(max(lengths), min(tokens, sum(lengths)) // 2)

    def _evaluation_peak(self, lengths: Sequence[int], tokens: int) -> int:
        groups = plan_evaluation(lengths, micro_batch_tokens=tokens)
        heaviest = max(groups, key=lambda rows: sum(lengths[row] for row in rows))
        with packed_attention(self.model, self._context) as packs:
            batch = collated(self.model, self.valid, heaviest, share=packs)
        with _tracing(self.model):
            return trace_evaluation(self.model, batch, self._context).peak

    def _heaviest(self, groups: Sequence[Sequence[int]]) -> Batch:
        """Of micro-batches, the one of which most goes through the model."""
        by_length = sorted(groups, key=lambda rows: -sum(len(self.train[row].ids) for row in rows))
        with ready(self.model, self._context) as share:
            batches = [collated(self.model, self.train, rows, share=share) for rows in by_length[:_MOST_COLLATED]]
        return max(batches, key=lambda batch: len(batch.ids))


def _saved_otherwise(model: Any) -> int:
    """Bytes by which a soft prompt's file is larger than what is trained of it: what an encoder makes is saved, and it
    is not.
    """
    prompt = soft_prompt_of(model)
    return 0 if prompt is None else 4 * (prompt().numel() - sum(p.numel() for p in prompt.parameters()))


@contextlib.contextmanager
def _tracing(model: Any) -> Iterator[None]:
    try:
        yield
    except (NotImplementedError, RuntimeError, ValueError, TypeError) as error:
        raise NotTraceableError(f"{type(model).__name__} cannot be traced: {error}") from error


def _spread(steps: Plan) -> list[list[int]]:
    """Micro-batches of the first epoch, evenly spread, at most `_MOST_COLLATED`."""
    groups = [rows for step in steps.epoch() for rows in step]
    return groups[:: math.ceil(len(groups) / _MOST_COLLATED)]
