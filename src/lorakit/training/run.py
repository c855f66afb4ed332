"""A whole run, from a config to a verified adapter in a run folder. Knows the order of things, and does none itself.

What can fail cheaply fails first: settings, run folder, data. Then the model is loaded, the adapter attached and
trained, and nothing is called done before the base is proved unchanged and the saved adapter has been read back.
"""

from __future__ import annotations

import contextlib
import itertools
import re
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from lorakit import machine
from lorakit.adapter import fingerprint
from lorakit.adapter.config import FOUND_OUT, LoRAConfig
from lorakit.adapter.starts import Starts, starts_from_data, starts_in
from lorakit.core.layer import base_parameters
from lorakit.data.batches import Batch, collate
from lorakit.data.chat import ChatFormat, Example
from lorakit.data.prepare import Data, read_data
from lorakit.errors import ConfigError, RunError, bullet_list
from lorakit.files import (
    JsonLines,
    free_folder,
    locked_folder,
    remove_leftovers,
    write_json,
    write_text,
)
from lorakit.models import load_model, load_tokenizer, stop_ids
from lorakit.originals import refuse_storage, starts_from_original
from lorakit.packing import packed_logits
from lorakit.report import write_report
from lorakit.training.checkpoint import Checkpoint, load_newest
from lorakit.training.config import TrainConfig
from lorakit.training.events import DataReady, ModelReady, OnEvent, Phase, Resumed
from lorakit.training.identity import differences, identity_of, machine_changes
from lorakit.training.invocation import invocation_line, with_invocation
from lorakit.training.loop import Fitted, Plan, fit, ready, restore_tensors
from lorakit.training.objectives import Predictions
from lorakit.training.optim import default_learning_rate
from lorakit.training.products import refuse_products
from lorakit.training.recomputing import checkpoint_activations
from lorakit.training.samples import Samples, sample_prompts
from lorakit.training.settings import as_begun, made_to_fit, resolved, with_whole_paths
from lorakit.training.subject import Subject, TrainedAdapter, subject_of
from lorakit.version import __version__

_CONTENTS = (
    "run.yaml",
    "metrics.jsonl",
    "data.json",
    "samples.json",
    "result.json",
    "report.html",
    "best",
    "last",
    "checkpoints",
)


@dataclass(frozen=True, kw_only=True)
class Run:
    """What a run came to."""

    directory: str
    adapter: str | None
    """Folder of the best adapter; None where an interrupted run has none yet, and for method full."""

    model: str | None
    """Method full: folder of the best model."""

    interrupted: bool
    stopped_early: bool
    step: int
    total_steps: int
    initial_loss: float | None
    """Validation loss per token of the base model alone."""

    best_loss: float | None
    """Validation loss per token of the best adapter."""

    best_step: int | None
    final_loss: float | None
    """Validation loss per token at the newest evaluation."""

    train_loss: float | None
    """Training loss per token of the last step."""

    seconds: float
    """Time spent in steps."""

    tokens: int
    """Tokens that went through the model in steps."""

    peak_memory: int | None
    """Most bytes that the process held; on a GPU, that torch's tensors took. None where the system does not tell."""

    parameters: int
    trained_parameters: int
    adapted_layers: int
    """Layers with a low-rank update; 0 for a soft prompt alone, and for method full."""

    virtual_tokens: int
    """Of a soft prompt."""

    adapter_bytes: int | None
    model_bytes: int | None
    dtype: str
    storage: str
    """How the base was held: "none" (in `dtype`), or in which format."""

    device: str
    report: str
    lorakit_version: str

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return asdict(self)


