"""The training loop: from examples and an attached adapter to a trained one. Knows no tokenizer and no display.

Every draw is a function of integers: the order of rows of (seed, epoch), dropout of (seed, step, micro-batch). So the
loop can stop after any step and go on in another process, and the result is bit for bit that of the loop that never
stopped.
"""

from __future__ import annotations

import hashlib
import itertools
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from collections.abc import Set as AbstractSet
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch

from lorakit.adapter.in_use import virtual_tokens
from lorakit.data.batches import plan_steps
from lorakit.data.chat import Example
from lorakit.errors import NonFiniteLossError, RunError, bullet_list
from lorakit.files import JsonLines
from lorakit.fusion import fused
from lorakit.machine import resolve_dtype
from lorakit.packing import collated, has_dropout, packed_attention
from lorakit.training.checkpoint import Checkpoint, Cursor, save_checkpoint
from lorakit.training.config import FrozenProducts, TrainConfig
from lorakit.training.events import Checkpointed, Evaluated, OnEvent, Phase, StepDone, TrunkKept
from lorakit.training.gradients import Gradients
from lorakit.training.interrupt import stop_request
from lorakit.training.objectives import Predictions, mean_loss
from lorakit.training.optim import (
    clip_gradients,
    learning_rate,
    make_optimizer,
    make_scaler,
    optimizer_tensors,
    restore_optimizer,
    set_learning_rate,
)
from lorakit.training.products import frozen_products
from lorakit.training.trunk import kept_trunk, refuse_too_large, trunk_of

MOST_SKIPPED_STEPS = (
    20  # in a row, by the fp16 scaler: from 65,536 its scale is then below 0.1, so scaling is not what is wrong
)


@dataclass(frozen=True)
class Plan:
    """The steps of a run, made epoch by epoch on demand."""

    lengths: tuple[int, ...]
    seed: int
    rows_per_step: int
    micro_batch_tokens: int
    total_steps: int

    @classmethod
    def of(cls, config: TrainConfig, examples: Sequence[Example]) -> Plan:
        """The plan that a config makes of the training examples."""
        total = config.max_steps or math.ceil(config.epochs * math.ceil(len(examples) / config.rows_per_step))
        lengths = tuple(config.prompt.in_rows + len(example.ids) for example in examples)
        return cls(lengths, config.seed, config.rows_per_step, config.micro_batch_tokens, total)

    @property
    def tokens(self) -> float:
        """Tokens of the whole run, if every step were full."""
        return self.total_steps * min(1.0, self.rows_per_step / len(self.lengths)) * sum(self.lengths)

    def epoch(self) -> Iterator[list[list[int]]]:
        """The steps of the first epoch, or of the run where it ends sooner."""
        of_epoch = math.ceil(len(self.lengths) / self.rows_per_step)
        return itertools.islice(self.steps(0), min(of_epoch, self.total_steps))

    def steps(self, first: int) -> Iterator[list[list[int]]]:
        """Steps `first`, `first + 1`, ...: each a list of micro-batches, each a list of example indices."""
        epoch, skip = divmod(first, math.ceil(len(self.lengths) / self.rows_per_step))
        while True:
            steps = plan_steps(
                self.lengths,
                seed=self.seed,
                epoch=epoch,
                batch_size=self.rows_per_step,
                micro_batch_tokens=self.micro_batch_tokens,
            )
            yield from steps[skip:]
            epoch, skip = epoch + 1, 0


@dataclass(frozen=True)
class Fitted:
    """How a loop ended. The model holds the adapter of the last step."""

    cursor: Cursor
    best: dict[str, torch.Tensor]
    interrupted: bool
    stopped_early: bool


