"""The user's cache folder: what can be made again and is kept so that it need not be."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path


def cache_folder() -> Path:
    """Where such things are kept: LORAKIT_CACHE, else the user's cache folder (~/.cache/lorakit on Linux)."""
    import platformdirs

    return Path(os.environ.get("LORAKIT_CACHE") or platformdirs.user_cache_dir("lorakit"))


def mark_used(path: Path) -> None:
    """Let a file be the last to go in `make_room`."""
    with contextlib.suppress(OSError):  # somebody else's folder, or made room a moment ago
        os.utime(path)


def make_room(folder: Path, most: int) -> None:
    """Remove the files of a folder that were longest unused until it holds at most `most` bytes.

    What is removed is made again when it is wanted, so several processes may do so at once, and a file that is gone
    already, or that the system will not let go, is left alone.
    """
    found = []
    for path in folder.iterdir():
        with contextlib.suppress(OSError):
            about = path.stat()
            found.append((about.st_mtime_ns, about.st_size, path))
    held = sum(size for _, size, _ in found)
    for _, size, path in sorted(found):
        if held <= most:
            return
        with contextlib.suppress(OSError):
            path.unlink()
            held -= size
