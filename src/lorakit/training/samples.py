"""Answers of a model to a few validation rows, before and after it is trained."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lorakit.adapter.in_use import virtual_tokens
from lorakit.data.chat import ChatFormat, Prompt
from lorakit.data.prepare import Data
from lorakit.data.schema import schema_of
from lorakit.files import write_json
from lorakit.generation import generate
from lorakit.models import stop_ids
from lorakit.training.events import OnEvent, Phase

SAMPLE_TOKENS = 64


def sample_prompts(number: int, data: Data, chat: ChatFormat, model: Any) -> list[Prompt]:
    """Prompts of validation rows, spread evenly; fewer where rows have none or leave an answer no room."""
    room = (getattr(model.config, "max_position_embeddings", None) or math.inf) - virtual_tokens(model)
    prompts = [chat.prompt(row) for row in data.valid.rows if schema_of(row.fields) != "text"]
    prompts = [prompt for prompt in prompts if len(prompt.ids) + SAMPLE_TOKENS <= room]
    return prompts[:: max(1, len(prompts) // number)][:number] if number else []


class Samples:
    """Answers to a few validation rows, kept in `samples.json`.

    Args:
        path: of the file.
        model: that is trained.
        chat: the format of its conversations.
        prompts: to answer.
        unpack_memory: for weights of a quantised base, of what training takes in any case (`generation.decoding`).
    """

    def __init__(self, path: Path, model: Any, chat: ChatFormat, prompts: Sequence[Prompt], unpack_memory: int) -> None:
        self.path = path
        self.unpack_memory = unpack_memory
        self.model = model
        self.chat = chat
        self.prompts = prompts
        self.rows: list[dict[str, Any]] = [
            {
                "origin": f"{Path(prompt.origin.file).name}:{prompt.origin.line}",
                "prompt": chat.tokenizer.decode(prompt.ids),
                "references": list(prompt.references),
                "before": None,
                "after": None,
            }
            for prompt in prompts
        ]

    def take(self, when: str, on_event: OnEvent) -> None:
        """Answer all prompts ("before" or "after" training) and write the file."""
        if self.prompts:
            on_event(Phase(f"{len(self.prompts)} samples {when} training"))
            answers = generate(
                self.model,
                self.chat.tokenizer,
                [prompt.ids for prompt in self.prompts],
                max_new_tokens=SAMPLE_TOKENS,
                stop_ids=self.chat.stop_ids | stop_ids(self.model, self.chat.tokenizer),
                unpack_memory=self.unpack_memory,
            )
            for row, answer in zip(self.rows, answers, strict=True):
                row[when] = answer.text
        write_json(self.path, self.rows)