def fit(
    model: torch.nn.Module,
    tensors: Mapping[str, torch.nn.Parameter],
    train: Sequence[Example],
    valid: Sequence[Example],
    config: TrainConfig,
    *,
    folder: Path,
    identity: Mapping[str, Any],
    fixed: Mapping[str, torch.Tensor] = MappingProxyType({}),
    output_side: AbstractSet[str] = frozenset(),
    prompt_side: AbstractSet[str] = frozenset(),
    checkpoint: Checkpoint | None = None,
    on_event: OnEvent = lambda event: None,
    on_best: Callable[[], None] = lambda: None,
    untrained: Callable[[], AbstractContextManager[None]] | None = None,
) -> Fitted:
    """Train `tensors` in place.

    A step's loss is the mean over all its labelled tokens, however they are divided into micro-batches. The model is in
    train mode (which turns on the base's own dropout too, as in PEFT) only while a step runs.

    Args:
        model: a causal language model with the adapter attached and active.
        tensors: the trainable tensors by stable names; nothing else is changed.
        train: training rows.
        valid: validation rows.
        config: with `eval_steps` and `save_steps` resolved.
        folder: the run folder; gets `metrics.jsonl` and `checkpoints/`.
        identity: what the run is of, recorded in each checkpoint's manifest.
        fixed: what the adapter holds besides, recorded in each checkpoint.
        output_side: names of tensors that LoRA+ gives a higher rate.
        prompt_side: names of a soft prompt's tensors, which have a rate of their own.
        checkpoint: where to go on; None begins anew.
        on_event: told of each step, evaluation and checkpoint.
        on_best: called while the model holds an adapter better than all before.
        untrained: within it the model is the base; None: it is that before the first step anyway.

    Raises:
        NonFiniteLossError: a loss or gradient is NaN or infinite; names step and rows. Checkpoints stay as they were.
    """
    assert config.eval_steps is not None
    assert config.save_steps is not None
    plan = Plan.of(config, train)
    device = next(model.parameters()).device
    optimizer = make_optimizer(config, tensors, output_side, prompt_side)
    scaler = make_scaler(resolve_dtype(config.dtype, device), device)
    metrics = JsonLines(folder / "metrics.jsonl")
    cursor, best = Cursor(), {}
    if checkpoint is not None:
        cursor, best = checkpoint.cursor, checkpoint.best
        restore_tensors(tensors, checkpoint.adapter)
        restore_tensors(fixed, checkpoint.fixed)
        restore_optimizer(optimizer, tensors, checkpoint.optimizer)
        if cursor.scaler:
            scaler.load_state_dict(cursor.scaler)
    keep_metrics(metrics, cursor)
    saved_step = cursor.step

    def write(row: dict[str, Any]) -> None:
        metrics.append(row)
        cursor.metric_rows += 1

    def save() -> None:
        nonlocal saved_step
        if not all(bool(torch.isfinite(tensor).all()) for tensor in tensors.values()):
            raise NonFiniteLossError(f"the adapter is not finite after step {cursor.step}. {_ADVICE}")
        metrics.sync()
        cursor.scaler = scaler.state_dict()
        state = optimizer_tensors(optimizer, tensors)
        path = save_checkpoint(
            folder / "checkpoints", cursor, tensors, state, best, fixed, identity, config.keep_checkpoints
        )
        saved_step = cursor.step
        on_event(Checkpointed(cursor.step, path))

    steps = plan.steps(cursor.step)
    longest = virtual_tokens(model) + max(len(example.ids) for example in (*train, *valid))
    trunk = _trunk(model, (*train, *valid), config, folder, on_event)
    gradients = Gradients(tensors.values())
    with stop_request() as stop, ready(model, longest, config.frozen_products) as share, trunk, gradients:
        while True:
            at_end = cursor.step == plan.total_steps
            evaluation_due = cursor.step % config.eval_steps == 0 or at_end
            # An interrupted step leaves its evaluation, which can take long, to the run that goes on.
            if evaluation_due and cursor.evaluated_step != cursor.step and not stop:
                on_event(Phase("evaluating"))
                start = time.perf_counter()
                loss, _ = mean_loss(model, valid, micro_batch_tokens=config.evaluation_tokens)
                base = None
                if cursor.step == 0 and untrained is not None:
                    with untrained():
                        base, _ = mean_loss(model, valid, micro_batch_tokens=config.evaluation_tokens)
                better = _take_evaluation(cursor, loss, base)
                if better:
                    _keep(tensors, best)
                    on_best()
                write({"step": cursor.step, "eval_loss": loss} | ({} if base is None else {"base_loss": base}))
                on_event(Evaluated(cursor.step, loss, better, time.perf_counter() - start, base))
            stopped_early = config.early_stop is not None and cursor.evaluations_without_better >= config.early_stop
            ends = at_end or stopped_early or bool(stop)
            if (cursor.step % config.save_steps == 0 or ends) and cursor.step != saved_step:
                save()
            if ends:
                break

            start = time.perf_counter()
            micro_batches = next(steps)
            rate = learning_rate(config, cursor.step, plan.total_steps)
            with gradients.of_step():
                loss = accumulate(model, train, micro_batches, scaler, config.seed, cursor.step, share=share)
            scaler.unscale_(optimizer)
            norm = clip_gradients(tensors, config.clip)
            check_gradient(norm, cursor, scaler, train, micro_batches)
            set_learning_rate(optimizer, rate)
            scaler.step(optimizer)
            torch.autograd.graph.increment_version(list(tensors.values()))  # which the fused optimiser forgets to do
            scaler.update()
            tokens = sum(plan.lengths[i] for indices in micro_batches for i in indices)
            seconds = time.perf_counter() - start

            cursor.step += 1
            cursor.updates += rate > 0 and math.isfinite(norm)
            cursor.tokens += tokens
            cursor.seconds += seconds
            # JSON has no infinity: null says that the fp16 scaler skipped the step.
            row = {"step": cursor.step, "loss": loss, "lr": rate, "grad_norm": norm if math.isfinite(norm) else None}
            if config.loraplus_lr_ratio is not None:
                row["lr_B"] = rate * config.loraplus_lr_ratio
            if config.prompt_ratio != 1.0:
                row["lr_prompt"] = rate * config.prompt_ratio
            write({**row, "tokens": tokens, "seconds": round(seconds, 4)})
            on_event(StepDone(cursor.step, plan.total_steps, loss, rate, tokens, seconds))
    finished = stopped_early or (at_end and cursor.evaluated_step == cursor.step)
    return Fitted(cursor, best, interrupted=not finished, stopped_early=stopped_early and not at_end)