def train(config: TrainConfig, on_event: OnEvent | None = None) -> Run:
    """Train an adapter on a data file and leave it, verified, in a run folder.

    Args:
        config: everything that determines the run; `resume=True` goes on with the run in `output`; without `output` the
            run gets a new folder under runs/ (`Run.directory`).
        on_event: told what happens (`lorakit.training.events`).

    Raises:
        DataError: the rows cannot be read, or would train nothing or the wrong thing.
        RunError: the run folder is in use, holds another run, or cannot be resumed with this config.
        ModelError: the base cannot be found or read.
        TargetError: the adapter's config names what is not in the model.
        ConfigError: this machine or model cannot multiply as `frozen_products` says.
        NonFiniteLossError: the loss or gradient is no longer finite.
    """
    folder = _new_folder(config.data) if config.output is None else Path(config.output).expanduser()
    config = config.replace(output=str(folder))
    with locked_folder(folder):
        if config.resume:
            config = as_begun(config, folder)
        else:
            _refuse_used(folder)
        return _train(config, folder, on_event or (lambda event: None))


def _train(config: TrainConfig, folder: Path, on_event: OnEvent) -> Run:
    device = machine.resolve_device(config.device)
    refuse_products(config.frozen_products, device, machine.resolve_dtype(config.dtype, device))
    on_event(Phase("reading the data"))
    data = read(config)
    chat = data.chat_format
    train_examples, valid_examples = data.train.examples, data.valid.examples
    config, lines = with_invocation(config), data.lines()
    if tokens := config.lora.alora_invocation_tokens:
        lines = (*lines, invocation_line(tokens, chat.tokenizer, train_examples))
    on_event(DataReady(len(data.train.rows), len(data.valid.rows), lines))
    plan = Plan.of(config, train_examples)
    config = resolved(config, device, plan, sum(len(example.ids) for example in valid_examples))
    refuse_storage(config.lora.init, config.quantize, config.loftq_original)
    config, passing = made_to_fit(config, data, on_event)

    on_event(Phase("loading the model"))
    machine.keep_few_kernels()
    machine.keep_freed_memory()
    model, _ = load_model(config.model, config.dtype, config.device, config.quantize)
    if config.learning_rate is None:
        width = model.get_input_embeddings().weight.shape[1]
        config = config.replace(learning_rate=default_learning_rate(width, full=config.method == "full"))
    checkpoint_activations(model, on=config.gradient_checkpointing == "on")
    base = fingerprint.of(model, list(base_parameters(model).items()))
    identity = identity_of(config, train_examples, valid_examples, chat.template, base, device)
    checkpoint = _checkpoint(folder, identity, on_event) if config.resume else None
    _refuse_long_rows(config, model, (*train_examples, *valid_examples))
    beginning = _beginning(config, model, plan, train_examples, checkpoint, on_event)
    subject = subject_of(model, config, beginning, chat.tokenizer)
    about = subject.ready(config)
    on_event(about)

    write_text(folder / "run.yaml", with_whole_paths(config, folder).to_yaml())
    write_json(folder / "data.json", data.statistics())
    samples = Samples(
        folder / "samples.json", model, chat, sample_prompts(config.samples, data, chat, model), passing // 2
    )
    with subject.untrained():
        samples.take("before", on_event)

    def save_best() -> None:
        subject.save(folder / "best", chat.tokenizer)

    if config.resume:  # what lies there may be of later steps than the checkpoint
        shutil.rmtree(folder / "best", ignore_errors=True)
    if checkpoint is not None and checkpoint.best:
        restore_tensors(subject.tensors, checkpoint.best)
        restore_tensors(subject.fixed, checkpoint.fixed)
        save_best()
    with _out_of_memory_told(config, folder, train_examples):
        fitted = fit(
            model,
            subject.tensors,
            train_examples,
            valid_examples,
            config,
            folder=folder,
            identity=identity,
            fixed=subject.fixed,
            output_side=subject.output_side,
            prompt_side=subject.prompt_side,
            checkpoint=checkpoint,
            on_event=on_event,
            on_best=save_best,
            untrained=subject.untrained if subject.changes_at_once else None,
        )
    if not subject.check_base():
        raise RunError(
            f"{folder}: the base model's weights changed during training, so this adapter fits no base; discard it"
        )
    if not fitted.interrupted:
        subject.save(folder / "last", chat.tokenizer)
        _put_best_in_place(fitted, subject, folder / "best")
        samples.take("after", on_event)
    result = _result(folder, fitted, about, subject, plan.total_steps)
    write_json(folder / "result.json", result.to_dict())
    write_report(folder)
    return result


