"""The other sides, both over PEFT: TRL's SFTTrainer and transformers' Trainer, their own loops timed by a callback."""

from __future__ import annotations

import gc
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from datasets import Dataset
from peft import PeftModel
from transformers import DataCollatorForSeq2Seq, Trainer, TrainerCallback, TrainingArguments
from transformers.trainer_callback import PrinterCallback
from trl import SFTConfig, SFTTrainer

from lorakit.models import load_model
from versus.measure import timed
from versus.prepare import ADAM_BETAS, ADAM_EPSILON, CLIP, LEARNING_RATE, Steps


@dataclass(frozen=True)
class Way:
    """Settings of SFTTrainer that change time and memory and leave rows, labels and losses as they are."""

    parts: int | None = 1
    """Into how many micro-batches a step is divided; None: each row is one, so that nothing is padded."""

    padding_free: bool = False
    """Rows end to end; transformers' masks keep them apart."""

    packing: bool = False
    """A step's rows are one row of the data set, as TRL's packing makes them; implies padding_free."""

    attention: str = "sdpa"
    """Of transformers' implementations. FlashAttention has none for CPUs, flex_attention no backward pass there."""

    checkpointing: bool = False
    """TRL's default is True."""

    autocast: bool = True
    """TRL's default, of a bf16 base; makes no difference to an fp32 one, which is trained in fp32."""


WAYS = {
    "padded": Way(),
    "padded, two micro-batches": Way(parts=2),
    "padded, four micro-batches": Way(parts=4),
    "padded, eager attention": Way(attention="eager"),
    "padded, no autocast": Way(autocast=False),
    "row by row": Way(parts=None),
    "padding-free": Way(padding_free=True),
    "packing": Way(packing=True),
    "TRL's defaults": Way(checkpointing=True),
}


def search(steps: Steps, source: str, adapter: Path, dtype: str) -> dict[str, dict[str, object]]:
    """Each way over the last of these steps, all in one process, so without memory of its own; what fails says why."""
    trl(steps[:-1], source, adapter, dtype, next(iter(WAYS)))  # warm-up
    found: dict[str, dict[str, object]] = {}
    for name, way in WAYS.items():
        if len(steps[0]) % (way.parts or 1) or (dtype != "bf16" and not way.autocast):
            continue
        gc.collect()
        try:
            result = trl(steps[-1:], source, adapter, dtype, name)
        except (RuntimeError, ValueError, NotImplementedError, ImportError) as error:
            found[name] = {"error": str(error).splitlines()[0]}
        else:
            found[name] = {"tokens_per_second": result["tokens_per_second"], "loss": result["losses"][0]}
    return found


def trl(steps: Steps, source: str, adapter: Path, dtype: str, way: str) -> dict[str, object]:
    """SFTTrainer's own loop over the steps, in one of WAYS."""
    chosen = WAYS[way]
    model, tokenizer = _load(source, adapter, dtype)
    model.get_base_model().set_attn_implementation(chosen.attention)
    rows = len(steps[0])
    parts = 1 if chosen.packing else chosen.parts or rows
    with tempfile.TemporaryDirectory() as folder:
        arguments = SFTConfig(
            **_arguments(folder, len(steps), parts, 1 if chosen.packing else rows // parts),
            gradient_checkpointing=chosen.checkpointing,
            bf16=dtype == "bf16" and chosen.autocast,
            packing=chosen.packing,
            padding_free=chosen.padding_free,
            max_length=None,  # nothing is cut
            dataset_kwargs={"skip_prepare_dataset": True},  # token ids and labels are final
        )
        data = Dataset.from_list([_packed(each) for each in steps] if chosen.packing else _labelled(steps))
        trainer = SFTTrainer(model=model, args=arguments, train_dataset=data, processing_class=tokenizer)
        return _run(trainer, steps)


def plain(steps: Steps, source: str, adapter: Path, dtype: str) -> dict[str, object]:
    """transformers' own Trainer with a padding collator and the model's own loss, which is how LLaMA-Factory trains.

    Its default, checkpointing, is left off: that is faster.
    """
    model, tokenizer = _load(source, adapter, dtype)
    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(**_arguments(folder, len(steps), 1, len(steps[0])), bf16=dtype == "bf16")
        collator = DataCollatorForSeq2Seq(tokenizer, pad_to_multiple_of=8)  # pads labels with -100
        data = Dataset.from_list(_labelled(steps))
        return _run(Trainer(model=model, args=arguments, train_dataset=data, data_collator=collator), steps)


def _load(source: str, adapter: Path, dtype: str) -> tuple[Any, Any]:
    """The base with the starting adapter trainable in it, and the tokenizer."""
    base, tokenizer = load_model(source, dtype, "cpu")
    return PeftModel.from_pretrained(base, str(adapter), is_trainable=True), tokenizer


def _arguments(folder: str, steps: int, parts: int, rows: int) -> dict[str, Any]:
    """What both trainers are told: our optimiser, the rows in their order, a loss for each step, nothing else."""
    beta1, beta2 = ADAM_BETAS
    return {
        "output_dir": folder,
        "max_steps": steps,
        "per_device_train_batch_size": rows,
        "gradient_accumulation_steps": parts,
        "train_sampling_strategy": "sequential",
        "learning_rate": LEARNING_RATE,
        "lr_scheduler_type": "constant",
        "adam_beta1": beta1,
        "adam_beta2": beta2,
        "adam_epsilon": ADAM_EPSILON,
        "weight_decay": 0.0,
        "max_grad_norm": CLIP,
        "use_cpu": True,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "dataloader_pin_memory": False,
    }


def _labelled(steps: Steps) -> list[dict[str, list[int]]]:
    return [{"input_ids": ids, "labels": _labels(ids, trained)} for rows in steps for ids, trained in rows]


def _packed(rows: list[tuple[list[int], list[bool]]]) -> dict[str, list[int]]:
    """One row of the data set, with the columns that TRL's packing gives it."""
    return {
        "input_ids": [token for ids, _ in rows for token in ids],
        "labels": [label for ids, trained in rows for label in _labels(ids, trained)],
        "seq_lengths": [len(ids) for ids, _ in rows],
    }


def _labels(ids: list[int], trained: list[bool]) -> list[int]:
    return [token if target else -100 for token, target in zip(ids, trained, strict=True)]


class _Clock(TrainerCallback):
    """Seconds from the first forward pass of a step to the cleared gradients; making its batch is not in them."""

    def __init__(self) -> None:
        self.seconds: list[float] = []
        self._start = 0.0

    def on_step_begin(self, *_: Any, **__: Any) -> None:
        self._start = time.perf_counter()

    def on_step_end(self, *_: Any, **__: Any) -> None:
        self.seconds.append(time.perf_counter() - self._start)


def _run(trainer: Trainer, steps: Steps) -> dict[str, object]:
    clock = _Clock()
    trainer.add_callback(clock)
    trainer.remove_callback(PrinterCallback)
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert len(losses) == len(clock.seconds) == len(steps), "the trainer's steps are not the benchmark's"
    return timed([sum(len(ids) for ids, _ in rows) for rows in steps], clock.seconds, losses)