def _trunk(
    model: torch.nn.Module, examples: Sequence[Example], config: TrainConfig, folder: Path, on_event: OnEvent
) -> AbstractContextManager[None]:
    """What `cache_trunk` asks for.

    Raises:
        ConfigError: it cannot be had with this model, or what is to be kept does not fit.
    """
    if config.cache_trunk == "off":
        return nullcontext()
    trunk = trunk_of(model, examples)
    on_disk = folder if config.cache_trunk == "disk" else None
    where = "memory" if on_disk is None else str(folder)
    on_event(TrunkKept(trunk.layers, trunk.tokens, trunk.nbytes, where))
    refuse_too_large(trunk, on_disk)
    on_event(Phase("running the layers below the trained ones once"))
    return kept_trunk(model, examples, folder=on_disk, micro_batch_tokens=config.evaluation_tokens)


_ADVICE = "Lower --learning-rate, or use --dtype fp32; the checkpoints before this step are sound."


@contextmanager
def ready(model: torch.nn.Module, longest: int, products: FrozenProducts = "exact") -> Iterator[bool]:
    """While entered, `model` runs its steps the fast way: packed rows, fast kernels.

    Args:
        model: a causal language model.
        longest: tokens of the longest row that will come.
        products: how frozen weights multiply.

    Yields:
        Whether rows may share what they begin with: the model packs, and draws nothing that each row should have of its
        own.

    Raises:
        ConfigError: frozen weights cannot multiply so.
    """
    with frozen_products(model, products), fused(model), packed_attention(model, longest) as packs:
        yield packs and not has_dropout(model)


def accumulate(
    model: torch.nn.Module,
    examples: Sequence[Example],
    micro_batches: Sequence[Sequence[int]],
    scaler: torch.amp.GradScaler,
    seed: int,
    step: int,
    *,
    share: bool = False,
) -> float:
    """Forward and backward of a step by micro-batches, for the sum of token losses / labelled tokens of the step.

    Args:
        model: inside `ready(model)`; elsewhere it gets its rows one by one.
        examples: all of them.
        micro_batches: which of them, in which groups.
        scaler: of the loss.
        seed: of the run; with `step` and the micro-batch's number it determines dropout.
        step: of the run.
        share: compute once what rows begin with in common; only for a model that packs and draws nothing.

    Returns:
        The step's mean loss per labelled token.
    """
    device = next(model.parameters()).device
    labelled = sum(sum(examples[i].trained) for indices in micro_batches for i in indices)
    sums = []
    was_training = model.training
    model.train()
    try:
        for number, indices in enumerate(micro_batches):
            batch = collated(model, examples, indices, share=share).to(device)
            with seeded(device, seed, step, number):
                loss_sum = Predictions.of(model, batch).loss_sum()
                torch.autograd.backward(scaler.scale(loss_sum / labelled))
            sums.append(loss_sum.detach())
    finally:
        model.train(was_training)
    losses = torch.stack(sums).tolist()  # the only wait for the device in a step
    for loss, indices in zip(losses, micro_batches, strict=True):
        if not math.isfinite(loss):
            rows = bullet_list([str(examples[i].origin) for i in indices])
            raise NonFiniteLossError(f"loss is {loss} at step {step + 1} on rows\n{rows}\n{_ADVICE}")
    return math.fsum(losses) / labelled


