"""From a row to token ids and which of them are trained: `ChatFormat`. Knows templates and masks, no batches.

The mask is found by position. For the assistant turn at place i of a conversation, the prompt P is what a server would
send, `render(messages[:i], add_generation_prompt=True)`; the text with the answer is F = `render(messages[:i+1])`. P
must be a prefix of F; what follows it, up to and including the first token at which generation stops, is what is
trained. No marker is searched, so no text can imitate one.

Turns of a conversation share one sequence as long as the tokens so far are a prefix of the next turn's P. Where a
template rewrites the history (strips think blocks, ends only the last turn), they are not; the later turn then gets an
example of its own. So every trained token has exactly the context it will have in serving, and every trained turn is
trained once.

A template that prints today's date has one fixed day in rows (`rendering.dated`): what is trained and measured is the
same tomorrow. Prompts that somebody asks (`prompt_ids`, `ids_before_answer`) have today's.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any, Literal

from lorakit.data.rendering import (
    FIXED_DAY,
    check_continuation,
    check_prompt,
    choose_template,
    dated,
    render,
    shows_tools,
    starts_with_bos,
    with_template,
    writes_chatml,
)
from lorakit.data.schema import (
    Conversation,
    Message,
    PlainText,
    PromptCompletion,
    parse_messages,
    parse_prompt,
    parse_row,
    parse_tools,
)
from lorakit.data.sources import Origin, Row
from lorakit.errors import ConfigError, DataError, ModelError
from lorakit.models import stop_ids as find_stop_ids

_NO_PROMPT = "the first turn is the assistant's: there is no prompt that it answers"
PROMPT_SHARE = 4  # of a row that must be cut, the prompt keeps at least one part in four before the answer is cut


@dataclass(frozen=True)
class Example:
    """One sequence to train on."""

    ids: list[int]
    """Token ids, at most max_length."""

    trained: list[bool]
    """Same length: whether token i is a target. Never the first, at least one other."""

    origin: Origin
    """The row it came from."""

    ends: bool = True
    """Whether its last token is an end token; False for a cut answer and for all but the last window of a long text."""

    prompt_cut: int = 0
    """Tokens of the prompt that were left out to stay within max_length."""

    answer_cut: int = 0
    """Tokens of the answer's end that were left out: it alone was too long."""

    eos_appended: bool = False
    """Whether the end token is ours: the template put none after the answer."""


@dataclass(frozen=True)
class Prompt:
    """What a server would send for a row's last answer."""

    ids: list[int]
    references: tuple[str, ...]
    """Every acceptable answer: the row's references, or else its own answer."""

    origin: Origin


@dataclass(frozen=True)
class WrittenTurn:
    """An assistant turn in its context, as text."""

    prompt: str
    full: str
    """The prompt and all that follows it."""

    answer: str
    """The answer as the template writes it, without its end."""


@dataclass(frozen=True)
class Written:
    """A row as text. All that could be refused has been: what is left is to look up tokens."""

    origin: Origin
    turns: tuple[WrittenTurn, ...]
    """Those to train; none for a plain text."""

    conversation: Conversation | None = None
    """What a template wrote; None where none did."""

    text: str = ""
    """A plain text, trained as a whole."""

    def texts(self) -> Iterator[str]:
        """Every text of which the tokens will be wanted (of few rows, of some more)."""
        if not self.turns:
            yield self.text
        for turn in self.turns:
            yield turn.prompt
            yield turn.full


@dataclass(frozen=True)
class _Turn:
    """An assistant turn in its context, as tokens."""

    prompt: list[int]
    answer: list[int]
    """Ends with a stop token."""

    eos_appended: bool


