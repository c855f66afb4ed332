"""From rows to conversations: what a row means is told by its keys. Knows no tokenizer and no template.

| schema        | keys                                                  | becomes            |
|---------------|-------------------------------------------------------|--------------------|
| messages      | messages (OpenAI: role, content, tool_calls), tools   | Conversation       |
| conversations | conversations (ShareGPT: from, value), tools, system  | Conversation       |
| alpaca        | instruction, output, and input, system, history       | Conversation       |
| prompt        | prompt, completion (text, lists of messages), tools   | PromptCompletion, Conversation |
| text          | text                                                  | PlainText          |

Any row may carry `references`; other keys are ignored. `text` beside another schema's keys is ignored too: published
sets often carry their rows' rendering under that name.

`parse_row` wants an answer to train on. `parse_prompt` takes rows that end before it as well, and rows without `output`
or `completion`: those are asked.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from lorakit.data.sources import Row
from lorakit.errors import DataError, FileError, nearest
from lorakit.files import parse_json

ROLES = {
    "system": "system", "developer": "system", "user": "user", "assistant": "assistant", "tool": "tool",
    "function": "tool",
    "human": "user", "gpt": "assistant", "chatgpt": "assistant", "function_call": "assistant", "observation": "tool",
}  # fmt: skip
"""Role as written (OpenAI's, then ShareGPT's), in lower case -> role in templates, where developer is `system`."""

_WRITTEN = {
    "messages": ("messages",), "conversations": ("conversations",), "alpaca": ("instruction", "output"),
    "prompt": ("prompt", "completion"), "preference": ("chosen", "rejected"), "text": ("text",),
}  # fmt: skip
_ASKED = {"alpaca": ("instruction",), "prompt": ("prompt",)}  # what is left of these where the answer is not there

_BESIDE = {"tools", "system", "input", "history", "references"}  # keys that stand beside those

_PART_TYPES = {"text", "image", "image_url", "input_audio", "file"}  # of OpenAI's content parts


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
    """Turns, of which the last is the assistant's; from `parse_prompt`, it may be one that awaits an answer."""

    messages: tuple[Message, ...]
    tools: tuple[Mapping[str, Any], ...] = ()
    """OpenAI tool objects: {"type": "function", "function": {"name": ..., "parameters": ...}}."""

    references: tuple[str, ...] = ()
    """Every acceptable last answer; empty: the last turn's content is the only one known."""

    dropped_turns: int = 0
    """Turns after the assistant's last one, which train nothing and are left out."""

    @property
    def answered(self) -> bool:
        """Whether it ends with an answer."""
        return self.messages[-1].role == "assistant"

    @property
    def calls_tools(self) -> bool:
        """Whether the assistant calls a tool in it."""
        return any(message.tool_calls for message in self.messages)


@dataclass(frozen=True)
class PromptCompletion:
    """A prompt and its completion as plain strings."""

    prompt: str
    completion: str
    """Empty only from `parse_prompt`, where there is none."""

    references: tuple[str, ...] = ()

    @property
    def answered(self) -> bool:
        """Whether there is a completion."""
        return bool(self.completion)


@dataclass(frozen=True)
class PlainText:
    """A document, trained as a whole."""

    text: str


Parsed = Conversation | PromptCompletion | PlainText


def schema_of(fields: Mapping[str, Any], *, answered: bool = True) -> str:
    """The schema's name in the table above, or "preference".

    Args:
        fields: of a row.
        answered: whether the keys of the answer must be there.

    Raises:
        DataError: no schema fits, or two do.
    """
    present = {key for key, value in fields.items() if value is not None}
    found = [name for name, keys in _WRITTEN.items() if present.issuperset(keys)]
    if len(found) > 1 and "text" in found:
        found.remove("text")
    if not answered and found in ([], ["text"]):
        found = [name for name, keys in _ASKED.items() if present.issuperset(keys)] or found
    if len(found) == 1:
        return found[0]
    accepted = "; ".join(" + ".join(keys) for name, keys in _WRITTEN.items() if name != "preference")
    if found:
        raise DataError(
            f"could be {' or '.join(found)}: keep the keys of one of them ({', '.join(sorted(present))} given)"
        )
    known = {key for keys in _WRITTEN.values() for key in keys}
    strange = sorted(present - known - _BESIDE)
    guesses = [f"{guess[0]!r} for {key!r}" for key in strange if (guess := nearest(key, known, 1))]
    hint = f"; did you mean {', '.join(guesses)}?" if guesses else ""
    raise DataError(f"keys {', '.join(sorted(present)) or '(none)'} fit no schema (accepted: {accepted}){hint}")


