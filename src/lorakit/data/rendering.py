"""Conversations to text through a chat template, and which template. Knows no token masks.

What a template leaves out is an error here: a row whose tools, tool calls or turns do not appear in its text would
train something else than it says.
"""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Mapping, Sequence
from datetime import datetime
from functools import cache
from importlib import resources
from pathlib import Path
from typing import Any

from lorakit.data.schema import Message, ToolCall
from lorakit.errors import ConfigError, DataError, nearest

TOOLS_ADVICE = "use a template that does, e.g. --chat-template chatml-tools"

FIXED_DAY = datetime(2024, 7, 26)  # the day Llama 3's template names where it has no clock
_TODAY = re.compile(r"""strftime_now\(\s*(['"])(.*?)\1\s*\)""")

_ASKED = (Message("system", "Be brief."), Message("user", "A question?"))
_PLAIN_TURNS = (*_ASKED, Message("assistant", "An answer."), Message("user", "And then?"))
_TOOL = {"type": "function", "function": {"name": "probe_tool", "description": "", "parameters": {"type": "object"}}}
_CALL = Message("assistant", "", (ToolCall("probe_call", {}, "call_1"),))


@cache
def shipped_templates() -> dict[str, str]:
    """Name -> text of the templates that come with lorakit."""
    folder = resources.files("lorakit.data") / "templates"
    texts = {Path(file.name).stem: file.read_text("utf-8") for file in folder.iterdir() if file.name.endswith(".jinja")}
    return dict(sorted(texts.items()))


def choose_template(tokenizer: Any, choice: str) -> str | None:
    """The template's text.

    Args:
        tokenizer: a transformers tokenizer.
        choice: "auto" (the tokenizer's own, or None), "none", the name of a shipped template, or a Jinja file.

    Raises:
        ConfigError: `choice` is none of these.
    """
    if choice == "none":
        return None
    if choice == "auto":
        own = tokenizer.chat_template
        return own.get("default") if isinstance(own, Mapping) else own
    shipped = shipped_templates()
    if choice in shipped:
        # A template stands in for the tokenizer's own, so it begins as that tokenizer begins a text.
        return "{{- bos_token }}" + shipped[choice] if starts_with_bos(tokenizer) else shipped[choice]
    path = Path(choice).expanduser()
    if path.is_file():
        try:
            return path.read_text("utf-8-sig")
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(f"chat_template: {choice} could not be read: {error}") from error
    known = ["auto", "none", *shipped]
    guess = nearest(choice, known)
    hint = f"; did you mean {' or '.join(guess)}?" if guess else ""
    raise ConfigError(f"chat_template: {choice!r} is no file and none of {', '.join(known)}{hint}")


def starts_with_bos(tokenizer: Any) -> bool:
    """Whether the tokenizer puts its BOS token before a plain text by itself."""
    bos = tokenizer.bos_token_id
    return bos is not None and tokenizer("").input_ids[:1] == [bos]


def with_template(tokenizer: Any, template: str | None) -> Any:
    """A tokenizer that shares everything with the given one but its chat template."""
    tokenizer = copy.copy(tokenizer)
    tokenizer.chat_template = template
    return tokenizer


def dated(template: str) -> str:
    """The template with today's date, where it asks the clock for it, replaced by `FIXED_DAY`.

    Training rows are rendered so: a run that is resumed tomorrow has the tokens it began with.
    """
    return _TODAY.sub(lambda call: json.dumps(FIXED_DAY.strftime(call[2])), template)


def writes_chatml(tokenizer: Any) -> bool:
    """Whether the tokenizer's template writes turns without tools as `chatml-tools` does: same markers, same end."""
    other = with_template(tokenizer, choose_template(tokenizer, "chatml-tools"))
    try:
        own, theirs = (render(each, _PLAIN_TURNS, (), add_generation_prompt=True) for each in (tokenizer, other))
    except DataError:
        return False
    return own == theirs


def shows_tools(tokenizer: Any) -> tuple[bool, bool]:
    """Whether the tokenizer's template shows (tools, the assistant's calls of them)."""

    def shown(name: str, messages: Sequence[Message]) -> bool:
        try:
            return name in render(tokenizer, messages, [_TOOL], add_generation_prompt=False)
        except DataError:
            return False

    return shown("probe_tool", _ASKED), shown("probe_call", [*_ASKED, _CALL])


def render(
    tokenizer: Any, messages: Sequence[Message], tools: Sequence[Mapping[str, Any]], *, add_generation_prompt: bool
) -> str:
    """Text of the messages by the tokenizer's template.

    Raises:
        DataError: the template refuses the messages, with its reason.
    """
    try:
        text: str = tokenizer.apply_chat_template(
            [message.for_template() for message in messages],
            tools=list(tools) or None,
            add_generation_prompt=add_generation_prompt,
            tokenize=False,
        )
    except Exception as error:  # a template is a program of strangers: it raises anything
        turns = ", ".join(message.role for message in messages)
        raise DataError(f"the chat template refuses the turns ({turns}): {error or type(error).__name__}") from error
    return text


def check_prompt(prompt: str, messages: Sequence[Message], tools: Sequence[Mapping[str, Any]]) -> None:
    """Refuse a prompt in which the template left something out. Earlier assistant turns are its own to rewrite.

    Raises:
        DataError: names what is missing.
    """
    seen = _squeeze(prompt)
    for tool in tools:
        if _squeeze(tool["function"]["name"]) not in seen:
            raise DataError(f"the chat template does not show the tool {tool['function']['name']!r}; {TOOLS_ADVICE}")
    for number, message in enumerate(messages, 1):
        if message.role != "assistant" and not _shown(message.content, seen):
            raise DataError(f"the chat template leaves out the {message.role} turn {number}: {message.content!r:.80}")


def check_continuation(continuation: str, message: Message) -> None:
    """Refuse an answer of which the template left something out.

    Raises:
        DataError: names what is missing.
    """
    seen = _squeeze(continuation)
    if not _shown(message.content, seen):
        raise DataError(
            f"the chat template changes the assistant's answer: {message.content!r:.80} became {continuation!r:.80}"
        )
    if message.reasoning is not None and not _shown(message.reasoning, seen):
        raise DataError(f"the chat template leaves out the assistant's reasoning: {message.reasoning!r:.80}")
    for call in message.tool_calls:
        if _squeeze(call.name) not in seen:
            raise DataError(f"the chat template does not show the assistant's call of {call.name!r}; {TOOLS_ADVICE}")


def _shown(content: str, seen: str) -> bool:
    """Whether content occurs, as it is or JSON-escaped (as Llama 3.1 writes what tools return)."""
    escaped = json.dumps(content, ensure_ascii=False)[1:-1]
    return _squeeze(content) in seen or _squeeze(escaped) in seen


def _squeeze(text: str) -> str:
    """Without white space: templates trim and reflow."""
    return "".join(text.split())
