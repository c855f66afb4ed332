"""What both sides are given: models, one starting adapter each, and steps of token ids and labels, in a work folder.

Everything is made once, so that no side has rows, labels or starting weights of its own.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path

E2E = Path(__file__).parents[2].parent / "shared" / "data" / "e2e_nlg"  # beside the project, where tests look too
RANK, LEARNING_RATE, ADAM_BETAS, ADAM_EPSILON, CLIP = 8, 1e-3, (0.9, 0.99), 1e-8, 1.0
_ROWS_READ = 400

Row = tuple[list[int], list[bool]]  # token ids, and which of them are targets
Steps = list[list[Row]]


@dataclass(frozen=True)
class Setting:
    """What is trained in a step, for all sides."""

    model: str
    """135M: SmolLM2; 0.5B: Qwen2.5-0.5B's shape, random weights."""

    rows: str
    """short: rows of the data; a number: rows of so many tokens, made by joining short ones."""

    step: str
    """N-rows, or N-tokens: as many rows as have about N tokens. Every step has the same number of rows."""

    loss: str
    """completion: answers only; full: every token."""

    @classmethod
    def of(cls, name: str) -> Setting:
        """The setting of a name such as 135M-short-8-rows-completion."""
        known = re.fullmatch(r"(135M|0\.5B)-(short|\d+)-(\d+-rows|\d+-tokens)-(completion|full)", name)
        if known is None:
            raise SystemExit(
                f"{name}: no such setting; a name is MODEL-ROWS-STEP-LOSS, MODEL 135M or 0.5B, ROWS short or a number "
                "of tokens, STEP N-rows or N-tokens, LOSS completion or full, or one of those that --list prints"
            )
        return cls(*known.groups())

    @property
    def data(self) -> str:
        """What its rows are named by."""
        return f"{self.rows}-{self.step}-{self.loss}"

    @property
    def name(self) -> str:
        """As `--only` takes it, and as results are named."""
        return f"{self.model}-{self.data}"


def model_source(work: Path, model: str) -> str:
    """What `load_model` takes: the alias of the real model, or the folder of the random one."""
    return "smollm2" if model == "135M" else str(work / model)


def starting_adapter(work: Path, model: str) -> Path:
    """Folder of the adapter that every side starts from, in PEFT's format."""
    return work / f"adapter-{model}"


def read_steps(work: Path, setting: Setting) -> Steps:
    """All of the same number of rows; the rows of a step by length."""
    steps: Steps = json.loads((work / f"{setting.data}.json").read_text())
    return steps


def prepare(work: Path, settings: list[Setting], dtype: str, steps: int) -> dict[str, object]:
    """Write all of it.

    Args:
        work: an empty folder.
        settings: which models and rows are needed.
        dtype: auto, fp32 or bf16.
        steps: how many of each setting.

    Returns:
        What belongs to every result: data, dtype, versions.
    """
    import importlib.metadata

    import torch

    import lorakit
    from lorakit import LoRAConfig, machine
    from lorakit.models import load_model, load_tokenizer

    resolved = machine.resolve_dtype(dtype, torch.device("cpu"))
    if any(setting.model == "0.5B" for setting in settings):
        _save_random_model(work / "0.5B", resolved)
    for model in {setting.model for setting in settings}:
        base, _ = load_model(model_source(work, model), "fp32")
        lorakit.attach(base, LoRAConfig(r=RANK)).save("default", starting_adapter(work, model))
    source, rows = _rows()
    tokenizer = load_tokenizer("smollm2")
    for setting in settings:
        found = _steps(setting, _examples(tokenizer, rows, setting.loss), steps)
        (work / f"{setting.data}.json").write_text(json.dumps(found))
    packages = ("torch", "transformers", "trl", "peft", "accelerate")
    return {
        "data": source,
        "dtype": next(name for name, known in machine.DTYPES.items() if known == resolved),
        "threads": torch.get_num_threads(),
        "versions": {"lorakit": lorakit.__version__, **{name: importlib.metadata.version(name) for name in packages}},
    }


def _rows():
    """E2E's training rows in the order of an epoch, or the demo's orders where E2E is not at hand."""
    from lorakit.data.batches import epoch_order
    from lorakit.data.sources import Origin, Row, read_rows
    from lorakit.demo.orders import make_orders

    if (E2E / "train.jsonl").is_file():
        rows = read_rows(E2E / "train.jsonl")
        return "E2E", [rows[i] for i in epoch_order(len(rows), 0, 0)[:_ROWS_READ]]
    orders = make_orders("train", _ROWS_READ)
    source = "orders of lorakit demo, since E2E (../shared/data/e2e_nlg beside the project) is not here"
    return source, [Row(Origin("orders", i + 1), order.row()) for i, order in enumerate(orders)]


def _examples(tokenizer, rows, loss: str) -> list[tuple[list[int], list[bool]]]:
    from lorakit.data.chat import ChatFormat
    from lorakit.models import stop_ids

    train_on = {"completion": "assistant", "full": "all"}[loss]
    chat = ChatFormat(tokenizer, stop_ids(None, tokenizer), 1024, "auto", train_on)
    return [(example.ids, example.trained) for row in rows for example in chat.encode(row)]


def _steps(setting: Setting, short: list[Row], steps: int) -> Steps:
    """The first `steps` steps of a setting."""
    rows = short if setting.rows == "short" else _joined(short, int(setting.rows))
    count, unit = setting.step.split("-")
    size = int(count) if unit == "rows" else round(int(count) * len(rows) / sum(len(ids) for ids, _ in rows))
    found = [sorted(rows[i * size : (i + 1) * size], key=lambda row: len(row[0])) for i in range(steps)]
    if len(found[-1]) < size:
        raise SystemExit(f"{setting.name}: {_ROWS_READ} rows of data are too few for {steps} steps")
    return found


def _joined(short: list[Row], length: int) -> list[Row]:
    """Rows of `length` tokens: short ones end to end, the last of each cut."""
    rows: list[Row] = []
    ids: list[int] = []
    trained: list[bool] = []
    for more_ids, more_trained in short:
        ids, trained = ids + more_ids, trained + more_trained
        if len(ids) >= length:
            rows.append((ids[:length], trained[:length]))
            ids, trained = [], []
    return rows


def _save_random_model(folder: Path, dtype) -> None:
    """Qwen2.5-0.5B's shape with random weights, and SmolLM2's tokenizer, whose ids are all in its vocabulary."""
    import torch
    from transformers import Qwen2Config, Qwen2ForCausalLM

    from lorakit.models import load_tokenizer

    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=151_936,
        hidden_size=896,
        intermediate_size=4864,
        num_hidden_layers=24,
        num_attention_heads=14,
        num_key_value_heads=2,
        tie_word_embeddings=True,
        bos_token_id=1,
        eos_token_id=2,
    )
    Qwen2ForCausalLM(config).to(dtype).save_pretrained(folder)
    load_tokenizer("smollm2").save_pretrained(folder)
