"""From bytes to rows: .jsonl, .json, .csv, .parquet, .txt, or a Hub data set. Knows formats, not what a row means.

All of a source is read or nothing: its bad rows are told together, with file, line and cause.
"""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from lorakit.errors import DataError, FileError, MissingDependencyError, bullet_list, nearest
from lorakit.files import parse_json

SUFFIXES = (".jsonl", ".ndjson", ".json", ".csv", ".parquet", ".txt")
T = TypeVar("T")

# csv columns that hold JSON text, and those that hold a text or a list of messages as JSON
_JSON_CELLS = ("messages", "conversations", "tools", "references", "history")
_TEXT_OR_MESSAGES_CELLS = ("prompt", "completion", "chosen", "rejected")
_MEANT_AS_MESSAGES = re.compile(r"""\s*\[\s*\{\s*['"](role|from|content)['"]\s*:""")

_LOCATION_AND_SPLIT = re.compile(r"(.+):([\w.-]+)")
_ROW_KEYS = {"messages", "conversations", "instruction", "prompt", "text"}  # a .json object with one of them is a row


@dataclass(frozen=True)
class Origin:
    """Where a row came from."""

    file: str
    """Path or data set id, as the user wrote it."""

    line: int
    """Line from 1 for .jsonl and .csv; number of the row from 1 otherwise."""

    def __str__(self) -> str:
        return f"{self.file}:{self.line}"


@dataclass(frozen=True)
class Row:
    """One row as it stands in its source."""

    origin: Origin
    fields: Mapping[str, Any]


_Rows = Iterator[Row | str]  # a row, or what is wrong with it


def read_rows(source: str | Path, split: str | tuple[str, ...] = "train") -> list[Row]:
    """Read all rows of a data file or data set.

    Args:
        source: a file told apart by its ending (.json may hold an array of objects, an object with one such array, one
            row, or JSON lines), a folder laid out as a Hub data set, or a Hub data set id `owner/name` or
            `owner/name/config`; folder and id with `:split` behind them where another split is meant.
        split: which split of a data set that `source` names without one; of several, the first that is there. Files
            have none.

    Raises:
        DataError: the source is missing, empty, of an unknown kind, or holds bad rows (the first 20 are listed); the
            data set has no such split (those there are are listed).
        MissingDependencyError: parquet files and data sets need the extra `data`.
    """
    name = str(source)
    location, named = _parted(name)
    path = Path(location).expanduser()
    suffix = path.suffix.lower()
    splits = (named,) if named is not None else (split,) if isinstance(split, str) else split
    if path.is_dir():
        found = _data_set(name, str(path), None, splits)
    elif path.is_file() and named is None:
        if suffix not in _READERS:
            raise DataError(f"{name}: unknown kind of file {suffix!r}; known: {', '.join(SUFFIXES)}")
        found = _READERS[suffix](name, path)
    elif suffix in SUFFIXES or path.is_absolute() or name.startswith((".", "~")):
        raise DataError(f"{name}: no such file{_did_you_mean(Path(name).expanduser())}")
    else:
        owner, _, rest = location.partition("/")
        repository, _, config = rest.partition("/")
        found = _data_set(name, f"{owner}/{repository}" if repository else owner, config or None, splits)
    rows, problems = [], []
    for row in found:
        if isinstance(row, Row):
            rows.append(row)
        else:
            problems.append(row)
    if problems:
        raise DataError(f"{name}: {len(problems)} row(s) cannot be read:\n{bullet_list(problems)}")
    if not rows:
        raise DataError(f"{name}: no rows")
    return rows


def located(source: str) -> str:
    """`source` so that it means the same from any folder: paths made absolute, Hub ids as they are."""
    location, split = _parted(source)
    path = Path(location).expanduser()
    if not path.exists():
        return source
    return str(path.resolve()) if split is None else f"{path.resolve()}:{split}"


def _parted(name: str) -> tuple[str, str | None]:
    """(location, split) of `location:split`; split is None where none is named. What exists is a location as it is."""
    parted = None if Path(name).expanduser().exists() else _LOCATION_AND_SPLIT.fullmatch(name)
    return (parted[1], parted[2]) if parted else (name, None)


# ---------------------------------------------------------------- files


def each_row(function: Callable[[Row], T], rows: Sequence[Row], complaint: str) -> list[T]:
    """`function` of every row, or one error that lists the rows it refused, each with file and line.

    Args:
        function: raises DataError for a row it refuses.
        rows: all of them.
        complaint: head of the error, with {bad} and {all} for the counts.

    Raises:
        DataError: at least one row was refused.
    """
    refusals = Refusals()
    results = refusals.results(function, rows)
    refusals.tell(complaint)
    return results


