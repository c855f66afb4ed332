"""JSON, read strictly (no duplicate keys, no NaN), and JSON lines, appended one at a time."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, BinaryIO

from lorakit.errors import FileError
from lorakit.files.single import read_bytes, write_text


def write_json(path: str | Path, value: Any) -> None:
    """Indented, key order kept, NaN refused."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def read_json(path: str | Path) -> Any:
    """A JSON file, strictly (see `parse_json`)."""
    return parse_json(read_bytes(path), str(path))


def parse_json(data: bytes | str, where: str) -> Any:
    """JSON as the standard has it: duplicate keys, NaN, infinity and lone surrogates, which Python takes, are errors.

    Raises:
        FileError: with `where`, the cause, and the column.
    """
    try:
        text = data.decode("utf-8-sig") if isinstance(data, bytes) else data
        value = json.loads(text, object_pairs_hook=_unique_keys, parse_constant=_no_constant, parse_float=_finite)
        text_again = json.dumps(value, ensure_ascii=False)
        text_again.encode("utf-8")  # a lone surrogate, written as an escape, cannot be encoded
    except UnicodeDecodeError as error:
        raise FileError(
            f"{where}: not UTF-8: byte {error.object[error.start]:#04x} at offset {error.start}; save the file as UTF-8"
        ) from None
    except UnicodeEncodeError:
        raise FileError(f"{where}: holds a lone surrogate (half of a UTF-16 pair), which is no character") from None
    except json.JSONDecodeError as error:
        raise FileError(f"{where}: not JSON: {error.msg} at line {error.lineno}, column {error.colno}") from None
    except (ValueError, RecursionError) as error:
        raise FileError(f"{where}: not JSON: {error or 'nested too deeply'}") from None
    return value


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        keys = [key for key, _ in pairs]
        twice = sorted({key for key in keys if keys.count(key) > 1})
        raise ValueError(f"key {twice[0]!r} given twice in one object")
    return result


def _no_constant(name: str) -> None:
    raise ValueError(f"{name} is not JSON")


def _finite(text: str) -> float:
    value = float(text)
    if math.isinf(value):
        raise ValueError(f"number {text} is too large")
    return value


class JsonLines:
    """An append-only `.jsonl` file, one object a line, handed to the system at each line."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)

    def append(self, row: Mapping[str, Any]) -> None:
        """Add one line, after removing a torn one that a killed writer left at the end.

        Raises:
            FileError: it could not be written.
        """
        line = json.dumps(row, ensure_ascii=False, allow_nan=False) + "\n"
        try:
            with self.path.open("ab+") as file:
                self._cut_torn_line(file)
                file.write(line.encode("utf-8"))
        except OSError as error:
            raise FileError(f"{self.path}: could not be written: {error.strerror or error}") from error

    def sync(self) -> None:
        """Make all lines so far durable."""
        with self.path.open("ab") as file:
            os.fsync(file.fileno())

    @staticmethod
    def _cut_torn_line(file: BinaryIO) -> None:
        size = file.seek(0, os.SEEK_END)
        if size == 0:
            return
        file.seek(-1, os.SEEK_END)
        if file.read(1) != b"\n":
            file.seek(0)
            file.truncate(file.read().rfind(b"\n") + 1)

    def rows(self) -> list[dict[str, Any]]:
        """All whole lines; a torn last line (a killed writer) is left out."""
        if not self.path.exists():
            return []
        lines = read_bytes(self.path).split(b"\n")
        return [parse_json(line, f"{self.path}:{i}") for i, line in enumerate(lines[:-1], 1)]

    def keep(self, rows: list[dict[str, Any]]) -> None:
        """Replace the content by `rows`, atomically."""
        write_text(self.path, "".join(json.dumps(row, ensure_ascii=False, allow_nan=False) + "\n" for row in rows))
