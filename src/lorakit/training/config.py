"""Settings of a training run: `TrainConfig`. Imports no torch, so `lorakit train --help` is quick."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Annotated, ClassVar, Literal

import pydantic

from lorakit.adapter.config import LoRAConfig
from lorakit.adapter.prompt_config import PromptConfig
from lorakit.config import Config, DtypeName, Place

# settings of transformers, TRL and axolotl that are none here (several names a line) -> what to do instead
_ADVICE = {
    name: instead
    for names, instead in {
        "bf16": "set dtype to bf16, or leave it at auto",
        "fp16": "set dtype to fp16, or leave it at auto",
        "load_in_4bit bnb_4bit_quant_type": "set quantize to nf4",
        "load_in_8bit": "set quantize to int8",
        "quantization_config": "set quantize to int8 or nf4; a .gguf file keeps its blocks by itself",
        "bnb_4bit_compute_dtype": "set dtype: a quantised base is computed with in it",
        "optim optimizer": "the optimiser is AdamW, set by weight_decay, adam_beta1, adam_beta2 and adam_epsilon",
        "warmup_steps": "set warmup, a share of all steps (0.03)",
        "eval_strategy evaluation_strategy": "set eval_steps, or leave it out",
        "save_strategy": "set save_steps, or leave it out",
        "logging_steps logging_strategy logging_first_step": "every step is logged, in metrics.jsonl",
        "report_to logging_dir wandb_project": "the run folder holds all that is logged: metrics.jsonl, report.html",
        "run_name": "a run is named by its folder: set output",
        "packing sample_packing padding_free pad_to_sequence_len": (
            "rows are always packed, without padding and without leaking into each other"
        ),
        "group_by_length": "rows are packed without padding, so it does not matter which go together",
        "auto_find_batch_size": "set batch_size to auto: as many rows at once as the plan says memory holds",
        "per_device_eval_batch_size": "eval_batch_tokens bounds evaluation; lorakit eval has batch_size",
        "load_best_model_at_end": "the best adapter is always kept, in best/",
        "metric_for_best_model": "the best adapter is the one with the least loss on the validation rows",
        "resume_from_checkpoint": "set resume, and output to the run's folder: it goes on from its newest checkpoint",
        "overwrite_output_dir": "no run is overwritten: set another output, or leave it out for a new folder",
        "do_train do_eval": "lorakit train does both; lorakit eval measures on other rows",
        "train_on_inputs completion_only_loss assistant_only_loss": "set train_on to assistant or all",
        "dataset_text_field dataset_format": "leave it out: rows are told apart by their keys (text, messages, ...)",
        "loraplus_lr_embedding": "leave it out: the factors of embeddings take learning_rate",
        "use_peft": "leave it out, or set method to full",
        "attn_implementation flash_attention": "leave it out: attention is chosen to suit packed rows",
        "deepspeed fsdp": "training on several devices is not in this version",
        "push_to_hub": "not in this version; `hf upload NAME RUN/best` does it",
    }.items()
    for name in names.split()
}


PROMPT_LR_RATIO = 10.0
"""Of a soft prompt without an encoder, where none is given."""

FrozenProducts = Literal["exact", "int8"]

# as transformers and axolotl write it
_SWITCH = pydantic.BeforeValidator(lambda value: {True: "on", False: "off"}.get(value, value))
# as YAML reads a bare off
_FALSE_IS_OFF = pydantic.BeforeValidator(lambda value: "off" if value is False else value)
# as transformers writes "not set"
_MINUS_ONE_IS_NONE = pydantic.BeforeValidator(lambda value: None if type(value) is int and value == -1 else value)


ROWS_PER_STEP = 16  # by default, and where batch_size is auto


def _default_adapter() -> LoRAConfig:
    return LoRAConfig(r=8)


@dataclass(frozen=True, kw_only=True)
class TrainConfig(Config):
    """Everything that determines a run. `run.yaml` in the run folder is this, fully resolved."""

    aliases: ClassVar[Mapping[str, str]] = {
        "num_train_epochs": "epochs",
        "num_epochs": "epochs",
        "per_device_train_batch_size": "batch_size",
        "lr": "learning_rate",
        "lr_scheduler_type": "schedule",
        "lr_scheduler": "schedule",
        "warmup_ratio": "warmup",
        "max_grad_norm": "clip",
        "max_seq_length": "max_length",
        "sequence_len": "max_length",
        "cutoff_len": "max_length",
        "model_name_or_path": "model",
        "base_model": "model",
        "torch_dtype": "dtype",
        "train_file": "data",
        "dataset": "data",
        "dataset_name": "data",
        "output_dir": "output",
        "valid": "validation",
        "validation_file": "validation",
        "eval_file": "validation",
        "val_set_size": "validation_share",
        "save_total_limit": "keep_checkpoints",
        "early_stopping_patience": "early_stop",
        "lora_config": "lora",
        "prompt_config": "prompt",
    }
    advice: ClassVar[Mapping[str, str]] = _ADVICE

    model: Place
    """Base model: Hub id, folder, .gguf file, or the alias smollm2."""

    data: Place
    """Training rows: a .jsonl, .json, .csv, .parquet or .txt file, or a Hub data set id."""

    output: Place | None = None
    """Run folder to create; None: runs/NAME-1, with the name of the data, or the first such number that is free."""

    method: Literal["sft", "full"] = "sft"
    """What is trained, on the mean cross-entropy of `train_on`'s tokens. sft: an adapter. full: every weight of the
    model, in fp32, to compare with; `lorakit extract` makes an adapter of what it came to."""

    validation: Place | None = None
    """Validation rows; None holds out `validation_share` of the training rows."""

    validation_share: float = 0.05
    """Share of rows held out when no validation file is given, above 0 and below 1 (at most 500 rows, at least 1)."""

    lora: LoRAConfig = field(default_factory=_default_adapter)
    """The adapter. Rank 8, where LoRAConfig has 16: half the file for nearly the same result."""

    prompt: PromptConfig = field(default_factory=PromptConfig)
    """A soft prompt, trained with the adapter; with target_modules none, alone."""

    prompt_lr_ratio: float | None = None
    """The learning rate of a soft prompt is this many times `learning_rate`. None: 10, as virtual tokens have far to go
    (docs/soft-prompts.md); 1 with an encoder, whose weights have not."""

    invocation: str | None = None
    """The text with which an activated adapter (aLoRA) is invoked, as it stands in the rows, e.g. the beginning of an
    assistant's turn; its tokens become the adapter's alora_invocation_tokens."""

    init_steps: int = 4
    """For init eva and lora_ga: of how many of the first steps' rows they look at."""

    loftq_original: Place | None = None
    """For init loftq: the dense model that the base was quantised from, where `model` is not it (a .gguf file)."""

    epochs: float = 1.0
    """Passes over the training rows."""

    max_steps: Annotated[int | None, _MINUS_ONE_IS_NONE] = None
    """Optimiser steps; overrides `epochs`. None, or -1: as many as `epochs` takes."""

    batch_size: int | Literal["auto"] = ROWS_PER_STEP
    """Rows per optimiser step and process, times `gradient_accumulation_steps`. auto: 16 a step, which is a statistical
    choice, of which as many go through the model at once as the plan says memory holds (see lorakit plan; on a CPU at
    most `micro_batch_tokens`, which is no slower). The result is that of 16 but for rounding."""

    gradient_accumulation_steps: int = 1
    """Multiplies `batch_size`; the gradient is the mean over all labelled tokens of the step, however they are
    divided.
    """

    micro_batch_tokens: int = 4096
    """Tokens that go through the model at once: a step of more is divided. Bounds memory; changes results by rounding
    only.
    """

    eval_batch_tokens: int | None = None
    """Tokens that go through the model at once in evaluations; None: as `micro_batch_tokens`, or fewer, so that an
    evaluation takes no more memory than a step (see lorakit plan). Changes results by rounding only."""

    gradient_checkpointing: Annotated[Literal["auto", "on", "off"], _SWITCH] = "auto"
    """Keep only what enters each layer and compute the rest again in the backward pass: less memory for a third more
    time. auto: where the run would not fit otherwise (see lorakit plan)."""

    cache_trunk: Annotated[Literal["off", "memory", "disk"], _FALSE_IS_OFF] = "off"
    """Where only upper layers are trained (lora: layers): run the layers below them once for each row, and keep what
    comes out in memory or in the run folder while it runs. Changes results by rounding only."""

    max_length: int = 1024
    """Longest row in tokens; longer rows are cut so that labels remain, and counted."""

    learning_rate: float | None = None
    """Peak learning rate of AdamW; None: 1.2 / the model's width, at most 3e-3 (SmolLM2-135M: 2.1e-3, width
    4096: 2.9e-4), and a tenth of that for method full."""

    loraplus_lr_ratio: float | None = None
    """LoRA+ (arXiv 2402.12354): the learning rate of every B, and of vectors, is this many times that of A; the paper
    says 16, with a lower learning_rate. None: one rate for all."""

    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    """Course of the learning rate after warm-up: to zero along a cosine or a line, or constant."""

    warmup: float = 0.03
    """Share of the steps over which the learning rate rises from zero."""

    weight_decay: float = 0.0
    """AdamW's decoupled weight decay on the adapter's tensors."""

    adam_beta1: float = 0.9
    """AdamW's first decay rate."""

    adam_beta2: float = 0.99
    """AdamW's second decay rate: below torch's 0.999, whose memory of 1,000 steps is longer than most runs here
    (docs/log.md: E2E, defaults)."""

    adam_epsilon: float = 1e-8
    """AdamW's denominator floor."""

    clip: float = 1.0
    """Largest gradient norm; 0 turns clipping off."""

    dtype: DtypeName = "auto"
    """Storage and arithmetic of the base; the adapter is fp32. auto: what a probe of this machine finds fastest and
    safe.
    """

    frozen_products: FrozenProducts = "exact"
    """How frozen weights of adapted layers multiply in training steps: exact, in `dtype`; or int8, in 8-bit integers,
    faster on processors with instructions for it, with errors of 1-2% a layer (docs/int8.md). Evaluations are exact
    always.
    """

    quantize: Literal["auto", "none", "blocks", "int8", "nf4"] = "auto"
    """How the base is held. blocks: a GGUF file's own blocks, never dense as a whole; int8, nf4: linear layers are
    quantised while they are read; none: in `dtype`. auto: blocks of a .gguf file, else none.
    """

    device: str = "auto"
    """auto, cpu, cuda, cuda:1, mps."""

    train_on: Literal["assistant", "all"] = "assistant"
    """Which tokens carry loss: assistant turns with their end token, or every token."""

    chat_template: Place = "auto"
    """auto: the tokenizer's own; a template lorakit ships (see lorakit check --help); a Jinja file; none: no
    template.
    """

    token_cache: bool = True
    """Keep the tokens of large data files in the user's cache folder, and read them from there the next time."""

    eval_steps: int | None = None
    """Steps between evaluations; None: four times a run, less often (at least twice) where that would take more than a
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

    @property
    def rows(self) -> int:
        """`batch_size` as a number."""
        return ROWS_PER_STEP if self.batch_size == "auto" else self.batch_size

    @property
    def rows_per_step(self) -> int:
        """Rows of an optimiser step."""
        return self.rows * self.gradient_accumulation_steps

    @property
    def evaluation_tokens(self) -> int:
        """`eval_batch_tokens` as a number, `micro_batch_tokens` where nobody has chosen one."""
        return self.eval_batch_tokens or self.micro_batch_tokens

    @property
    def prompt_ratio(self) -> float:
        """`prompt_lr_ratio`, decided; 1 without a soft prompt."""
        if self.prompt_lr_ratio is not None:
            return self.prompt_lr_ratio
        plain = self.prompt.soft_prompt != "none" and self.prompt.encoder == "none"
        return PROMPT_LR_RATIO if plain else 1.0

    def problems(self) -> list[str]:
        """Ranges."""
        least = {} if self.batch_size == "auto" else {"batch_size": 1}
        least |= {"init_steps": 1, "gradient_accumulation_steps": 1, "micro_batch_tokens": 1, "max_length": 2}
        least |= {"keep_checkpoints": 2, "samples": 0, "weight_decay": 0, "clip": 0}
        optional = ("max_steps", "eval_steps", "save_steps", "early_stop", "eval_batch_tokens")
        least |= {name: 1 for name in optional if getattr(self, name) is not None}
        found = [
            f"{name}: must be at least {minimum} (got {getattr(self, name)})"
            for name, minimum in least.items()
            if getattr(self, name) < minimum
        ]
        found += [
            f"{name}: must be positive (got {getattr(self, name)})"
            for name in ("epochs", "learning_rate", "adam_epsilon", "loraplus_lr_ratio", "prompt_lr_ratio")
            if getattr(self, name) is not None and not 0 < getattr(self, name) < math.inf
        ]
        found += [
            f"{name}: must be in [0, 1) (got {getattr(self, name)})"
            for name in ("warmup", "adam_beta1", "adam_beta2")
            if not 0 <= getattr(self, name) < 1
        ]
        if self.loraplus_lr_ratio is not None and self.lora.lora_fa:
            found.append(
                "loraplus_lr_ratio: with lora_fa no A is trained, so there is no second rate; set learning_rate"
            )
        found += self._prompt_problems()
        if not 0 < self.validation_share < 1:
            found.append(
                f"validation_share: must be above 0 and below 1 (got {self.validation_share}); the best step is "
                "chosen on held-out rows, so there must be some: set a small share, or a file of them as validation"
            )
        if self.method == "full" and self.lora != _default_adapter():
            found.append(
                "lora: has no meaning with method full, which trains every weight and no adapter; leave it out"
            )
        if self.invocation is not None and self.method == "full":
            found.append("invocation: method full trains no adapter that could be invoked; leave it out")
        if self.loftq_original is not None and self.lora.init != "loftq":
            found.append(f"loftq_original: is for init loftq alone (got init {self.lora.init})")
        if self.method == "full" and self.loraplus_lr_ratio is not None:
            found.append("loraplus_lr_ratio: method full has no B to train faster than A; leave it out")
        if self.method == "full" and self.frozen_products != "exact":
            found.append(f"frozen_products: with method full no weight is frozen (got {self.frozen_products})")
        if self.method == "full" and self.quantize not in ("auto", "none"):
            found.append(
                f"quantize: full fine-tuning trains the weights, which {self.quantize} cannot hold; leave it out"
            )
        if self.method == "full" and self.dtype not in ("auto", "fp32"):
            found.append(f"dtype: full fine-tuning moves weights by less than {self.dtype} can hold; fp32 or auto")
        if self.resume and self.output is None:
            found.append("resume: needs output, the folder of the run to go on with")
        return found

    def _prompt_problems(self) -> list[str]:
        """Settings at odds with a soft prompt, or without one."""
        alone, found = self.lora.target_modules == "none", []
        if self.prompt.soft_prompt == "none":
            if alone:
                found.append("target_modules: is none, and there is no soft prompt: nothing would be trained")
            if self.prompt_lr_ratio is not None:
                found.append("prompt_lr_ratio: has no meaning without a soft prompt; leave it out")
            return found
        if self.method == "full":
            found.append("soft_prompt: goes with method sft; with method full every weight is trained and no adapter")
        if self.cache_trunk != "off":
            found.append(
                "cache_trunk: with a soft prompt the first layer is given something else at each step; leave it off"
            )
        if alone and self.loraplus_lr_ratio is not None:
            found.append("loraplus_lr_ratio: a soft prompt alone has no B to train faster than A; leave it out")
        if alone and self.frozen_products != "exact":
            found.append("frozen_products: is for adapted layers, of which target_modules none has none; leave it out")
        return found