# ---------------------------------------------------------------- data and folder


def read(config: TrainConfig) -> Data:
    """The rows of a run, through the gate.

    Raises:
        DataError: they cannot be read, or would train nothing or the wrong thing.
        ModelError: the base has no tokenizer here.
    """
    tokenizer = load_tokenizer(config.model)
    chat = ChatFormat(tokenizer, stop_ids(None, tokenizer), config.max_length, config.chat_template, config.train_on)
    return read_data(
        config.data, config.validation, config.validation_share, config.seed, chat, token_cache=config.token_cache
    )


def _new_folder(data: str) -> Path:
    """runs/data-1 for data.jsonl, owner/data and the like, or the first such number that is free."""
    name = re.sub(r"[^\w.-]+", "-", Path(data).stem) or "run"
    return free_folder(Path("runs") / f"{name}-1")


@contextlib.contextmanager
def _out_of_memory_told(config: TrainConfig, folder: Path, train: Sequence[Example]) -> Iterator[None]:
    """Memory that ran out becomes a word on what to change, and to what.

    Raises:
        RunError: memory ran out.
    """
    try:
        yield
    except (MemoryError, RuntimeError) as error:  # torch's for a GPU is a RuntimeError, as is its CPU allocator's
        if not (
            isinstance(error, MemoryError | torch.OutOfMemoryError)
            or re.search(r"DefaultCPUAllocator|out of memory", str(error))
        ):
            raise
        longest = max(len(example.ids) for example in train)
        ways = []
        if config.gradient_checkpointing != "on":
            ways.append("--gradient-checkpointing on (a third more time)")
        if config.micro_batch_tokens > longest:
            ways.append(f"--micro-batch-tokens {max(longest, config.micro_batch_tokens // 2)}")
        ways.append(f"--max-length {longest // 2} (which cuts the longest rows)")
        raise RunError(
            f"{folder}: memory ran out ({str(error).splitlines()[0]}). Start again in another folder with "
            f"{', or '.join(ways)}; lorakit plan shows what takes how much"
        ) from error


def _refuse_used(folder: Path) -> None:
    """A new run never touches an old one.

    Raises:
        RunError: the folder holds a run.
    """
    found = [name for name in _CONTENTS if (folder / name).exists()]
    if found:
        raise RunError(
            f"{folder} holds another run ({', '.join(found)}). "
            f"Go on with it (lorakit train --resume --output {folder}), or choose another output folder."
        )


def _checkpoint(folder: Path, identity: dict[str, Any], on_event: OnEvent) -> Checkpoint | None:
    """The checkpoint to go on from; None, where a run was killed before its first one, begins at the first step.

    Raises:
        RunError: the run was begun with other settings, data or base; says which.
    """
    remove_leftovers(folder)
    checkpoint, then, damaged = load_newest(folder / "checkpoints")
    if checkpoint is None:
        on_event(Resumed(0))
        return None
    if reasons := differences(then, identity):
        raise RunError(
            f"{folder}: cannot go on, the run was begun with something else:\n{bullet_list(reasons)}\n"
            "Resume with what it was begun with (lorakit train --resume --output DIR takes all of it from run.yaml), "
            "or start a new run in another output folder."
        )
    on_event(Resumed(checkpoint.cursor.step, tuple(damaged), machine_changes(then, identity)))
    return checkpoint


def _refuse_long_rows(config: TrainConfig, model: Any, examples: Sequence[Example]) -> None:
    """Rows must fit into the model's context with the virtual tokens before them.

    Raises:
        ConfigError: the longest does not.
    """
    virtual, context = config.prompt.in_context, getattr(model.config, "max_position_embeddings", None)
    longest = max(len(example.ids) for example in examples)
    if virtual and context is not None and virtual + longest > context:
        raise ConfigError(
            f"virtual_tokens: {virtual:,} and the longest row, {longest:,} tokens, are more than the model's context "
            f"of {context:,}; set fewer, or max_length to {max(2, context - virtual)}"
        )


