"""The gate that `check` and `train` share: rows become examples, or reasons why not. Knows no model and no training.

Also what is done with whole data sets: hold out validation rows, and find what training and validation rows share.
"""

from __future__ import annotations

import hashlib
from collections import defaultdict
from collections.abc import Hashable, Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from lorakit.data.chat import ChatFormat, Example
from lorakit.data.encoding import encode_rows
from lorakit.data.schema import Conversation, Parsed, PlainText, PromptCompletion, parse_row, schema_of
from lorakit.data.sources import Origin, Row, each_row, read_rows
from lorakit.data.statistics import Statistics, measure
from lorakit.data.token_cache import cached_examples
from lorakit.errors import DataError, bullet_list

_UNTRAINABLE = "{bad} row(s) cannot be trained on"

VALIDATION_SPLITS = ("validation", "test")  # of a data set that is named for validation, the first that it has
MOST_HELD_OUT = 500  # rows: a validation loss is known to a few per cent then, and evaluations stay cheap


@dataclass(frozen=True)
class Dataset:
    """Rows that passed the gate."""

    rows: tuple[Row, ...]
    examples: tuple[Example, ...]
    """In the order of the rows; a row may have several."""

    statistics: Statistics


@dataclass(frozen=True)
class Overlap:
    """Validation rows that training rows give away."""

    rows: int
    """Validation rows that are also training rows."""

    prompts: int
    """Validation rows whose prompt is also a training row's (those of `rows` included)."""