class Refusals:
    """What functions of rows refused, to be told together."""

    def __init__(self) -> None:
        self.problems: list[str] = []
        self._rows = 0

    def results(self, function: Callable[[Row], T], rows: Sequence[Row]) -> list[T]:
        """`function` of each row that it does not refuse."""
        results = []
        for row in rows:
            try:
                results.append(function(row))
            except DataError as error:
                text = str(error)
                self.problems.append(text if text.startswith(str(row.origin)) else f"{row.origin}: {text}")
        self._rows += len(rows)
        return results

    def tell(self, complaint: str) -> None:
        """Go on if nothing was refused.

        Args:
            complaint: as in `each_row`.

        Raises:
            DataError: something was.
        """
        if self.problems:
            head = complaint.format(bad=len(self.problems), all=self._rows)
            raise DataError(f"{head}:\n{bullet_list(self.problems)}")


def _read_bytes(name: str, path: Path) -> bytes:
    try:
        data = path.read_bytes()
    except OSError as error:
        raise DataError(f"{name}: could not be read: {error.strerror or error}") from error
    if data.startswith((b"\xff\xfe", b"\xfe\xff")):
        raise DataError(f"{name}: is UTF-16; save it as UTF-8")
    return data.removeprefix(b"\xef\xbb\xbf")


def _read_text(name: str, path: Path) -> str:
    data = _read_bytes(name, path)
    if b"\0" in data:
        raise DataError(f"{name}: holds a NUL byte at offset {data.index(0)}; it is no text file, or not UTF-8")
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise DataError(f"{name}:{line}: not UTF-8: byte {data[error.start]:#04x}; save the file as UTF-8") from None


def _jsonl(name: str, path: Path) -> _Rows:
    yield from _json_lines(name, _read_bytes(name, path))


def _json_lines(name: str, data: bytes) -> _Rows:
    # split on the byte: str.splitlines would also tear rows at U+2028, U+0085 and others that JSON strings may hold
    for number, line in enumerate(data.split(b"\n"), 1):
        if not line.strip():
            continue
        origin = Origin(name, number)
        if b"\0" in line:
            yield f"{origin}: holds a NUL byte"
            continue
        try:
            value = parse_json(line, str(origin))
        except FileError as error:
            yield str(error)
            continue
        yield _object(value, origin)


def _object(value: Any, origin: Origin) -> Row | str:
    if isinstance(value, dict):
        return Row(origin, value)
    return f"{origin}: expected an object {{...}}, found {type(value).__name__}"


def _json(name: str, path: Path) -> _Rows:
    data = _read_bytes(name, path)
    if not data.strip():
        return
    try:
        value = parse_json(data, name)
    except FileError as error:
        if not _looks_like_lines(data):
            raise DataError(str(error)) from None
        yield from _json_lines(name, data)
        return
    if isinstance(value, dict):
        value = _only_array(name, value)
    if not isinstance(value, list):
        raise DataError(f"{name}: expected an array of objects, found {type(value).__name__}")
    for number, item in enumerate(value, 1):
        yield _object(item, Origin(name, number))


def _looks_like_lines(data: bytes) -> bool:
    """Whether the first line is an object of its own: JSON lines under the name .json."""
    first, newline, rest = data.strip().partition(b"\n")
    return bool(newline) and bool(rest.strip()) and first.startswith(b"{") and first.rstrip().endswith(b"}")


def _only_array(name: str, value: dict[str, Any]) -> list[Any] | dict[str, Any]:
    """The one array of objects in a wrapping object ({"version": ..., "data": [...]}), or the object if it is a row."""
    if value.keys() & _ROW_KEYS:
        return [value]
    arrays = {key: item for key, item in value.items() if isinstance(item, list) and item and isinstance(item[0], dict)}
    if len(arrays) != 1:
        found = f"several ({', '.join(arrays)})" if arrays else f"none; its keys: {', '.join(list(value)[:10])}"
        raise DataError(
            f"{name}: expected an array of objects, an object that holds one such array, or one row; found {found}"
        )
    return next(iter(arrays.values()))


def _csv(name: str, path: Path) -> _Rows:
    text = _read_text(name, path)
    limit = csv.field_size_limit(max(len(text), 1))  # the default, 128 KiB, is less than a long document
    try:
        reader = csv.reader(io.StringIO(text, newline=""), strict=True)
        header = next(reader, [])
        if len(set(header)) != len(header):
            raise DataError(f"{name}: its first line names a column twice: {', '.join(header)}")
        line = reader.line_num + 1
        for cells in reader:
            if cells:
                yield _csv_row(header, cells, Origin(name, line))
            line = reader.line_num + 1
    except csv.Error as error:
        raise DataError(f"{name}:{reader.line_num}: not CSV: {error}") from None
    finally:
        csv.field_size_limit(limit)