class ChatFormat:
    """How rows become tokens for one tokenizer. Stateless: rows may be encoded in any order.

    Args:
        tokenizer: a transformers tokenizer; left as it is.
        stop_ids: ids at which generation stops (`models.stop_ids`); those of the chosen template are added.
        max_length: most tokens of an example.
        chat_template: see `rendering.choose_template`.
        train_on: "assistant" trains assistant turns and their end token, "all" every token.

    Raises:
        ConfigError: an unknown template or train_on.
        ModelError: the tokenizer names no end token.
    """

    tokenizer: Any
    """The tokenizer with `template` set: what is saved beside an adapter."""

    template: str | None
    """Text of the chat template in use."""

    template_origin: str
    """Where the template comes from, for people."""

    stop_ids: frozenset[int]
    """Every id at which generation stops with this template."""

    def __init__(
        self,
        tokenizer: Any,
        stop_ids: frozenset[int],
        max_length: int,
        chat_template: str = "auto",
        train_on: Literal["assistant", "all"] = "assistant",
    ) -> None:
        if train_on not in ("assistant", "all"):
            raise ConfigError(f"train_on: must be assistant or all (got {train_on!r})")
        if max_length < 2:
            raise ConfigError(f"max_length: must be at least 2 (got {max_length})")
        self.template = choose_template(tokenizer, chat_template)
        self.template_origin = _origin_of(chat_template, self.template)
        self.tokenizer = with_template(tokenizer, self.template)
        self._dated = with_template(tokenizer, None if self.template is None else dated(self.template))
        self.stop_ids = stop_ids | find_stop_ids(None, self.tokenizer)
        if not self.stop_ids:
            raise ModelError("the tokenizer names no end token (eos_token), so no answer could end")
        self.max_length = max_length
        self.train_on = train_on
        self._choice = chat_template
        eos = tokenizer.eos_token_id
        self._eos: int = min(self.stop_ids) if eos is None else eos
        self._start: list[int] = [tokenizer.bos_token_id] if starts_with_bos(tokenizer) else []
        self._stop_texts = [text for text in tokenizer.convert_ids_to_tokens(sorted(self.stop_ids)) if text]

    # ------------------------------------------------------------ what callers use

    def encode(self, row: Row) -> list[Example]:
        """A row's examples: one, or several where a template rewrites history or the row is long.

        The plain way; `encoding.encode_rows` does the same for many rows in less time.

        Raises:
            DataError: begins with the row's file and line.
        """
        return self.examples(self.write(row), self.ids)

    def write(self, row: Row) -> Written:
        """A row as text.

        Raises:
            DataError: begins with the row's file and line.
        """
        parsed = parse_row(row)
        if isinstance(parsed, PlainText):
            return Written(row.origin, (), text=parsed.text)
        try:
            if isinstance(parsed, PromptCompletion):
                if self.template is None:
                    return Written(row.origin, (_plain_turn(parsed, self._stop_texts),))
                parsed = _as_conversation(parsed)
            return Written(row.origin, self._turns(parsed), parsed)
        except DataError as error:
            raise DataError(f"{row.origin}: {error}") from error

    def examples(self, written: Written, ids: Callable[[str], list[int]]) -> list[Example]:
        """A written row's examples.

        Args:
            written: by this format.
            ids: `self.ids`, or what gives the same.
        """
        if not written.turns:
            tokens = self._begun(ids(written.text))
            ended = tokens[-1] in self.stop_ids
            whole = tokens if ended else [*tokens, self._eos]
            return list(self._windows(whole, written.origin, eos_appended=not ended))
        if self.train_on == "all":
            turn = self._split(written.turns[-1], written, ids)
            return list(self._windows([*turn.prompt, *turn.answer], written.origin, turn.eos_appended))
        return self._joined([self._split(turn, written, ids) for turn in written.turns], written)

    def ids(self, text: str) -> list[int]:
        """Tokens of text that brings its own special tokens: none are added, so BOS is never doubled."""
        ids: list[int] = self.tokenizer(text, add_special_tokens=False, verbose=False).input_ids
        return ids

    def ids_of_all(self, texts: Sequence[str]) -> list[list[int]]:
        """`ids` of each of them, in one call: a fast tokenizer divides them among the processor's cores."""
        if not texts:
            return []
        ids: list[list[int]] = self.tokenizer(
            list(texts),
            add_special_tokens=False,
            return_attention_mask=False,
            return_token_type_ids=False,
            verbose=False,
        ).input_ids
        return ids

    def for_rows(self, rows: Sequence[Row]) -> ChatFormat:
        """This format, or the one with `chatml-tools` if rows have tools or calls that this one leaves out.

        Only where the template is left to us ("auto") and the tokenizer's own is ChatML itself, so that turns stay
        written as the model knows them; elsewhere such rows are refused.
        """
        if self._choice != "auto" or self.template is None:
            return self
        tools, calls = shows_tools(self.tokenizer)

        def loses_tools(row: Row) -> bool:
            try:
                asked = parse_prompt(row)
            except DataError:
                return False  # whoever reads the row says what is wrong with it
            if isinstance(asked, PromptCompletion):
                return False
            return bool(asked.tools and not tools) or (asked.calls_tools and not calls)

        if (tools and calls) or not writes_chatml(self.tokenizer) or not any(map(loses_tools, rows)):
            return self
        chosen = ChatFormat(self.tokenizer, self.stop_ids, self.max_length, "chatml-tools", self.train_on)
        chosen.template_origin = "chatml-tools, since the tokenizer's own shows no tools"
        return chosen

    def prompt(self, row: Row) -> Prompt:
        """The context of a row's last answer, and what is accepted there: the row's references, else its own answer.

        A row with references may end before that answer.

        Raises:
            DataError: the row has no prompt (a text row), neither answer nor references, or cannot be rendered; begins
                with its file and line.
        """
        asked = parse_prompt(row)
        try:
            if not asked.answered and not asked.references:
                asked = _until_last_answer(asked)
            if isinstance(asked, PromptCompletion):
                if self.template is None:
                    return Prompt(
                        self._begun(self.ids(asked.prompt)), asked.references or (asked.completion,), row.origin
                    )
                asked = _as_conversation(asked)
            if not asked.answered:
                return Prompt(self._asked(asked.messages, asked.tools, self._dated), asked.references, row.origin)
            turn, last = self._turn(asked, len(asked.messages) - 1), asked.messages[-1]
            answer = turn.answer.strip() if last.tool_calls else last.content
            return Prompt(self.ids(turn.prompt), asked.references or (answer,), row.origin)
        except DataError as error:
            raise DataError(f"{row.origin}: {error}") from error

    def ids_before_answer(self, asked: Conversation | PromptCompletion) -> list[int]:
        """Ids of what a row asks (`schema.parse_prompt`): all that stands before its last answer, if it has one.

        Raises:
            DataError: nothing stands before it, the template refuses the messages, or there is none.
        """
        if isinstance(asked, PromptCompletion):
            return self.prompt_ids(asked.prompt)
        messages = asked.messages[:-1] if asked.answered else asked.messages
        if not messages:
            raise DataError(_NO_PROMPT)
        return self._asked(messages, asked.tools, self.tokenizer)

    def prompt_ids(self, prompt: str | Sequence[Mapping[str, Any]], tools: Any = None) -> list[int]:
        """Ids of a prompt without an answer: messages, or a string (one user turn; plain text without a template).

        Args:
            prompt: in any spelling a row may have.
            tools: as under a row's `tools`.

        Raises:
            DataError: messages or tools that are none, that the template refuses, or that have no template.
        """
        if isinstance(prompt, str):
            if self.template is None:
                return self._begun(self.ids(prompt))
            prompt = [{"role": "user", "content": prompt}]
        return self._asked(parse_messages(list(prompt)), parse_tools(tools), self.tokenizer)

    def _asked(self, messages: Sequence[Message], tools: Sequence[Mapping[str, Any]], tokenizer: Any) -> list[int]:
        """Ids of messages with the template's generation prompt."""
        self._require_template()
        text = render(tokenizer, messages, tools, add_generation_prompt=True)
        check_prompt(text, messages, tools)
        return self.ids(text)

    # ------------------------------------------------------------ turns

    def _turns(self, conversation: Conversation) -> tuple[WrittenTurn, ...]:
        """The turns to train."""
        places = [i for i, m in enumerate(conversation.messages) if m.role == "assistant"]
        if self.train_on == "assistant":
            places = [i for i in places if conversation.messages[i].trained]
        return tuple(self._turn(conversation, place) for place in places)

    def _turn(self, conversation: Conversation, place: int) -> WrittenTurn:
        """The assistant turn at `messages[place]`."""
        self._require_template()
        messages, tools = conversation.messages, conversation.tools
        message, context = messages[place], messages[:place]
        if not context:
            raise DataError(_NO_PROMPT)
        arguments = [json.dumps(dict(call.arguments), ensure_ascii=False) for call in message.tool_calls]
        for text in self._stop_texts:
            if any(text in said for said in (message.content, message.reasoning or "", *arguments)):
                raise DataError(f"turn {place + 1}: the answer holds {text!r}, at which generation stops; remove it")
        prompt = render(self._dated, context, tools, add_generation_prompt=True)
        full = render(self._dated, messages[: place + 1], tools, add_generation_prompt=False)
        if not full.startswith(prompt):
            raise DataError(_mismatch(prompt, full, place))
        continuation = full[len(prompt) :]
        ends = [found for text in self._stop_texts if (found := continuation.find(text)) >= 0]
        answer_text = continuation[: min(ends)] if ends else continuation
        check_prompt(prompt, context, tools)
        check_continuation(answer_text, message)
        return WrittenTurn(prompt, full, answer_text)

    # ------------------------------------------------------------ tokens of turns

    def _split(self, turn: WrittenTurn, written: Written, ids: Callable[[str], list[int]]) -> _Turn:
        """Tokens of prompt and answer: of both together, as models know text, unless a token would span the border."""
        prompt, full = ids(turn.prompt), ids(turn.full)
        if written.conversation is None:
            prompt, full = self._begun(prompt), self._begun(full)
        size = len(prompt)
        answer = full[size:] if full[:size] == prompt else ids(turn.full[len(turn.prompt) :])
        stops = [place for place, token in enumerate(answer) if token in self.stop_ids]
        if stops:
            return _Turn(prompt, answer[: stops[0] + 1], False)
        return _Turn(prompt, [*answer, self._eos], True)

    def _begun(self, ids: list[int]) -> list[int]:
        """Tokens of text without a template, begun with BOS where the tokenizer does so and the text does not."""
        return ids if ids[:1] == self._start else self._start + ids

    def _head(self, conversation: Conversation, prompt: list[int]) -> int:
        """How many of the prompt's first tokens a cut should keep: BOS and the system turn."""
        system = 0
        while conversation.messages[system].role == "system":
            system += 1
        beginning = prompt[:1] if prompt[:1] == [self.tokenizer.bos_token_id] else []
        if system:
            try:
                text = render(
                    self._dated, conversation.messages[:system], conversation.tools, add_generation_prompt=False
                )
                beginning = self.ids(text)
            except DataError:
                pass  # a template that writes the system turn into the user's cannot render it alone
        return _common_length(beginning, prompt)

    # ------------------------------------------------------------ examples

    def _joined(self, turns: Sequence[_Turn], written: Written) -> list[Example]:
        """One example, as long as the tokens so far are a prefix of the next turn's prompt; then another."""
        examples: list[Example] = []
        for turn in turns:
            example = self._example(turn, written)
            before = examples[-1] if examples else None
            if before is not None and not example.prompt_cut and turn.prompt[: len(before.ids)] == before.ids:
                trained = before.trained + example.trained[len(before.ids) :]
                examples[-1] = replace(example, trained=trained)
            else:
                examples.append(example)
        return examples

    def _example(self, turn: _Turn, written: Written) -> Example:
        """Prompt and answer, cut to max_length so that the answer and its end stay.

        First the prompt is cut, from the left but behind its head; only an answer that leaves it less than a quarter of
        max_length is cut too, at its end.
        """
        most_answer = self.max_length - min(len(turn.prompt), max(1, self.max_length // PROMPT_SHARE))
        answer = turn.answer[:most_answer]
        room = self.max_length - len(answer)
        prompt = turn.prompt
        if len(prompt) > room:
            head = 0 if written.conversation is None else self._head(written.conversation, prompt)
            head = head if 2 * head <= room else 0
            prompt = prompt[:head] + prompt[len(prompt) - room + head :]
        trained = [False] * len(prompt) + [True] * len(answer)
        trained[0] = False  # an empty prompt without BOS: nothing comes before the answer's first token
        answer_cut = len(turn.answer) - len(answer)
        return Example(
            prompt + answer,
            trained,
            written.origin,
            ends=not answer_cut,
            prompt_cut=len(turn.prompt) - len(prompt),
            answer_cut=answer_cut,
            eos_appended=turn.eos_appended and not answer_cut,
        )

    def _windows(self, ids: list[int], origin: Origin, eos_appended: bool) -> Iterator[Example]:
        """Every token trained but the first; a long row in windows that share one token, so that none is lost."""
        starts = [*range(0, len(ids) - 1, self.max_length - 1), len(ids) - 1]
        for start, following in pairwise(starts):
            window = ids[start : following + 1]
            last = following == len(ids) - 1
            yield Example(
                window, [False] + [True] * (len(window) - 1), origin, ends=last, eos_appended=last and eos_appended
            )

    def _require_template(self) -> None:
        if self.template is None:
            raise DataError(
                "messages need a chat template, and the tokenizer has none (or none was asked for): "
                "use --chat-template chatml, or chatml-tools for tools"
            )


def _plain_turn(pair: PromptCompletion, stop_texts: Sequence[str]) -> WrittenTurn:
    """Prompt and completion without a template; the completion may bring its own end token."""
    ends = [(found, text) for text in stop_texts if (found := pair.completion.find(text)) >= 0]
    for place, text in ends:
        if pair.completion[place + len(text) :].strip():
            raise DataError(f"'completion' holds {text!r}, at which generation stops, before its end; remove it")
    return WrittenTurn(pair.prompt, pair.prompt + pair.completion, pair.completion)


def _as_conversation(pair: PromptCompletion) -> Conversation:
    """Strings with a chat template are one user turn and one assistant turn, if there is a completion."""
    turns = (Message("user", pair.prompt), Message("assistant", pair.completion))
    return Conversation(turns if pair.answered else turns[:1], (), pair.references)


def _until_last_answer(asked: Conversation | PromptCompletion) -> Conversation:
    """Without the turns that follow the last answer, to which nothing can be compared."""
    messages = asked.messages if isinstance(asked, Conversation) else ()
    ends = [number for number, message in enumerate(messages, 1) if message.role == "assistant"]
    if isinstance(asked, PromptCompletion) or not ends:
        raise DataError("has no answer, and no 'references' that an answer could be compared with")
    return replace(asked, messages=messages[: ends[-1]])


def _origin_of(chat_template: str, template: str | None) -> str:
    if template is None:
        return "none"
    origin = "the tokenizer's own" if chat_template == "auto" else chat_template
    return origin if dated(template) == template else f"{origin}, dated {FIXED_DAY:%d %B %Y}"


def _common_length(one: Sequence[Any], other: Sequence[Any]) -> int:
    """How many first items are equal."""
    return next((i for i, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))


def _mismatch(prompt: str, full: str, place: int) -> str:
    at = _common_length(prompt, full)
    begin, end = max(0, at - 30), at + 50
    return (
        f"turn {place + 1}: prompt of training differs from prompt of generation: the chat template begins the "
        f"answer with {prompt[begin:end]!r} when it asks for one, and has {full[begin:end]!r} there when it shows one"
    )
