"""`lorakit chat`: talk with a model and its adapter in the terminal."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import click

from lorakit.cli.common import console, emit, verb
from lorakit.cli.loading import load_subject, subject_options
from lorakit.errors import ConfigError

if TYPE_CHECKING:
    from lorakit.cli.loading import Subject

Messages = list[dict[str, str]]

_COMMANDS = "/reset forgets the conversation, /exit ends it"


@verb("chat")
@subject_options
@click.option("--system", metavar="TEXT", help="System message of the conversation.")
def command(
    model: str | None,
    dtype: str,
    device: str,
    quantize: str,
    unpack_memory: int | None,
    chat_template: str,
    adapter: str | None,
    system: str | None,
    max_new_tokens: int,
    temperature: float,
    top_p: float,
    seed: int,
    as_json: bool,
) -> None:
    """Talk with a model. Each line is a turn; from a pipe too. /reset forgets the conversation, /exit ends it."""
    from lorakit.generation import decoding, stream

    subject = load_subject(model, adapter, chat_template, dtype, device, quantize)
    opening: Messages = [{"role": "system", "content": system}] if system is not None else []
    messages = list(opening)
    if sys.stdin.isatty():
        console.print(_COMMANDS)
    with decoding(subject.model, unpack_memory):
        for line in _lines():
            if line == "/exit":
                break
            if line == "/reset":
                messages = list(opening)
                console.print("forgotten")
                continue
            if line.startswith("/"):
                console.print(f"{line.split()[0]} is no command: {_COMMANDS}")
                continue
            messages.append({"role": "user", "content": line})
            ids, forgotten = fitting_prompt(subject, messages, len(opening), max_new_tokens)
            if forgotten:
                console.print(f"(the context is full: the first {forgotten} turns are forgotten)")
            completion = stream(
                subject.model,
                subject.chat_format.tokenizer,
                ids,
                on_text=lambda text: click.echo(text, nl=False, err=as_json),
                max_new_tokens=max_new_tokens,
                temperature=temperature,
                top_p=top_p,
                seed=seed + len(messages),  # another draw for each turn
                stop_ids=subject.chat_format.stop_ids,
                unpack_memory=0,  # as it stands for the whole conversation
            )
            click.echo("" if completion.finished else " [...]", err=as_json)
            messages.append({"role": "assistant", "content": completion.text})
    emit({"model": subject.name, "adapter": adapter, "messages": messages}, as_json)


def _lines() -> Iterator[str]:
    """Turns from the terminal, with line editing, or from a pipe; empty lines are passed over."""
    while True:
        try:
            line = console.input("> ") if sys.stdin.isatty() else next(sys.stdin)
        except (EOFError, StopIteration):
            return
        if line.strip():
            yield line.strip()


def fitting_prompt(subject: Subject, messages: Messages, opening: int, max_new_tokens: int) -> tuple[list[int], int]:
    """Ids of the conversation, without its oldest turns where it would not fit into the model's context with an answer.

    Args:
        subject: the model and its chat format.
        messages: the conversation up to the user's last turn; what is forgotten is removed from it.
        opening: messages at the start that always stay.
        max_new_tokens: room to leave for the answer.

    Returns:
        (ids, messages removed)

    Raises:
        ConfigError: the last turn alone does not fit.
    """
    from lorakit.adapter.in_use import virtual_tokens

    config: Any = subject.model.config.get_text_config(decoder=True)
    context = getattr(config, "max_position_embeddings", None)
    virtual = virtual_tokens(subject.model)
    soft = f", of which a soft prompt takes {virtual:,}" if virtual else ""
    removed = 0
    while True:
        ids = subject.chat_format.prompt_ids(messages)
        if context is None or virtual + len(ids) + max_new_tokens <= context:
            return ids, removed
        if len(messages) <= opening + 1:
            raise ConfigError(
                f"{len(ids):,} tokens and --max-new-tokens {max_new_tokens:,} do not fit into the model's context of "
                f"{context:,} tokens{soft}: write less, or lower --max-new-tokens"
            )
        del messages[opening : opening + 2]  # a question and its answer
        removed += 2