def parse_row(row: Row) -> Parsed:
    """What a row means.

    Raises:
        DataError: begins with the row's file and line.
    """
    try:
        return _PARSERS[schema_of(row.fields)](row.fields, True)
    except DataError as error:
        raise DataError(f"{row.origin}: {error}") from None


def parse_prompt(row: Row) -> Conversation | PromptCompletion:
    """What a row asks. It may end before the answer (`answered` says so); turns after an earlier answer stay.

    Raises:
        DataError: the row fits no schema or asks nothing, as a text row; begins with the row's file and line.
    """
    try:
        parsed = _PARSERS[schema_of(row.fields, answered=False)](row.fields, False)
    except DataError as error:
        raise DataError(f"{row.origin}: {error}") from None
    assert not isinstance(parsed, PlainText)
    return parsed


# ---------------------------------------------------------------- one function a schema
# `answered`: whether there must be an answer to train on


def _messages(fields: Mapping[str, Any], answered: bool) -> Conversation:
    return _with_system(parse_messages(fields["messages"], "messages"), fields, answered)


def _share_gpt(fields: Mapping[str, Any], answered: bool) -> Conversation:
    return _with_system(parse_messages(fields["conversations"], "conversations"), fields, answered)


def _with_system(messages: list[Message], fields: Mapping[str, Any], answered: bool) -> Conversation:
    system = _system(fields)
    if system and messages[0].role == "system":
        raise DataError("has a 'system' key and a system turn: keep one")
    return _conversation([*system, *messages], fields, answered)


def _alpaca(fields: Mapping[str, Any], answered: bool) -> Conversation:
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
    return _conversation(messages, fields, answered)


def _prompt(fields: Mapping[str, Any], answered: bool) -> Conversation | PromptCompletion:
    prompt, completion = fields["prompt"], fields.get("completion")
    if not completion or (isinstance(completion, str) and not completion.strip()):
        if answered:
            raise DataError("'completion' is empty: nothing to train")
        completion = ""
    if isinstance(prompt, str) and isinstance(completion, str) and not fields.get("tools"):
        return PromptCompletion(prompt, completion, _references(fields))
    turns = _turns(prompt, "prompt", "user")
    messages = [replace(message, trained=message.role != "assistant") for message in turns]  # context
    if completion:
        messages += _turns(completion, "completion", "assistant")
    elif messages[-1].role == "assistant":
        raise DataError("'prompt' ends with an answer and there is no 'completion': nothing is asked")
    return _conversation(messages, fields, answered)


def _preference(fields: Mapping[str, Any], answered: bool) -> Parsed:
    raise DataError(
        "is a preference row (chosen, rejected); preference training is not in this version. "
        "To train on the preferred answers, name that key 'completion' and drop 'rejected'"
    )


def _text(fields: Mapping[str, Any], answered: bool) -> PlainText:
    if not answered:
        raise DataError("a text row has no prompt to answer")
    text = _string(fields, "text")
    if not text.strip():
        raise DataError("'text' is empty")
    return PlainText(text)


_PARSERS: dict[str, Callable[[Mapping[str, Any], bool], Parsed]] = {
    "messages": _messages, "conversations": _share_gpt, "alpaca": _alpaca, "prompt": _prompt,
    "preference": _preference, "text": _text,
}  # fmt: skip


# ---------------------------------------------------------------- parts