def _csv_row(header: list[str], cells: list[str], origin: Origin) -> Row | str:
    if len(cells) != len(header):
        return f"{origin}: {len(cells)} cells under {len(header)} columns ({', '.join(header)})"
    fields: dict[str, Any] = {}
    for column, cell in zip(header, cells, strict=True):
        where = f"{origin}: column {column!r}"
        try:
            if column in _JSON_CELLS:
                fields[column] = parse_json(cell, where) if cell.strip() else None
            elif column in _TEXT_OR_MESSAGES_CELLS:
                fields[column] = _text_or_messages(cell, where)
            else:
                fields[column] = cell
        except FileError as error:
            return str(error)
    return Row(origin, fields)


def _text_or_messages(cell: str, where: str) -> Any:
    """A cell as it is, or the list of messages that it holds as JSON.

    Raises:
        FileError: it begins as a list of messages and is no JSON.
    """
    if not cell.lstrip().startswith("["):
        return cell
    try:
        value = parse_json(cell, where)
    except FileError:
        if _MEANT_AS_MESSAGES.match(cell):
            raise
        return cell
    return value if value and all(_is_message(item) for item in value) else cell


def _is_message(item: Any) -> bool:
    spellings = ({"role", "content"}, {"role", "tool_calls"}, {"from", "value"})
    return isinstance(item, dict) and any(item.keys() >= keys for keys in spellings)


def _txt(name: str, path: Path) -> _Rows:
    text = _read_text(name, path).replace("\r\n", "\n")
    if text.strip():
        yield Row(Origin(name, 1), {"text": text})


def _parquet(name: str, path: Path) -> _Rows:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        raise _missing("parquet files", "pyarrow") from None
    try:
        table = pyarrow.parquet.read_table(path)
    except (pyarrow.ArrowException, OSError) as error:
        raise DataError(f"{name}: not readable as parquet: {error}") from error
    yield from _from_arrow(name, table.to_pylist())


_READERS = {
    ".jsonl": _jsonl, ".ndjson": _jsonl, ".json": _json, ".csv": _csv, ".parquet": _parquet, ".txt": _txt,
}  # fmt: skip


# ---------------------------------------------------------------- data sets


def _data_set(name: str, location: str, config: str | None, splits: tuple[str, ...]) -> _Rows:
    try:
        import datasets
    except ImportError:
        raise _missing("data sets", "datasets") from None
    datasets.disable_progress_bars()
    try:
        data_set = datasets.load_dataset(location, config)
    except Exception as error:  # a data set may hold any format, and its readers raise anything
        reason = str(error).strip().split("\n")[0]
        raise DataError(
            f"{name}: neither a data file here{_did_you_mean(Path(name))} nor a data set that can be loaded: {reason}. "
            f"A file ends in {', '.join(SUFFIXES)}; a data set is owner/name or owner/name/config, with :split or not"
        ) from error
    split = next((each for each in splits if each in data_set), None)
    if split is None:
        raise DataError(
            f"{name}: has no split {' or '.join(splits)}, but {', '.join(data_set)}: "
            f"name the one you mean, as in {_parted(name)[0]}:{next(iter(data_set))}"
        )
    yield from _from_arrow(name, data_set[split])


def _from_arrow(name: str, rows: Iterable[Mapping[str, Any]]) -> _Rows:
    for number, row in enumerate(rows, 1):
        yield Row(Origin(name, number), _without_none(row))


def _without_none(value: Any) -> Any:
    """Arrow gives every object of a column the keys of all of them, with None where a row had none; those go again."""
    if isinstance(value, Mapping):
        return {key: _without_none(item) for key, item in value.items() if item is not None}
    if isinstance(value, list):
        return [_without_none(item) for item in value]
    return value


def _missing(what: str, package: str) -> MissingDependencyError:
    return MissingDependencyError(f"{what} need the package {package}: pip install 'lorakit[data]'")


def _did_you_mean(path: Path) -> str:
    """Near names in the folder where `path` was looked for, as " (did you mean ...?)"."""
    names = [entry.name for entry in path.parent.iterdir()] if path.parent.is_dir() else []
    guesses = [str(path.parent / guess) for guess in nearest(path.name, names)]
    return f" (did you mean {' or '.join(guesses)}?)" if guesses else ""
