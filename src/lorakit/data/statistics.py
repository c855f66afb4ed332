"""What a person should know of a data set before it is trained on: `Statistics`. Counts; judges nothing."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from lorakit.data.chat import ChatFormat, Example
from lorakit.data.schema import Conversation, Parsed
from lorakit.data.sources import Row


@dataclass(frozen=True)
class Statistics:
    """Counts over the rows of a data set, and over the examples made of them. Lengths are in tokens."""

    rows: int
    schemas: dict[str, int]
    """Rows of each schema (messages, alpaca, ...)."""

    examples: int
    """More than rows where a template rewrites history, or a row goes on in further examples because it is long."""

    tokens: int
    trained_tokens: int
    trained_share: float
    length_min: int
    length_median: float
    length_p95: float
    length_max: int
    length_uncut_max: int
    """What the longest example would be without the limit."""

    max_length: int
    prompts_cut: int
    """Rows of which part of a prompt was left out to stay within max_length."""

    answers_cut: int
    """Rows of which the end of an answer was left out, and with it the end token."""

    end_trained: int
    """Rows of which every answer's end token is trained, or a text's."""

    eos_appended: int
    """Rows whose end token is ours, since the template has none."""

    serving_prompts: int | None
    """Rows whose every answer follows exactly the tokens a server would send. None where no row has a prompt."""

    duplicates: int
    """Rows that say the same as an earlier one."""

    dropped_turns: int
    """Turns after the last assistant turn of their row, which no answer follows."""

    template: str
    """Where the chat template comes from."""

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return asdict(self)


def measure(
    rows: Sequence[Row],
    parsed: Sequence[Parsed],
    schemas: Sequence[str],
    examples: Sequence[Sequence[Example]],
    chat_format: ChatFormat,
) -> Statistics:
    """Count.

    Args:
        rows: at least one.
        parsed: what each row means.
        schemas: the schema of each row.
        examples: the examples of each row.
        chat_format: what made them.
    """
    flat = [example for of_row in examples for example in of_row]
    lengths = [len(example.ids) for example in flat]
    tokens, trained = sum(lengths), sum(sum(example.trained) for example in flat)
    prompts_cut = sum(any(example.prompt_cut for example in of_row) for of_row in examples)
    with_prompt = sum(schema != "text" for schema in schemas)
    return Statistics(
        rows=len(rows),
        schemas=dict(Counter(schemas).most_common()),
        examples=len(flat),
        tokens=tokens,
        trained_tokens=trained,
        trained_share=trained / tokens,
        length_min=min(lengths),
        length_median=float(np.median(lengths)),
        length_p95=float(np.percentile(lengths, 95)),
        length_max=max(lengths),
        length_uncut_max=max(len(example.ids) + example.prompt_cut + example.answer_cut for example in flat),
        max_length=chat_format.max_length,
        prompts_cut=prompts_cut,
        answers_cut=sum(any(example.answer_cut for example in of_row) for of_row in examples),
        end_trained=sum(of_row[-1].ends and not any(example.answer_cut for example in of_row) for of_row in examples),
        eos_appended=sum(any(example.eos_appended for example in of_row) for of_row in examples),
        serving_prompts=with_prompt - prompts_cut if with_prompt else None,
        duplicates=len(parsed) - len({repr(each) for each in parsed}),
        dropped_turns=sum(each.dropped_turns for each in parsed if isinstance(each, Conversation)),
        template=chat_format.template_origin,
    )