def check_gradient(
    norm: float,
    cursor: Cursor,
    scaler: torch.amp.GradScaler,
    examples: Sequence[Example],
    micro_batches: Sequence[Sequence[int]],
) -> None:
    """A non-finite gradient is the fp16 scaler's business, a few times; otherwise training ends."""
    if math.isfinite(norm):
        cursor.skipped_in_a_row = 0
        return
    cursor.skipped_in_a_row += 1
    if scaler.is_enabled() and cursor.skipped_in_a_row <= MOST_SKIPPED_STEPS:
        return
    rows = bullet_list([str(examples[i].origin) for indices in micro_batches for i in indices])
    often = f", {cursor.skipped_in_a_row} steps in a row" if scaler.is_enabled() else ""
    raise NonFiniteLossError(f"the gradient is not finite at step {cursor.step + 1}{often}, on rows\n{rows}\n{_ADVICE}")


@torch.no_grad()
def _keep(tensors: Mapping[str, torch.Tensor], best: dict[str, torch.Tensor]) -> None:
    """Copy tensors to `best`, on the CPU, over those that are there, so that there is one copy at any time."""
    for name, tensor in tensors.items():
        if name in best:
            best[name].copy_(tensor)
        else:
            best[name] = tensor.to("cpu", copy=True)


def _take_evaluation(cursor: Cursor, loss: float, base: float | None = None) -> bool:
    """Note an evaluation in the cursor; whether it is the best of an adapter that has been updated at all.

    Args:
        cursor: of the run.
        loss: of the model as it is.
        base: of the base alone, where that is another before the first step.
    """
    if not math.isfinite(loss):
        raise NonFiniteLossError(f"the validation loss is {loss} after step {cursor.step}. {_ADVICE}")
    cursor.evaluated_step = cursor.step
    if cursor.step == 0:
        cursor.initial_loss = loss if base is None else base
    if cursor.updates == 0:
        return False
    if cursor.best_loss is None or loss < cursor.best_loss:
        cursor.best_loss, cursor.best_step, cursor.evaluations_without_better = loss, cursor.step, 0
        return True
    cursor.evaluations_without_better += 1
    return False


@contextmanager
def seeded(device: torch.device, *numbers: int) -> Iterator[None]:
    """Inside, torch's generators start from a function of `numbers`; afterwards (CPU, CUDA) they are as they were."""
    digest = hashlib.blake2b(repr(numbers).encode(), digest_size=8).digest()
    forked = range(torch.cuda.device_count()) if device.type == "cuda" else ()
    with torch.random.fork_rng(forked):
        torch.manual_seed(int.from_bytes(digest, "big") >> 1)
        yield


@torch.no_grad()
def restore_tensors(tensors: Mapping[str, torch.Tensor], saved: Mapping[str, torch.Tensor]) -> None:
    """Copy saved values into an adapter's tensors.

    Raises:
        RunError: names or shapes differ.
    """
    if set(tensors) != set(saved):
        differing = sorted(set(tensors) ^ set(saved))
        raise RunError(
            f"the checkpoint is of another adapter; tensors in only one of the two: {', '.join(differing[:5])}"
        )
    for name, tensor in tensors.items():
        if tensor.shape != saved[name].shape:
            raise RunError(
                f"the checkpoint's {name} has shape {tuple(saved[name].shape)}, the adapter {tuple(tensor.shape)}"
            )
        tensor.copy_(saved[name])


def keep_metrics(metrics: JsonLines, cursor: Cursor) -> None:
    """Cut metrics.jsonl to the rows that belong to the run up to the cursor.

    Raises:
        RunError: rows are missing.
    """
    rows = metrics.rows()
    if len(rows) < cursor.metric_rows:
        raise RunError(
            f"{metrics.path} holds {len(rows)} rows, the checkpoint of step {cursor.step} was written after "
            f"{cursor.metric_rows}: restore the file, or start anew in another output folder"
        )
    metrics.keep(rows[: cursor.metric_rows])
