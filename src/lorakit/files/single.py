"""One file: written to a temporary sibling, flushed, fsynced, renamed over the target, and its folder fsynced; a reader
sees the old file or the new one, never a part.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import uuid
from collections.abc import Iterable
from pathlib import Path

from lorakit.errors import FileError


def write_bytes(path: str | Path, data: bytes) -> None:
    """Replace the file at `path` by `data`, whole or not at all, and durably.

    Raises:
        FileError: it could not be written; the old file, if any, is as it was.
    """
    write_pieces(path, (data,))


def write_pieces(path: str | Path, pieces: Iterable[bytes | memoryview]) -> None:
    """`write_bytes` of data that need not be in memory as a whole: of its pieces in their order.

    Raises:
        FileError: as `write_bytes`.
    """
    path = Path(path)
    temporary = path.with_name(f".tmp-{uuid.uuid4().hex}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with temporary.open("wb") as file:
            for piece in pieces:
                file.write(piece)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
        fsync_folder(path.parent)
    except OSError as error:
        raise FileError(
            f"{path}: could not be written: {error.strerror or error}. The old file, if any, is untouched."
        ) from error
    finally:
        with contextlib.suppress(OSError):  # there is none if the folder could not be made
            temporary.unlink(missing_ok=True)


def write_text(path: str | Path, text: str) -> None:
    """`write_bytes` of UTF-8."""
    write_bytes(path, text.encode("utf-8"))


def read_bytes(path: str | Path) -> bytes:
    """The whole file.

    Raises:
        FileError: it could not be read.
    """
    try:
        return Path(path).read_bytes()
    except OSError as error:
        raise FileError(f"{path}: could not be read: {error.strerror or error}") from error


def sha256_file(path: str | Path) -> str:
    """Hex digest of a file's content, read in blocks."""
    with Path(path).open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def fsync_folder(path: Path) -> None:
    """Make renames inside `path` durable (no-op where folders cannot be opened, as on Windows)."""
    with contextlib.suppress(PermissionError):
        handle = os.open(path, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