def _conversation(messages: Sequence[Message], fields: Mapping[str, Any], answered: bool) -> Conversation:
    """Checks what concerns the turns together."""
    tools, references = parse_tools(fields.get("tools")), _references(fields)
    if not answered and len(messages) > 1 and _is_blank_answer(messages[-1]):
        messages = messages[:-1]
    if not answered and messages[-1].role != "assistant":
        return Conversation(tuple(messages), tools, references)
    answers = [number for number, message in enumerate(messages) if message.role == "assistant"]
    if not answers:
        raise DataError("has no assistant turn: nothing to train")
    for number in answers:
        if _is_blank_answer(messages[number]):
            raise DataError(f"turn {number + 1}: the assistant's content is empty: nothing to train")
    if not any(messages[number].trained for number in answers):
        raise DataError("no assistant turn is trained (every weight is 0)")
    end = answers[-1] + 1
    return Conversation(tuple(messages[:end]), tools, references, len(messages) - end)


def _is_blank_answer(message: Message) -> bool:
    return message.role == "assistant" and not message.content.strip() and not message.tool_calls


def _turns(value: Any, key: str, role: str) -> list[Message]:
    """A list of messages, or a string, which is one turn of `role`."""
    if isinstance(value, str):
        return [Message(role, value)]
    if not isinstance(value, list):
        raise DataError(f"{key!r}: expected a string or a list of messages, found {_kind(value)}")
    return parse_messages(value, key)


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
    role = ROLES.get(written.lower()) if isinstance(written, str) else None
    if role is None:
        guess = nearest(written, ROLES) if isinstance(written, str) else []
        hint = f"; did you mean {guess[0]!r}?" if guess else ""
        raise DataError(f"unknown role {written!r} (known: {', '.join(ROLES)}){hint}")
    if item.get("function_call") is not None:
        raise DataError("'function_call' is OpenAI's old spelling; write it as 'tool_calls'")
    if written.lower() == "function_call":
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
        _result(item.get(content_key)) if role == "tool" else _content(item.get(content_key)),
        calls,
        reasoning=_optional(item, "reasoning_content") or _optional(item, "thinking"),
        name=_optional(item, "name"),
        tool_call_id=_optional(item, "tool_call_id"),
        trained=_trained(item.get("weight")),
    )


def _result(value: Any) -> str:
    """What a tool returned: content as in any turn, or an object or array, which becomes compact JSON."""
    parts = isinstance(value, list) and any(isinstance(i, Mapping) and i.get("type") in _PART_TYPES for i in value)
    if isinstance(value, list | Mapping) and not parts:
        return json.dumps(value, ensure_ascii=False, separators=(",", ":"))
    return _content(value)


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
    """{"id", "type", "function": {"name", "arguments"}}, or the inner object alone.

    Arguments may be JSON text; null is none.
    """
    function = item.get("function", item) if isinstance(item, Mapping) else None
    if not isinstance(function, Mapping) or not isinstance(function.get("name"), str) or not function["name"]:
        raise DataError(f"a tool call needs a function name: {item!r}"[:200])
    arguments = function.get("arguments")
    if arguments is None:
        arguments = {}
    if isinstance(arguments, str):
        arguments = _json(arguments or "{}", f"arguments of {function['name']!r}")
    if not isinstance(arguments, Mapping):
        raise DataError(f"arguments of {function['name']!r}: expected an object, found {_kind(arguments)}")
    return ToolCall(function["name"], arguments, _optional(item, "id") or default_id)


def _calls_in_text(value: Any, number: int) -> tuple[ToolCall, ...]:
    """ShareGPT's function_call: {"name", "arguments"} or a list of such objects, as JSON text or as it is."""
    if not isinstance(value, str | list | Mapping):
        raise DataError(f"'value': expected a function call as JSON, found {_kind(value)}")
    calls = _json(value, "function call") if isinstance(value, str) else value
    calls = calls if isinstance(calls, list) else [calls]
    if not calls:
        raise DataError("'value': the list of function calls is empty")
    return tuple(_tool_call(call, f"call_{number - 1}_{i}") for i, call in enumerate(calls))


def parse_tools(value: Any) -> tuple[Mapping[str, Any], ...]:
    """A list of tools, one tool, JSON text of either, or None; a bare description is wrapped as OpenAI writes it.

    Raises:
        DataError: it is none of these, or a tool has no function name.
    """
    if isinstance(value, str):
        value = _json(value, "'tools'") if value.strip() else None
    if value is None:
        return ()
    if isinstance(value, Mapping):
        value = [value]
    if not isinstance(value, list):
        raise DataError(f"'tools': expected a list of tools or one tool, found {_kind(value)}")
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
    if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
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