@dataclass(frozen=True)
class TrainingData:
    """Training rows past the gate, without validation rows: none were given, and these leave none to hold out."""

    train: Dataset
    chat_format: ChatFormat
    """What made the tokens: the one given, or the one that shows the rows' tools."""

    def statistics(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return {"training": self.train.statistics.to_dict(), "validation": None, "overlap": None}

    def lines(self) -> tuple[str, ...]:
        """What a person should know, a few lines."""
        need = f"train will need --validation FILE: {_nothing_held_out(self.train.rows)}"
        return (*summary(self.train.statistics), f"note   {need}")


@dataclass(frozen=True)
class Data(TrainingData):
    """Training and validation rows of a run, past the gate."""

    valid: Dataset
    held_out: bool
    """Whether the validation rows were taken from the training rows' source."""

    overlap: Overlap

    def statistics(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return {
            "training": self.train.statistics.to_dict(),
            "validation": self.valid.statistics.to_dict(),
            "overlap": {**asdict(self.overlap), "held_out": self.held_out},
        }

    def lines(self) -> tuple[str, ...]:
        """What a person should know, a few lines."""
        return summary(self.train.statistics, self.valid.statistics, self.overlap, self.held_out)


# ---------------------------------------------------------------- the gate


def prepare(rows: Sequence[Row] | str | Path, chat_format: ChatFormat, *, token_cache: bool = True) -> Dataset:
    """Turn rows into examples.

    Args:
        rows: rows, or where to read them.
        chat_format: makes the tokens.
        token_cache: whether tokens of many rows may be read from the user's cache folder, and kept there.

    Raises:
        DataError: rows that cannot be read, fit no schema, that the template cannot show whole, or that would train
            nothing or the wrong thing: the first 20 with file, line and cause. Nothing is returned then.
    """
    rows = read_rows(rows) if isinstance(rows, str | Path) else rows
    if not rows:
        raise DataError("no rows")
    parsed = each_row(parse_row, rows, _UNTRAINABLE)

    def encode() -> list[list[Example]]:
        return encode_rows(rows, chat_format, _UNTRAINABLE)

    examples = cached_examples(rows, parsed, chat_format, encode) if token_cache else encode()
    _refuse_wrong_masks(examples, chat_format)
    schemas = [schema_of(row.fields) for row in rows]
    statistics = measure(rows, parsed, schemas, examples, chat_format)
    _refuse_no_end(statistics)
    return Dataset(tuple(rows), tuple(example for of_row in examples for example in of_row), statistics)


def _refuse_wrong_masks(examples: Iterable[Sequence[Example]], chat_format: ChatFormat) -> None:
    """The last look before training, at the tokens themselves: whatever made them, these hold."""
    problems = []
    for example in (example for of_row in examples for example in of_row):
        if not any(example.trained):
            problems.append(f"{example.origin}: no token is trained")
        elif example.trained[0]:
            problems.append(f"{example.origin}: the first token is trained, which nothing predicts")
        elif example.ends and not (example.trained[-1] and example.ids[-1] in chat_format.stop_ids):
            problems.append(f"{example.origin}: the end token is not trained")
    if problems:
        raise DataError(f"{len(problems)} row(s) would train nothing or the wrong thing:\n{bullet_list(problems)}")


def _refuse_no_end(statistics: Statistics) -> None:
    """Where most answers are cut, a model learns to go on for ever."""
    if 2 * statistics.answers_cut > statistics.rows:
        raise DataError(
            f"the answers of {statistics.answers_cut:,} of {statistics.rows:,} rows are longer than --max-length "
            f"{statistics.max_length:,} allows, so their end token would not be learned; "
            f"raise it (the longest row has {statistics.length_uncut_max:,} tokens)"
        )


# ---------------------------------------------------------------- training and validation


def read_data(
    data: str | Path,
    validation: str | Path | None,
    share: float,
    seed: int,
    chat_format: ChatFormat,
    *,
    token_cache: bool = True,
) -> Data:
    """Training and validation rows, past the gate.

    Args:
        data: see `read_rows`; of a data set, the split `train` unless it names another.
        validation: likewise, but the split `validation`, or else `test`; None holds out `share` of `data`.
        share: of the rows held out.
        seed: of the choice.
        chat_format: makes the tokens; `Data.chat_format` is the one that did.
        token_cache: see `prepare`.

    Raises:
        DataError: with the reasons, see `prepare`; or no validation rows are given and none can be held out.
    """
    found = inspect_data(data, validation, share, seed, chat_format, token_cache=token_cache)
    if not isinstance(found, Data):
        raise DataError(f"{data}: {_nothing_held_out(found.train.rows)}; give validation rows with --validation FILE")
    return found


def inspect_data(
    data: str | Path,
    validation: str | Path | None,
    share: float,
    seed: int,
    chat_format: ChatFormat,
    *,
    token_cache: bool = True,
) -> TrainingData:
    """As `read_data`, but where no validation rows can be held out, the training rows alone.

    Raises:
        DataError: with the reasons, see `prepare`.
    """
    rows = read_rows(data)
    if validation is None:
        train_rows, valid_rows = split(rows, share, seed)
    else:
        train_rows, valid_rows = rows, read_rows(validation, VALIDATION_SPLITS)
    chat_format = chat_format.for_rows([*train_rows, *valid_rows])
    train = prepare(train_rows, chat_format, token_cache=token_cache)
    if not valid_rows:
        return TrainingData(train, chat_format)
    shared = overlap(train_rows, valid_rows)
    valid = prepare(valid_rows, chat_format, token_cache=token_cache)
    return Data(train, chat_format, valid, validation is None, shared)


def split(rows: Sequence[Row], share: float, seed: int) -> tuple[list[Row], list[Row]]:
    """Hold out validation rows by a hash of their content and the seed, whatever the order of the file.

    Rows with the same prompt stay together: a model that has seen one answer of a prompt would be measured on it. Where
    that leaves no choice (all rows share few prompts), only equal rows do. A lone document is cut near its end.

    Args:
        rows: each must fit a schema.
        share: of the rows to hold out, at least 1 and at most `MOST_HELD_OUT` rows.
        seed: another seed holds out other rows.

    Returns:
        (training rows, validation rows), each in the order given; no validation rows where all rows say the same.

    Raises:
        DataError: bad rows.
    """
    parsed = each_row(parse_row, rows, _UNTRAINABLE)
    if len(rows) == 1 and isinstance(parsed[0], PlainText):
        return _split_document(rows[0], parsed[0].text, share)
    wanted = min(max(round(share * len(rows)), 1), MOST_HELD_OUT, len(rows) - 1)
    held_out = _choose([_prompt_of(each) for each in parsed], wanted, seed) or _choose(parsed, wanted, seed)
    train = [row for number, row in enumerate(rows) if number not in held_out]
    return train, [row for number, row in enumerate(rows) if number in held_out]


def _nothing_held_out(rows: Sequence[Row]) -> str:
    """Why `split` found no validation rows."""
    which = "one row" if len(rows) == 1 else f"{len(rows):,} rows that all say the same"
    if len(rows) == 1 and isinstance(parse_row(rows[0]), PlainText):
        which = "one text without a line break or a space between words"
    return f"no validation rows can be held out of {which}"


def _choose(keys: Sequence[Hashable], wanted: int, seed: int) -> set[int]:
    """Numbers of at most `wanted` rows: whole groups of equal keys, in the order of the keys' hashes."""
    groups: dict[str, list[int]] = defaultdict(list)
    for number, key in enumerate(keys):
        groups[hashlib.sha256(f"{seed} {key!r}".encode()).hexdigest()].append(number)
    chosen: set[int] = set()
    for digest in sorted(groups):
        if len(chosen) + len(groups[digest]) <= wanted:
            chosen.update(groups[digest])
    return chosen


def _split_document(row: Row, text: str, share: float) -> tuple[list[Row], list[Row]]:
    """A document and its last `share`, parted at the nearest line break.

    A space will do where all line breaks are in the first half: validation is the smaller part.
    """
    begin, end = len(text) - len(text.lstrip()), len(text.rstrip())
    cut = min(max(int(len(text) * (1 - share)), begin), end)
    for mark, least in (("\n", max(begin, len(text) // 2)), (" ", begin), ("\n", begin)):
        places = [text.rfind(mark, least, cut), text.find(mark, cut, end)]
        if found := [place + 1 for place in places if place >= begin]:
            place = min(found, key=lambda place: abs(place - cut))
            rest = Origin(row.origin.file, row.origin.line + text.count("\n", 0, place))
            return [Row(row.origin, {"text": text[:place]})], [Row(rest, {"text": text[place:]})]
    return [row], []


def overlap(train: Sequence[Row], valid: Sequence[Row]) -> Overlap:
    """What validation rows have in common with training rows; compares what rows say, not how they are written."""
    parsed_train, parsed_valid = [parse_row(row) for row in train], [parse_row(row) for row in valid]
    seen_rows = {repr(_said(each)) for each in parsed_train}
    seen_prompts = {repr(_prompt_of(each)) for each in parsed_train}
    return Overlap(
        rows=sum(repr(_said(each)) in seen_rows for each in parsed_valid),
        prompts=sum(repr(_prompt_of(each)) in seen_prompts for each in parsed_valid),
    )


def _prompt_of(parsed: Parsed) -> Hashable:
    """What stands before a row's first answer (with its tools); a text is its own."""
    match parsed:
        case Conversation():
            first = next(i for i, message in enumerate(parsed.messages) if message.role == "assistant")
            return (parsed.messages[:first], repr(parsed.tools))
        case PromptCompletion():
            return parsed.prompt
        case PlainText():
            return parsed.text


def _said(parsed: Parsed) -> Any:
    """A row without its references, which only measurements read."""
    match parsed:
        case Conversation():
            return (parsed.messages, parsed.tools)
        case PromptCompletion():
            return (parsed.prompt, parsed.completion)
        case PlainText():
            return parsed.text


# ---------------------------------------------------------------- for people


def summary(
    train: Statistics, valid: Statistics | None = None, shared: Overlap | None = None, held_out: bool = False
) -> tuple[str, ...]:
    """Few lines, each with something one would otherwise find out the hard way."""
    schemas = ", ".join(train.schemas)
    counts = f"{train.rows:,} rows, {schemas}"
    if valid is not None:
        origin = " held out" if held_out else ""
        counts = f"{train.rows + valid.rows:,} rows, {schemas}: {train.rows:,} train, {valid.rows:,} valid{origin}"
    parts = [part.strip() for part in (counts, *_cuts(train, valid)) if part]
    lines = [f"data   {'; '.join(parts)}", _mask_line(train, valid)]
    lengths = f"{train.length_min:,} to {train.length_max:,}, median {train.length_median:,.0f}"
    lines.append(
        f"tokens {train.tokens:,} in {train.examples:,} sequences of {lengths}, 95% within {train.length_p95:,.0f}"
    )
    notes = []
    if train.duplicates:
        notes.append(f"{train.duplicates:,} training rows repeat an earlier one")
    if train.dropped_turns:
        notes.append(f"{train.dropped_turns:,} turns after the last answer of their row are left out")
    if train.eos_appended and not train.schemas.get("text"):
        notes.append(f"the template ends no answer, so the end token was added to {train.eos_appended:,} rows")
    if shared is not None and valid is not None and shared.prompts:
        notes.append(
            f"of {valid.rows:,} validation rows, {shared.rows:,} are training rows too and {shared.prompts:,} have a "
            "training row's prompt: the validation loss will look better than it is"
        )
    return (*lines, *(f"note   {note}" for note in notes))


def _cuts(train: Statistics, valid: Statistics | None) -> list[str]:
    prompts = train.prompts_cut + (valid.prompts_cut if valid else 0)
    answers = train.answers_cut + (valid.answers_cut if valid else 0)
    longest = max(train.length_uncut_max, valid.length_uncut_max if valid else 0)
    if not prompts and not answers:
        return ["0 cut"]
    found = [f"{prompts:,} prompts cut to fit {train.max_length:,} tokens (longest row {longest:,})"]
    return [*found, f"{answers:,} answers lose their end"] if answers else found


def _mask_line(train: Statistics, valid: Statistics | None) -> str:
    rows = train.rows + (valid.rows if valid else 0)
    ended = train.end_trained + (valid.end_trained if valid else 0)
    parts = [f"{train.trained_share:.0%} of tokens trained", f"end token in {ended:,} of {rows:,}"]
    if train.serving_prompts is not None:
        exact = train.serving_prompts + (valid.serving_prompts or 0 if valid else 0)
        parts.append(
            "prompt = serving prompt" if exact == rows else f"prompt = serving prompt in {exact:,} of {rows:,}"
        )
        parts.append(f"template: {train.template}")
    return f"mask   {'; '.join(parts)}"
