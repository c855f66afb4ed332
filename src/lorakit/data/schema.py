"""From rows to conversations: what a row means is told by its keys. Knows no tokenizer and no template.

| schema        | keys                                                  | becomes            |
|---------------|-------------------------------------------------------|--------------------|
| messages      | messages (OpenAI: role, content, tool_calls), tools   | Conversation       |
| conversations | conversations (ShareGPT: from, value), tools, system  | Conversation       |
| alpaca        | instruction, output, and input, system, history       | Conversation       |
| prompt        | prompt, completion (strings, or lists of messages)    | PromptCompletion, Conversation |
| text          | text                                                  | PlainText          |

Any row may carry `references`; other keys are ignored. `text` beside another schema's keys is ignored too: published
sets often carry their rows' rendering under that name.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from lorakit.data.sources import Row
from lorakit.errors import DataError, FileError, nearest
from lorakit.files import parse_json

ROLES = {
    "system": "system", "developer": "system", "user": "user", "assistant": "assistant", "tool": "tool",
    "human": "user", "gpt": "assistant", "chatgpt": "assistant", "function_call": "assistant", "observation": "tool",
}  # fmt: skip
"""Role as written (OpenAI's, then ShareGPT's) -> role in templates, which know `developer` by its older name."""

_WRITTEN = {
    "messages": ("messages",), "conversations": ("conversations",), "alpaca": ("instruction", "output"),
    "prompt": ("prompt", "completion"), "preference": ("chosen", "rejected"), "text": ("text",),
}  # fmt: skip


@dataclass(frozen=True)
class ToolCall:
    """A call of a function by the assistant."""

    name: str
    arguments: Mapping[str, Any]
    id: str | None = None


@dataclass(frozen=True)
class Message:
    """One turn."""

    role: str
    """system, user, assistant or tool."""

    content: str
    tool_calls: tuple[ToolCall, ...] = ()
    reasoning: str | None = None
    """What the assistant thought before it answered; templates know it as `reasoning_content`."""

    name: str | None = None
    tool_call_id: str | None = None
    trained: bool = True
    """False for an assistant turn that is context only (OpenAI's `weight: 0`)."""

    def for_template(self) -> dict[str, Any]:
        """The message as chat templates expect it."""
        message: dict[str, Any] = {"role": self.role, "content": self.content}
        if self.tool_calls:
            message["tool_calls"] = [_call_for_template(call) for call in self.tool_calls]
        optional = {"reasoning_content": self.reasoning, "name": self.name, "tool_call_id": self.tool_call_id}
        return message | {key: value for key, value in optional.items() if value is not None}


@dataclass(frozen=True)
class Conversation:
    """Turns, of which the last is the assistant's."""

    messages: tuple[Message, ...]
    tools: tuple[Mapping[str, Any], ...] = ()
    """OpenAI tool objects: {"type": "function", "function": {"name": ..., "parameters": ...}}."""

    references: tuple[str, ...] = ()
    """Every acceptable last answer; empty: the last turn's content is the only one known."""

    dropped_turns: int = 0
    """Turns after the assistant's last one, which train nothing and are left out."""


@dataclass(frozen=True)
class PromptCompletion:
    """A prompt and its completion as plain strings."""

    prompt: str
    completion: str
    references: tuple[str, ...] = ()


@dataclass(frozen=True)
class PlainText:
    """A document, trained as a whole."""

    text: str


Parsed = Conversation | PromptCompletion | PlainText


def schema_of(fields: Mapping[str, Any]) -> str:
    """The schema's name in the table above, or "preference".

    Raises:
        DataError: no schema fits, or two do.
    """
    present = {key for key, value in fields.items() if value is not None}
    found = [name for name, keys in _WRITTEN.items() if present.issuperset(keys)]
    if len(found) > 1 and "text" in found:
        found.remove("text")
    if len(found) == 1:
        return found[0]
    accepted = "; ".join(" + ".join(keys) for name, keys in _WRITTEN.items() if name != "preference")
    if found:
        raise DataError(
            f"could be {' or '.join(found)}: keep the keys of one of them ({', '.join(sorted(present))} given)"
        )
    known = {key for keys in _WRITTEN.values() for key in keys}
    guesses = [f"{guess[0]!r} for {key!r}" for key in sorted(present - known) if (guess := nearest(key, known, 1))]
    hint = f"; did you mean {', '.join(guesses)}?" if guesses else ""
    raise DataError(f"keys {', '.join(sorted(present)) or '(none)'} fit no schema (accepted: {accepted}){hint}")


def parse_row(row: Row) -> Parsed:
    """What a row means.

    Raises:
        DataError: begins with the row's file and line.
    """
    try:
        return _PARSERS[schema_of(row.fields)](row.fields)
    except DataError as error:
        raise DataError(f"{row.origin}: {error}") from None


# ---------------------------------------------------------------- one function a schema


def _messages(fields: Mapping[str, Any]) -> Conversation:
    return _with_system(parse_messages(fields["messages"], "messages"), fields)


def _share_gpt(fields: Mapping[str, Any]) -> Conversation:
    return _with_system(parse_messages(fields["conversations"], "conversations"), fields)


def _with_system(messages: list[Message], fields: Mapping[str, Any]) -> Conversation:
    system = _system(fields)
    if system and messages[0].role == "system":
        raise DataError("has a 'system' key and a system turn: keep one")
    return _conversation([*system, *messages], fields)


def _alpaca(fields: Mapping[str, Any]) -> Conversation:
    question, extra = _string(fields, "instruction"), _string(fields, "input")
    messages = _system(fields)
    history = fields.get("history") or []
    if not isinstance(history, list):
        raise DataError(f"'history': expected a list of [question, answer] pairs, found {type(history).__name__}")
    for number, pair in enumerate(history, 1):
        if not isinstance(pair, list) or len(pair) != 2 or not all(isinstance(text, str) for text in pair):
            raise DataError(f"'history' {number}: expected a pair of strings [question, answer], found {pair!r}"[:200])
        messages += [Message("user", pair[0]), Message("assistant", pair[1])]
    messages.append(Message("user", f"{question}\n\n{extra}" if extra.strip() else question))
    messages.append(Message("assistant", _string(fields, "output")))
    return _conversation(messages, fields)


def _prompt(fields: Mapping[str, Any]) -> Conversation | PromptCompletion:
    prompt, completion = fields["prompt"], fields["completion"]
    if isinstance(prompt, str) and isinstance(completion, str):
        if not completion.strip():
            raise DataError("'completion' is empty: nothing to train")
        return PromptCompletion(prompt, completion, _references(fields))
    if not isinstance(prompt, list) or not isinstance(completion, list):
        kinds = f"{type(prompt).__name__} and {type(completion).__name__}"
        raise DataError(f"'prompt' and 'completion' must be two strings or two lists of messages, found {kinds}")
    turns = parse_messages(prompt, "prompt")
    context = [replace(message, trained=message.role != "assistant") for message in turns]
    return _conversation([*context, *parse_messages(completion, "completion")], fields)


def _preference(fields: Mapping[str, Any]) -> Parsed:
    raise DataError(
        "is a preference row (chosen, rejected); preference training is not in this version. "
        "To train on the preferred answers, name that key 'completion' and drop 'rejected'"
    )


def _text(fields: Mapping[str, Any]) -> PlainText:
    text = _string(fields, "text")
    if not text.strip():
        raise DataError("'text' is empty")
    return PlainText(text)


_PARSERS: dict[str, Callable[[Mapping[str, Any]], Parsed]] = {
    "messages": _messages, "conversations": _share_gpt, "alpaca": _alpaca, "prompt": _prompt,
    "preference": _preference, "text": _text,
}  # fmt: skip


# ---------------------------------------------------------------- parts


def _conversation(messages: Sequence[Message], fields: Mapping[str, Any]) -> Conversation:
    """Checks what concerns the turns together."""
    answers = [number for number, message in enumerate(messages) if message.role == "assistant"]
    if not answers:
        raise DataError("has no assistant turn: nothing to train")
    for number in answers:
        message = messages[number]
        if not message.content.strip() and not message.tool_calls:
            raise DataError(f"turn {number + 1}: the assistant's content is empty: nothing to train")
    if not any(messages[number].trained for number in answers):
        raise DataError("no assistant turn is trained (every weight is 0)")
    end = answers[-1] + 1
    return Conversation(
        tuple(messages[:end]), parse_tools(fields.get("tools")), _references(fields), len(messages) - end
    )


def parse_messages(value: Any, key: str = "messages") -> list[Message]:
    """Messages in OpenAI's or ShareGPT's spelling.

    Raises:
        DataError: names `key`, the turn and what is wrong with it.
    """
    if not isinstance(value, list) or not value:
        raise DataError(f"{key!r}: expected a list of messages, found {_kind(value)}")
    messages = []
    for number, item in enumerate(value, 1):
        try:
            messages.append(_message(item, number))
        except DataError as error:
            raise DataError(f"{key!r} turn {number}: {error}") from None
    return messages


def _message(item: Any, number: int) -> Message:
    """A turn in OpenAI's spelling (role, content) or ShareGPT's (from, value)."""
    if not isinstance(item, Mapping):
        raise DataError(f"expected an object, found {_kind(item)}")
    role_key, content_key = ("from", "value") if "from" in item else ("role", "content")
    if role_key not in item:
        guess = nearest("role", item) or nearest("from", item)
        hint = f"; did you mean 'role' for {guess[0]!r}?" if guess else ""
        raise DataError(f"has neither 'role' nor 'from' (keys: {', '.join(map(str, item))}){hint}")
    written = item[role_key]
    role = ROLES.get(written) if isinstance(written, str) else None
    if role is None:
        guess = nearest(written, ROLES) if isinstance(written, str) else []
        hint = f"; did you mean {guess[0]!r}?" if guess else ""
        raise DataError(f"unknown role {written!r} (known: {', '.join(ROLES)}){hint}")
    if item.get("function_call") is not None:
        raise DataError("'function_call' is OpenAI's old spelling; write it as 'tool_calls'")
    if written == "function_call":
        return Message("assistant", "", _calls_in_text(item.get(content_key), number))
    calls = _tool_calls(item.get("tool_calls"))
    if calls and role != "assistant":
        raise DataError(f"'tool_calls' in a turn of role {written!r}; only the assistant calls tools")
    if item.get(content_key) is None and not calls:
        guess = nearest(content_key, [key for key in item if key != role_key], 1)
        hint = f"; did you mean {content_key!r} for {guess[0]!r}?" if guess else ""
        raise DataError(f"has no {content_key!r} (keys: {', '.join(map(str, item))}){hint}")
    return Message(
        role,
        _content(item.get(content_key)),
        calls,
        reasoning=_optional(item, "reasoning_content") or _optional(item, "thinking"),
        name=_optional(item, "name"),
        tool_call_id=_optional(item, "tool_call_id"),
        trained=_trained(item.get("weight")),
    )


def _content(value: Any) -> str:
    """A string, or OpenAI's list of text parts (joined by line breaks, as vLLM serves them)."""
    if value is None or isinstance(value, str):
        return value or ""
    if not isinstance(value, list):
        raise DataError(f"content: expected a string or a list of text parts, found {_kind(value)}")
    texts = []
    for part in value:
        if not isinstance(part, Mapping) or part.get("type") != "text" or not isinstance(part.get("text"), str):
            kind = part.get("type") if isinstance(part, Mapping) else _kind(part)
            raise DataError(f'content: only text parts {{"type": "text", "text": ...}} are supported, found {kind!r}')
        texts.append(part["text"])
    return "\n".join(texts)


def _trained(weight: Any) -> bool:
    if weight is None:
        return True
    if weight not in (0, 1) or isinstance(weight, bool):
        raise DataError(f"'weight' must be 0 (context only) or 1, found {weight!r}")
    return bool(weight)


def _tool_calls(value: Any) -> tuple[ToolCall, ...]:
    if value is None:
        return ()
    if not isinstance(value, list):
        raise DataError(f"'tool_calls': expected a list, found {_kind(value)}")
    return tuple(_tool_call(item) for item in value)


def _tool_call(item: Any, default_id: str | None = None) -> ToolCall:
    """{"id", "type", "function": {"name", "arguments"}}, or the inner object alone; arguments may be JSON text."""
    function = item.get("function", item) if isinstance(item, Mapping) else None
    if not isinstance(function, Mapping) or not isinstance(function.get("name"), str) or not function["name"]:
        raise DataError(f"a tool call needs a function name: {item!r}"[:200])
    arguments = function.get("arguments", {})
    if isinstance(arguments, str):
        arguments = _json(arguments or "{}", f"arguments of {function['name']!r}")
    if not isinstance(arguments, Mapping):
        raise DataError(f"arguments of {function['name']!r}: expected an object, found {_kind(arguments)}")
    return ToolCall(function["name"], arguments, _optional(item, "id") or default_id)


def _calls_in_text(value: Any, number: int) -> tuple[ToolCall, ...]:
    """ShareGPT's function_call: JSON text of {"name", "arguments"}, or of a list of such objects."""
    if not isinstance(value, str):
        raise DataError(f"'value': expected JSON text of a function call, found {_kind(value)}")
    calls = _json(value, "function call")
    calls = calls if isinstance(calls, list) else [calls]
    if not calls:
        raise DataError("'value': the list of function calls is empty")
    return tuple(_tool_call(call, f"call_{number - 1}_{i}") for i, call in enumerate(calls))


def parse_tools(value: Any) -> tuple[Mapping[str, Any], ...]:
    """A list of tools, JSON text of one, or None; a bare function description is wrapped as OpenAI writes it.

    Raises:
        DataError: it is neither, or a tool has no function name.
    """
    if isinstance(value, str):
        value = _json(value, "'tools'") if value.strip() else None
    if value is None:
        return ()
    if not isinstance(value, list):
        raise DataError(f"'tools': expected a list, found {_kind(value)}")
    tools = []
    for item in value:
        tool = {"type": "function", "function": item} if isinstance(item, Mapping) and "function" not in item else item
        function = tool.get("function") if isinstance(tool, Mapping) else None
        if not isinstance(function, Mapping) or not isinstance(function.get("name"), str) or not function["name"]:
            raise DataError(f"'tools': a tool needs a function name: {item!r}"[:200])
        tools.append(tool)
    return tuple(tools)


def _references(fields: Mapping[str, Any]) -> tuple[str, ...]:
    value = fields.get("references")
    if value is None:
        return ()
    if not isinstance(value, list) or not value or not all(isinstance(item, str) for item in value):
        raise DataError(f"'references': expected a list of strings, found {_kind(value)}")
    return tuple(value)


def _system(fields: Mapping[str, Any]) -> list[Message]:
    text = _string(fields, "system")
    return [Message("system", text)] if text.strip() else []


def _string(fields: Mapping[str, Any], key: str) -> str:
    """The string under `key`; "" where there is none."""
    value = fields.get(key)
    if value is None:
        return ""
    if not isinstance(value, str):
        raise DataError(f"{key!r}: expected a string, found {_kind(value)}")
    return value


def _optional(item: Mapping[str, Any], key: str) -> str | None:
    return _string(item, key) or None


def _json(text: str, what: str) -> Any:
    try:
        return parse_json(text, what)
    except FileError as error:
        raise DataError(str(error)) from None


def _kind(value: Any) -> str:
    if isinstance(value, list):
        return "a list of other things" if value else "an empty list"
    return "null" if value is None else type(value).__name__


def _call_for_template(call: ToolCall) -> dict[str, Any]:
    written: dict[str, Any] = {
        "type": "function",
        "function": {"name": call.name, "arguments": dict(call.arguments)},
    }
    return written if call.id is None else {"id": call.id, **written}