# ---------------------------------------------------------------- what was trained, and its samples


def _beginning(
    config: TrainConfig,
    model: Any,
    plan: Plan,
    examples: Sequence[Example],
    checkpoint: Checkpoint | None,
    on_event: OnEvent,
) -> LoRAConfig | Starts:
    """What the run begins with: its config, or what its first rows or the base's original say; a run that goes on has
    that in its checkpoint.
    """
    if config.lora.init not in FOUND_OUT:
        return config.lora
    if checkpoint is not None:
        return starts_in(checkpoint.adapter | checkpoint.fixed, config.lora, model)
    if config.lora.init == "loftq":
        on_event(Phase("init loftq: reading what was quantised"))
        return starts_from_original(model, config.lora, config.loftq_original, seed=config.seed)
    on_event(Phase(f"init {config.lora.init}: looking at the first rows"))
    micro_batches = [rows for step in itertools.islice(plan.steps(0), config.init_steps) for rows in step]
    batches = [collate(examples, rows).to(next(model.parameters()).device) for rows in micro_batches]
    tokens = sum(len(batch.targets) for batch in batches)

    def loss(model: torch.nn.Module, batch: Batch) -> torch.Tensor:  # the mean of batches is that over tokens
        return Predictions.of(model, batch).loss_sum() * (len(batches) / tokens)

    with ready(model, max(len(example.ids) for example in examples)):
        return starts_from_data(model, config.lora, batches, loss=loss, forward=packed_logits, seed=config.seed)


def _put_best_in_place(fitted: Fitted, subject: Subject, saved: Path) -> None:
    """Give the model the best of what was trained, and prove that what was saved is that.

    Raises:
        RunError: it is not, or no step changed anything.
        AdapterFileError: what was saved cannot be read back.
    """
    if not fitted.best:
        raise RunError(
            f"{saved.parent}: none of the {fitted.cursor.step} steps changed anything (all were skipped by fp16 "
            "scaling): use --dtype fp32 or bf16, or more steps"
        )
    restore_tensors(subject.tensors, fitted.best)
    if not subject.check_saved(saved):
        raise RunError(f"{saved}: what was read back is not the best of this run")


# ---------------------------------------------------------------- what is told


def _result(folder: Path, fitted: Fitted, about: ModelReady, subject: Subject, total_steps: int) -> Run:
    cursor = fitted.cursor
    rows = JsonLines(folder / "metrics.jsonl").rows()
    best = folder / "best" if fitted.best else None
    of_adapter = isinstance(subject, TrainedAdapter)
    return Run(
        directory=str(folder),
        adapter=str(best) if best and of_adapter else None,
        model=str(best) if best and not of_adapter else None,
        interrupted=fitted.interrupted,
        stopped_early=fitted.stopped_early,
        step=cursor.step,
        total_steps=total_steps,
        initial_loss=cursor.initial_loss,
        best_loss=cursor.best_loss,
        best_step=cursor.best_step,
        final_loss=next((row["eval_loss"] for row in reversed(rows) if "eval_loss" in row), None),
        train_loss=next((row["loss"] for row in reversed(rows) if "loss" in row), None),
        seconds=cursor.seconds,
        tokens=cursor.tokens,
        peak_memory=machine.peak_memory(about.device),
        parameters=about.parameters,
        trained_parameters=about.trained,
        adapted_layers=about.layers,
        virtual_tokens=about.virtual_tokens,
        adapter_bytes=subject.saved_bytes(best) if best and of_adapter else None,
        model_bytes=subject.saved_bytes(best) if best and not of_adapter else None,
        dtype=about.dtype,
        storage=about.storage,
        device=about.device,
        report=str(folder / "report.html"),
        lorakit_version=__version__,
    )
