"""`lorakit check`: rows as the model will see them, and whether they may be trained on. Nothing is trained."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import groupby
from typing import TYPE_CHECKING, Any

import click
from rich.text import Text

from lorakit.cli.common import console, emit, verb
from lorakit.training.config import TrainConfig

if TYPE_CHECKING:
    from lorakit.data.chat import Example

_LONGEST_RUN = 120  # tokens shown of a stretch that is all trained or all not; the middle of a longer one is counted


@verb("check")
@click.argument("data")
@click.option(
    "--model",
    "--model_name_or_path",
    required=True,
    help="Base model: Hub id, folder, .gguf file, or the alias smollm2.",
)
@click.option(
    "--validation",
    "--valid",
    "--validation_file",
    "--eval_file",
    help="Validation rows; without, some of DATA are held out, as train does.",
)
@click.option(
    "--validation_share",
    type=click.FloatRange(0, 1, min_open=True, max_open=True),
    default=TrainConfig.validation_share,
    show_default=True,
    help="Share of rows held out when no validation file is given.",
)
@click.option("--seed", default=TrainConfig.seed, show_default=True, help="Determines which rows are held out.")
@click.option("--rows", default=2, type=click.IntRange(0), show_default=True, help="Rows to print.")
@click.option(
    "--max_length",
    "--max_seq_length",
    type=click.IntRange(2),
    default=TrainConfig.max_length,
    show_default=True,
    help="Longest row in tokens; longer rows are cut so that labels remain, and counted.",
)
@click.option(
    "--chat_template",
    default=TrainConfig.chat_template,
    show_default=True,
    help="auto: the tokenizer's own; chatml; chatml-tools; a Jinja file; none: no template.",
)
@click.option(
    "--train_on",
    type=click.Choice(["assistant", "all"]),
    default=TrainConfig.train_on,
    show_default=True,
    help="Which tokens carry loss: assistant turns with their end token, or every token.",
)
@click.option(
    "--token_cache/--no_token_cache",
    default=TrainConfig.token_cache,
    show_default=True,
    help="Keep the tokens of large data files in the user's cache folder, and read them from there the next time.",
)
def command(
    data: str,
    model: str,
    validation: str | None,
    validation_share: float,
    seed: int,
    rows: int,
    max_length: int,
    chat_template: str,
    train_on: Any,
    token_cache: bool,
    as_json: bool,
) -> None:
    """Show what a model will see of the rows of DATA, and refuse what would train nothing or the wrong thing.

    DATA is a .jsonl, .json, .csv, .parquet or .txt file, or a Hub data set id, owner/name or owner/name:split. Trained
    tokens are green and stand between ⟦ and ⟧; │ parts tokens. `lorakit train` passes its rows through the same gate.
    """
    from lorakit.data.chat import ChatFormat
    from lorakit.data.prepare import Data, inspect_data
    from lorakit.models import load_tokenizer, stop_ids

    tokenizer = load_tokenizer(model)
    chat_format = ChatFormat(tokenizer, stop_ids(None, tokenizer), max_length, chat_template, train_on)
    result = inspect_data(data, validation, validation_share, seed, chat_format, token_cache=token_cache)
    tokenizer = result.chat_format.tokenizer
    origins = [row.origin for row in result.train.rows[:rows]]
    shown = [example for example in result.train.examples if example.origin in origins]
    for example in shown:
        console.print(_title(example), style="bold")
        console.print(as_seen(example, tokenizer))
        console.print()
    for line in result.lines():
        console.print(line)
    given = {
        "model": model, "validation": validation if isinstance(result, Data) else "FILE",
        "validation_share": validation_share, "seed": seed, "max_length": max_length, "chat_template": chat_template,
        "train_on": train_on,
    }  # fmt: skip
    flags = [f"--{name} {value}" for name, value in given.items() if value != getattr(TrainConfig, name, None)]
    console.print(f"ok     these rows can be trained on: lorakit train {data} {' '.join(flags)} --output runs/NAME")
    listed = [{"origin": str(example.origin), "tokens": _tokens(example, tokenizer)} for example in shown]
    emit({"ok": True, **result.statistics(), "rows": listed}, as_json)


def _title(example: Example) -> str:
    parts = [f"{len(example.ids):,} tokens, {sum(example.trained):,} trained"]
    if example.prompt_cut:
        parts.append(f"prompt cut by {example.prompt_cut:,}")
    if example.answer_cut:
        parts.append(f"answer cut by {example.answer_cut:,}")
    return f"{example.origin}: {', '.join(parts)}"


def as_seen(example: Example, tokenizer: Any) -> Text:
    """Every token of an example, parted by │; trained ones green and between ⟦ and ⟧; a line break shows as ⏎ too."""
    text = Text()
    pieces = [(shown.replace("\n", "⏎\n"), trained) for _, shown, trained in _pieces(example, tokenizer)]
    for trained, run in groupby(pieces, key=lambda piece: piece[1]):
        style = "green" if trained else ""
        if trained:
            text.append("⟦", "bold green")
        for number, shown in enumerate(_shortened([piece for piece, _ in run])):
            if number:
                text.append("│", "dim")
            text.append(shown, style)
        text.append("⟧" if trained else "", "bold green")
    return text


def _shortened(pieces: list[str]) -> list[str]:
    if len(pieces) <= _LONGEST_RUN:
        return pieces
    half = _LONGEST_RUN // 2
    return [*pieces[:half], f" … {len(pieces) - 2 * half:,} tokens … ", *pieces[-half:]]


def _tokens(example: Example, tokenizer: Any) -> list[tuple[int, str, bool]]:
    """(id, text, trained) of each token; a character of several tokens stands with the last of them."""
    return [
        (token, text if place == len(ids) - 1 else "", trained)
        for ids, text, trained in _pieces(example, tokenizer)
        for place, token in enumerate(ids)
    ]


def _pieces(example: Example, tokenizer: Any) -> Iterator[tuple[list[int], str, bool]]:
    """(ids, text, trained) of each token; tokens that hold parts of one character come as one piece."""
    ids, trained = example.ids, example.trained

    def decode(part: Sequence[int]) -> str:
        return str(tokenizer.decode(part, skip_special_tokens=False, clean_up_tokenization_spaces=False))

    start = 0
    for end in range(1, len(ids) + 1):
        # decoded behind its neighbour: some tokenizers drop the space of a text's first token
        before = ids[max(0, start - 1) : start]
        text = decode([*before, *ids[start:end]])[len(decode(before)) if before else 0 :]
        whole_character = "\ufffd" not in text or end - start >= 4
        if whole_character or end == len(ids) or trained[end] != trained[start]:
            yield ids[start:end], text, trained[start]
            start = end
