"""A folder: built beside its target with a manifest (sizes and SHA-256) written last, and exchanged with the old one in
one step where the system can; or locked while it is used.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import itertools
import os
import shutil
import sys
import uuid
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from lorakit.errors import FileError, RunError, bullet_list
from lorakit.files.json_files import read_json, write_json
from lorakit.files.single import fsync_folder, sha256_file

MANIFEST = "manifest.json"
_LOCK = ".lock"


@contextlib.contextmanager
def atomic_folder(target: str | Path, manifest: Mapping[str, Any] | None = None) -> Iterator[Path]:
    """Build a folder beside `target` and put it in place when the block ends well; if it raises, `target` is as it was.

    Linux exchanges the two folders in one step. Elsewhere there are two renames; a process killed between them leaves
    the old folder as `.previous-NAME`, and the next `atomic_folder` or `remove_leftovers` puts it back.

    Args:
        target: the folder to create or replace.
        manifest: extra keys for `manifest.json`; sizes and SHA-256 of all files are added. None writes no manifest.

    Yields:
        The temporary folder to fill.

    Raises:
        FileError: a file could not be written, or not made durable.
    """
    target = Path(target)
    building = target.with_name(f".tmp-{uuid.uuid4().hex}")
    try:
        building.mkdir(parents=True)
        _restore(target)
        yield building
        files = sorted(p for p in building.rglob("*") if p.is_file())
        for file in files:
            with file.open("rb") as handle:
                os.fsync(handle.fileno())
        if manifest is not None:
            listing = {
                p.relative_to(building).as_posix(): {"bytes": p.stat().st_size, "sha256": sha256_file(p)} for p in files
            }
            write_json(building / MANIFEST, {**manifest, "files": listing})
        for folder in [*(p for p in building.rglob("*") if p.is_dir()), building]:
            fsync_folder(folder)
        if not target.exists():
            building.rename(target)
        elif not _exchange(building, target):
            _replace_in_two_steps(building, target)
        fsync_folder(target.parent)
    except FileError:
        raise  # has said which file
    except OSError as error:
        raise FileError(
            f"{target}: could not be written: {error.strerror or error}. What was there is kept."
        ) from error
    finally:
        shutil.rmtree(building, ignore_errors=True)  # after an exchange this is the old folder


def remove_leftovers(folder: str | Path) -> None:
    """Tidy `folder` after a writer that was killed: temporary siblings go, an old folder moved aside comes back.

    Only for who knows that nobody is writing there, e.g. the holder of its lock.
    """
    for path in Path(folder).glob(".tmp-*"):
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink()
    for path in Path(folder).glob(".previous-*"):
        _restore(path.with_name(path.name.removeprefix(".previous-")))


def free_folder(wanted: str | Path) -> Path:
    """`wanted`, or else the next of its kind that is free: nothing lies there but the lock of a process that has gone.

    runs/demo is followed by runs/demo-2, runs/demo-3; runs/data-1 by runs/data-2, runs/data-3.
    """
    wanted = Path(wanted)
    stem = wanted.name.removesuffix("-1")
    numbered = (wanted.with_name(f"{stem}-{number}") for number in itertools.count(2))
    return next(folder for folder in itertools.chain([wanted], numbered) if _is_free(folder))


def is_vacant(folder: str | Path) -> bool:
    """Whether nothing is there, or an empty folder: a place where something new can be put."""
    return _holds_at_most(Path(folder), set())


def _is_free(folder: Path) -> bool:
    return _holds_at_most(folder, {_LOCK})


def _holds_at_most(folder: Path, names: set[str]) -> bool:
    return not folder.exists() or (folder.is_dir() and {entry.name for entry in folder.iterdir()} <= names)


def _previous(target: Path) -> Path:
    return target.with_name(f".previous-{target.name}")


def _restore(target: Path) -> None:
    """End a two-step replacement that was cut off: undo it if the new folder is not in place, else drop the old."""
    previous = _previous(target)
    if not previous.exists():
        return
    if target.exists():
        shutil.rmtree(previous)
    else:
        previous.rename(target)


def _replace_in_two_steps(building: Path, target: Path) -> None:
    """Replace a folder where no exchange is to be had: rename(2) alone replaces only an empty folder."""
    try:
        target.rename(_previous(target))
        building.rename(target)
    finally:
        _restore(target)


def _exchange(first: Path, second: Path) -> bool:
    """Swap two names in one step (Linux's renameat2). False where the system or the file system cannot."""
    renameat2 = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None) if sys.platform == "linux" else None
    if renameat2 is None:
        return False
    here, exchange = -100, 2  # AT_FDCWD, RENAME_EXCHANGE
    if renameat2(here, os.fsencode(first), here, os.fsencode(second), exchange) == 0:
        return True
    code = ctypes.get_errno()
    if code in (errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP):
        return False
    raise OSError(code, os.strerror(code), str(second))


def verify_folder(path: str | Path) -> dict[str, Any]:
    """Check a folder against its manifest and return the manifest.

    Raises:
        FileError: no manifest, or a file is missing, has another size or another content.
    """
    path = Path(path)
    manifest = read_json(path / MANIFEST)
    if not isinstance(manifest, dict) or not isinstance(manifest.get("files"), dict):
        raise FileError(f"{path / MANIFEST}: not a manifest: no 'files'")
    problems = []
    for name, expected in manifest["files"].items():
        file = path / name
        if not isinstance(expected, dict) or expected.keys() != {"bytes", "sha256"}:
            problems.append(f"{name}: its entry in {MANIFEST} is damaged")
        elif not file.is_file():
            problems.append(f"{name}: missing")
        elif file.stat().st_size != expected["bytes"]:
            problems.append(f"{name}: {file.stat().st_size} bytes instead of {expected['bytes']}")
        elif sha256_file(file) != expected["sha256"]:
            problems.append(f"{name}: content differs from its SHA-256")
    if problems:
        raise FileError(f"{path}: damaged:\n{bullet_list(problems)}")
    return manifest


@contextlib.contextmanager
def locked_folder(path: str | Path) -> Iterator[None]:
    """Hold a folder for this process: a second process gets an error that names the first.

    The lock is the operating system's (flock or LockFileEx), so it goes with the process however that ends.

    Raises:
        RunError: somebody else holds it.
        FileError: it cannot be made or locked.
    """
    import filelock

    path = Path(path)
    lock, owner = filelock.FileLock(path / _LOCK, timeout=0), path / ".lock-owner"
    try:
        path.mkdir(parents=True, exist_ok=True)
        lock.acquire()
    except filelock.Timeout:
        who = owner.read_text() if owner.exists() else "another process"
        raise RunError(f"{path} is in use by {who}. Wait for it, stop it, or choose another output folder.") from None
    except (OSError, NotImplementedError) as error:  # the latter: a file system without locks
        raise FileError(f"{path}: cannot be locked: {error}. Choose an output folder on another disk.") from error
    try:
        owner.write_text(f"process {os.getpid()}")
        yield
    finally:
        owner.unlink(missing_ok=True)
        lock.release()
