"""`lorakit generate`: answer prompts, many at a time."""

from __future__ import annotations

import functools
import sys
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import click

from lorakit.cli.common import console, emit, verb
from lorakit.cli.loading import load_subject, subject_options
from lorakit.errors import ConfigError, DataError

if TYPE_CHECKING:
    from lorakit.data.chat import ChatFormat
    from lorakit.data.sources import Row


class _Request(NamedTuple):
    """A prompt as ids, and as what the user may recognise it by."""

    ids: list[int]
    shown: str


@verb("generate")
@subject_options
@click.option("--prompt", "prompts", multiple=True, metavar="TEXT", help="Prompt; may be given again.")
@click.option(
    "--file", metavar="FILE", help=".txt: a prompt a line; else rows as for training, with or without answers."
)
@click.option("--system", metavar="TEXT", help="System message before each prompt given as text.")
@click.option("--raw", is_flag=True, help="Continue the text as it is: no chat template.")
@click.option("--batch-size", type=int, default=32, show_default=True, help="Prompts answered at once.")
@click.option("--output", metavar="FILE.jsonl", help="Write prompts and answers here, one JSON object a line.")
def command(
    model: str | None,
    dtype: str,
    device: str,
    quantize: str,
    unpack_memory: int | None,
    chat_template: str,
    adapter: str | None,
    prompts: tuple[str, ...],
    file: str | None,
    system: str | None,
    raw: bool,
    max_new_tokens: int,
    temperature: float,
    top_p: float,
    seed: int,
    batch_size: int,
    output: str | None,
    as_json: bool,
) -> None:
    """Answer prompts from --prompt, --file, or standard input (a prompt a line). Answers go to stdout.

    A row of --file is of any kind that can be trained on (but plain text), and may end before the answer; one that ends
    with an answer is asked for that answer anew.
    """
    from lorakit.data.sources import each_row
    from lorakit.files import JsonLines
    from lorakit.generation import generate

    texts, rows = _asked(prompts, file)
    if raw and system is not None:
        raise ConfigError("--system needs a chat template, --raw leaves it out: give one of them")
    subject = load_subject(model, adapter, "none" if raw else chat_template, dtype, device, quantize)
    chat_format = subject.chat_format.for_rows(rows)
    requests = [_from_text(chat_format, text, system) for text in texts]
    from_row = functools.partial(_from_row, chat_format)
    requests += each_row(from_row, rows, "{bad} of {all} rows cannot be answered")
    completions = generate(
        subject.model,
        chat_format.tokenizer,
        [request.ids for request in requests],
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        top_p=top_p,
        seed=seed,
        batch_size=batch_size,
        stop_ids=chat_format.stop_ids,
        unpack_memory=unpack_memory,
    )
    answers = [
        {
            "prompt": request.shown,
            "text": completion.text,
            "tokens": len(completion.ids),
            "finished": completion.finished,
        }
        for request, completion in zip(requests, completions, strict=True)
    ]
    if output is not None:
        JsonLines(output).keep(answers)
        console.print(f"{len(answers):,} answers in {output}")
    elif not as_json:
        for number, answer in enumerate(answers, 1):
            if len(answers) > 1:
                console.print(f"--- {number}: {_one_line(str(answer['prompt']))}")
            click.echo(answer["text"])
    emit({"model": subject.name, "adapter": adapter, "completions": answers}, as_json)


def _asked(prompts: tuple[str, ...], file: str | None) -> tuple[list[str], list[Row]]:
    """Prompts as text, and rows, from wherever the user put them."""
    from lorakit.data.sources import read_rows

    if prompts and file is not None:
        raise ConfigError("--prompt and --file: give one of them")
    if prompts:
        return list(prompts), []
    if file is None:
        if sys.stdin.isatty():
            raise ConfigError("nothing to answer: give --prompt TEXT, --file FILE, or lines on standard input")
        return _lines(sys.stdin.read(), "standard input"), []
    rows = read_rows(file)
    if Path(file).suffix.lower() == ".txt":
        return _lines(str(rows[0].fields["text"]), file), []
    return [], rows


def _lines(text: str, where: str) -> list[str]:
    lines = [line.rstrip("\r") for line in text.split("\n") if line.strip()]
    if not lines:
        raise DataError(f"{where}: holds no prompt")
    return lines


def _from_text(chat_format: ChatFormat, text: str, system: str | None) -> _Request:
    if system is None:
        return _Request(chat_format.prompt_ids(text), text)
    messages = [{"role": "system", "content": system}, {"role": "user", "content": text}]
    return _Request(chat_format.prompt_ids(messages), text)


def _from_row(chat_format: ChatFormat, row: Row) -> _Request:
    """A row that ends with an answer is recognised by its place, one that asks by its last turn."""
    from lorakit.data.schema import PromptCompletion, parse_prompt

    asked = parse_prompt(row)
    question = asked.prompt if isinstance(asked, PromptCompletion) else asked.messages[-1].content
    return _Request(chat_format.ids_before_answer(asked), str(row.origin) if asked.answered else question)


def _one_line(text: str, length: int = 60) -> str:
    line = " ".join(text.split())
    return line if len(line) <= length else line[: length - 3] + "..."
