"""Settings of a training run: `TrainConfig`. Imports no torch, so `lorakit train --help` is quick."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import ClassVar, Literal

from lorakit.adapter.config import LoRAConfig
from lorakit.config import Config


@dataclass(frozen=True, kw_only=True)
class TrainConfig(Config):
    """Everything that determines a run. `run.yaml` in the run folder is this, fully resolved."""

    aliases: ClassVar[Mapping[str, str]] = {
        "num_train_epochs": "epochs",
        "per_device_train_batch_size": "batch_size",
        "lr": "learning_rate",
        "lr_scheduler_type": "schedule",
        "max_grad_norm": "clip",
        "max_seq_length": "max_length",
        "cutoff_len": "max_length",
        "model_name_or_path": "model",
        "output_dir": "output",
        "valid": "validation",
        "lora_config": "lora",
    }

    model: str
    """Base model: Hub id, folder, .gguf file, or the alias smollm2."""

    data: str
    """Training rows: a .jsonl, .json, .csv, .parquet or .txt file, or a Hub data set id."""

    output: str
    """Run folder to create."""

    validation: str | None = None
    """Validation rows; None holds out `validation_share` of the training rows."""

    validation_share: float = 0.05
    """Share of rows held out when no validation file is given (at most 500 rows, at least 1)."""

    lora: LoRAConfig = field(default_factory=lambda: LoRAConfig(r=8))
    """The adapter. Rank 8, where LoRAConfig has 16: half the file for nearly the same result."""

    epochs: float = 1.0
    """Passes over the training rows."""

    max_steps: int | None = None
    """Optimiser steps; overrides `epochs`."""

    batch_size: int = 16
    """Rows per optimiser step and process, times `gradient_accumulation_steps`."""

    gradient_accumulation_steps: int = 1
    """Multiplies `batch_size`; the gradient is the mean over all labelled tokens of the step, however they are
    divided.
    """

    micro_batch_tokens: int = 4096
    """Tokens that go through the model at once: a step of more is divided. Bounds memory; changes results by rounding
    only.
    """

    max_length: int = 1024
    """Longest row in tokens; longer rows are cut so that labels remain, and counted."""

    learning_rate: float | None = None
    """Peak learning rate of AdamW; None: 1.2 / the model's width, at most 3e-3 (SmolLM2-135M: 2.1e-3, width
    4096: 2.9e-4)."""

    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    """Course of the learning rate after warm-up: to zero along a cosine or a line, or constant."""

    warmup: float = 0.03
    """Share of the steps over which the learning rate rises from zero."""

    weight_decay: float = 0.0
    """AdamW's decoupled weight decay on the adapter's tensors."""

    adam_beta1: float = 0.9
    """AdamW's first decay rate."""

    adam_beta2: float = 0.999
    """AdamW's second decay rate."""

    adam_epsilon: float = 1e-8
    """AdamW's denominator floor."""

    clip: float = 1.0
    """Largest gradient norm; 0 turns clipping off."""

    dtype: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    """Storage and arithmetic of the base; the adapter is fp32. auto: what a probe of this machine finds fastest and
    safe.
    """

    device: str = "auto"
    """auto, cpu, cuda, cuda:1, mps."""

    train_on: Literal["assistant", "all"] = "assistant"
    """Which tokens carry loss: assistant turns with their end token, or every token."""

    chat_template: str = "auto"
    """auto: the tokenizer's own; a template lorakit ships (see lorakit check --help); a Jinja file; none: no
    template.
    """

    eval_steps: int | None = None
    """Steps between evaluations; None: eight times a run, less often (at least twice) where that would take more than a
    tenth of its time."""

    save_steps: int | None = None
    """Steps between checkpoints; None: as `eval_steps` where that is given, else eight times a run."""

    keep_checkpoints: int = 2
    """Newest checkpoints kept (at least 2, so that a damaged one has an elder)."""

    early_stop: int | None = None
    """Stop after this many evaluations without a better validation loss."""

    samples: int = 4
    """Validation rows whose answers before and after training go into the report."""

    seed: int = 0
    """Determines every draw of the run."""

    resume: bool = False
    """Continue the run in `output` from its newest sound checkpoint."""

    def problems(self) -> list[str]:
        """Ranges."""
        least = {"batch_size": 1, "gradient_accumulation_steps": 1, "micro_batch_tokens": 1, "max_length": 2}
        least |= {"keep_checkpoints": 2, "samples": 0, "weight_decay": 0, "clip": 0}
        least |= {n: 1 for n in ("max_steps", "eval_steps", "save_steps", "early_stop") if getattr(self, n) is not None}
        found = [
            f"{name}: must be at least {minimum} (got {getattr(self, name)})"
            for name, minimum in least.items()
            if getattr(self, name) < minimum
        ]
        found += [
            f"{name}: must be positive (got {getattr(self, name)})"
            for name in ("epochs", "learning_rate", "adam_epsilon")
            if getattr(self, name) is not None and not 0 < getattr(self, name) < math.inf
        ]
        found += [
            f"{name}: must be in [0, 1) (got {getattr(self, name)})"
            for name in ("warmup", "validation_share", "adam_beta1", "adam_beta2")
            if not 0 <= getattr(self, name) < 1
        ]
        return found
