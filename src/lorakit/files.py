"""Every byte lorakit writes or reads. Knows files, not what is in them.

Writing: a file is written to a temporary sibling, flushed, fsynced, renamed over the target, and its folder fsynced; a
reader sees the old file or the new one, never a part. A folder is built beside its target the same way, with a manifest
(sizes and SHA-256) written last, and exchanged with the old one in one step where the system can.
Reading: one strict reader per format; damage is an error that names the file and the place.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import hashlib
import io
import itertools
import json
import math
import os
import shutil
import struct
import sys
import uuid
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, Self

from lorakit.errors import FileError, RunError, bullet_list

if TYPE_CHECKING:
    import torch

MANIFEST = "manifest.json"
_LOCK = ".lock"
_MAX_HEADER = 64 * 1024 * 1024  # bytes; safetensors itself stops at 100 MB. 1,000 adapters x 7 x 80 tensors need less.
_SAFETENSORS_BYTES = {
    **dict.fromkeys(("BOOL", "I8", "U8", "F8_E4M3", "F8_E5M2"), 1),
    **dict.fromkeys(("I16", "U16", "F16", "BF16"), 2),
    **dict.fromkeys(("I32", "U32", "F32"), 4),
    **dict.fromkeys(("I64", "U64", "F64"), 8),
}


# ---------------------------------------------------------------- writing


def write_bytes(path: str | Path, data: bytes) -> None:
    """Replace the file at `path` by `data`, whole or not at all, and durably.

    Raises:
        FileError: it could not be written; the old file, if any, is as it was.
    """
    path = Path(path)
    temporary = path.with_name(f".tmp-{uuid.uuid4().hex}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with temporary.open("wb") as file:
            file.write(data)
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


def write_json(path: str | Path, value: Any) -> None:
    """Indented, key order kept, NaN refused."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def write_safetensors(
    path: str | Path, tensors: Mapping[str, torch.Tensor], metadata: Mapping[str, str] | None = None
) -> None:
    """Tensors in the order of their names, so equal content gives equal bytes.

    Args:
        path: the target file.
        tensors: name -> tensor; moved to the CPU and made contiguous as needed.
        metadata: strings for the header.
    """
    from safetensors.torch import save

    ready: dict[str, torch.Tensor] = {}
    storages: set[int] = set()
    for name in sorted(tensors):
        tensor = tensors[name].detach().to("cpu").contiguous()
        storage = tensor.untyped_storage().data_ptr()
        # the library refuses tensors that share memory (tied weights); each name here is stored on its own
        ready[name] = tensor.clone() if storage in storages else tensor
        storages.add(storage)
    data = save(ready, metadata=dict(metadata) if metadata else None)
    # The library writes metadata in the order of a hash table, another one each time: write the header again, sorted.
    (length,) = struct.unpack("<Q", data[:8])
    header = json.dumps(
        json.loads(data[8 : 8 + length]), sort_keys=True, separators=(",", ":"), ensure_ascii=False
    ).encode()
    header += b" " * (-len(header) % 8)  # tensors begin at a multiple of eight bytes
    write_bytes(path, struct.pack("<Q", len(header)) + header + data[8 + length :])


class SafetensorsWriter:
    """A safetensors file written tensor by tensor, so that no more than one of them is in memory.

    For files inside an `atomic_folder`, which makes them durable and puts them in place.

    Args:
        path: the file to create.
        layout: name -> (dtype, shape), in the order in which the tensors will be written.
        metadata: strings for the header.
    """

    def __init__(
        self,
        path: str | Path,
        layout: Mapping[str, tuple[torch.dtype, tuple[int, ...]]],
        metadata: Mapping[str, str] | None = None,
    ) -> None:
        self._path = Path(path)
        self._left = list(layout)
        self._layout = dict(layout)
        names = {dtype: name for name, dtype in torch_dtypes().items()}
        header: dict[str, Any] = {"__metadata__": dict(sorted((metadata or {"format": "pt"}).items()))}
        position = 0
        for name, (dtype, shape) in layout.items():
            end = position + math.prod(shape) * _SAFETENSORS_BYTES[names[dtype]]
            header[name] = {"dtype": names[dtype], "shape": list(shape), "data_offsets": [position, end]}
            position = end
        encoded = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
        encoded += b" " * (-len(encoded) % 8)
        try:
            self._file = self._path.open("xb")
            self._file.write(struct.pack("<Q", len(encoded)) + encoded)
        except OSError as error:
            raise FileError(f"{path}: could not be written: {error.strerror or error}") from error

    def write(self, name: str, tensor: torch.Tensor) -> None:
        """Append the next tensor of the layout."""
        import torch

        assert self._left, "every tensor of the layout has been written"
        expected = self._left.pop(0)
        assert (name, tensor.dtype, tuple(tensor.shape)) == (expected, *self._layout[expected]), "not the next one"
        data = tensor.detach().to("cpu").contiguous().reshape(-1).view(torch.uint8)
        try:
            self._file.write(data.numpy().data)
        except OSError as error:
            raise FileError(f"{self._path}: could not be written: {error.strerror or error}") from error

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self._file.close()
        assert kind is not None or not self._left, f"not written: {self._left[:3]}"


def torch_dtypes() -> dict[str, torch.dtype]:
    """The dtypes of a header by its names for them."""
    import torch

    floats = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
    floats |= {"F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2}
    whole = {"I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8}
    return floats | whole | {"BOOL": torch.bool}


class _Mapped(Mapping[str, Any]):
    """Tensors of an open file by name."""

    def __init__(self, file: Any, names: Mapping[str, object]) -> None:
        self._file, self._names = file, names

    def __getitem__(self, name: str) -> Any:
        if name not in self._names:
            raise KeyError(name)
        return self._file.get_tensor(name)

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


@contextlib.contextmanager
def open_safetensors(path: str | Path) -> Iterator[Mapping[str, torch.Tensor]]:
    """The tensors of a file, each read from disk when it is asked for, after the header has been checked.

    They are views of the file, mapped into memory: what is not touched is not read, and what was asked for is let go
    with the block.
    """
    from safetensors import SafetensorError, safe_open

    header, _ = read_safetensors_header(path)
    try:
        with safe_open(path, framework="pt") as file:
            yield _Mapped(file, header)
    except (SafetensorError, OSError) as error:
        if isinstance(error, FileError):
            raise
        raise FileError(f"{path}: could not be read: {error}") from error


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


def _is_free(folder: Path) -> bool:
    return not folder.exists() or (folder.is_dir() and {entry.name for entry in folder.iterdir()} <= {_LOCK})


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


def fsync_folder(path: Path) -> None:
    """Make renames inside `path` durable (no-op where folders cannot be opened, as on Windows)."""
    with contextlib.suppress(PermissionError):
        handle = os.open(path, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


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


# ---------------------------------------------------------------- reading


def sha256_file(path: str | Path) -> str:
    """Hex digest of a file's content, read in blocks."""
    with Path(path).open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


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


def read_json(path: str | Path) -> Any:
    """A JSON file, strictly (see `parse_json`)."""
    return parse_json(read_bytes(path), str(path))


def read_safetensors_header(path: str | Path) -> tuple[dict[str, tuple[str, tuple[int, ...]]], dict[str, str]]:
    """Names with dtypes and shapes, and the metadata, checked before any tensor is read.

    safetensors itself accepts duplicate keys and unbounded names; here a header must be unique, in bounds, and cover
    the data exactly.

    Returns:
        ({name: (dtype, shape)}, metadata)

    Raises:
        FileError: the file is cut short, its header is no JSON object, or its offsets do not add up.
    """
    path = Path(path)
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            start = file.read(8)
            if len(start) < 8:
                raise FileError(f"{path}: not a safetensors file: only {size} bytes")
            (length,) = struct.unpack("<Q", start)
            if length > min(size - 8, _MAX_HEADER):
                raise FileError(
                    f"{path}: not a safetensors file, or cut short: header of {length:,} bytes in a file of {size:,}"
                )
            header = parse_json(file.read(length), f"{path} (header)")
    except OSError as error:
        if isinstance(error, FileError):
            raise
        raise FileError(f"{path}: could not be read: {error.strerror or error}") from error
    if not isinstance(header, dict):
        raise FileError(f"{path}: header is not an object")
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
        raise FileError(f"{path}: __metadata__ must hold strings only")
    tensors, spans = {}, []
    for name, entry in header.items():
        try:
            dtype, shape, (begin, end) = entry["dtype"], tuple(entry["shape"]), entry["data_offsets"]
            good = all(type(n) is int and n >= 0 for n in (*shape, begin, end))
            good = good and end - begin == math.prod(shape) * _SAFETENSORS_BYTES[dtype]
        except (KeyError, TypeError, ValueError):
            good = False
        if not good:
            raise FileError(f"{path}: tensor {name!r} has a bad header entry: {str(entry)[:200]}")
        tensors[name] = (dtype, shape)
        spans.append((begin, end))
    position = 0
    for begin, end in sorted(spans):
        if begin != position:
            raise FileError(f"{path}: tensor data overlaps or has holes at byte {position}")
        position = end
    if position != size - 8 - length:
        raise FileError(
            f"{path}: holds {size - 8 - length:,} bytes of tensors, its header says {position:,}: cut short or damaged"
        )
    return tensors, metadata


def read_safetensors(path: str | Path) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """All tensors of a file (on the CPU) and its metadata, after the header has been checked."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    _, metadata = read_safetensors_header(path)
    try:
        return load_file(path), metadata
    except (SafetensorError, OSError) as error:
        raise FileError(f"{path}: could not be read: {error}") from error


def read_torch(path: str | Path) -> dict[str, torch.Tensor]:
    """The tensors of a file made by `torch.save`, by name, on the CPU: a dict of tensors, or a dict whose only entry is
    one (`{"model_state_dict": {...}}`).

    Such a file is a pickle; it is read by torch's restricted reader, which runs no code of the file, and what comes out
    must be plain tensors with no more values than the file has room for.

    Raises:
        FileError: it cannot be read, or holds anything else.
    """
    import torch

    try:
        packed = _compressed_parts(path)
        value = None if packed else torch.load(path, map_location="cpu", weights_only=True)
    except OSError as error:
        raise FileError(f"{path}: could not be read: {error.strerror or error}") from error
    except Exception as error:  # a pickle of strangers raises anything
        reason = str(error).strip().split("\n")[0]
        raise FileError(f"{path}: not a file of tensors by torch.save, or damaged: {reason}") from error
    if packed:  # a small file could unpack to any size
        raise FileError(f"{path}: its part {packed[0]} is compressed, which torch.save never does: not read")
    if isinstance(value, dict) and len(value) == 1 and isinstance(inner := next(iter(value.values())), dict):
        value = inner
    if not isinstance(value, dict) or not all(isinstance(name, str) for name in value):
        raise FileError(f"{path}: holds no dict of names and tensors; save lora_state_dict(model)")
    room = Path(path).stat().st_size
    problems = []
    for name, tensor in value.items():
        if not isinstance(tensor, torch.Tensor) or tensor.layout != torch.strided or tensor.is_quantized:
            problems.append(f"{name}: holds {type(tensor).__name__}, not a dense tensor")
        elif tensor.device.type != "cpu" or tensor.numel() * tensor.element_size() > room:
            problems.append(f"{name}: a tensor of shape {tuple(tensor.shape)} is not in a file of {room:,} bytes")
    if problems:
        raise FileError(f"{path}: not read:\n{bullet_list(problems)}")
    return {name: tensor.detach() for name, tensor in value.items()}


def _compressed_parts(path: str | Path) -> list[str]:
    if not zipfile.is_zipfile(path):
        return []
    with zipfile.ZipFile(path) as archive:
        return [entry.filename for entry in archive.infolist() if entry.compress_type != zipfile.ZIP_STORED]


def write_torch(path: str | Path, tensors: Mapping[str, torch.Tensor]) -> None:
    """Tensors as `torch.save` writes them, in the order of their names: for consumers that read nothing else."""
    import torch

    buffer = io.BytesIO()
    # cloned: of a view, torch.save would write all that it is a view of
    torch.save({name: tensors[name].detach().to("cpu").contiguous().clone() for name in sorted(tensors)}, buffer)
    write_bytes(path, buffer.getvalue())


def read_bytes(path: str | Path) -> bytes:
    """The whole file.

    Raises:
        FileError: it could not be read.
    """
    try:
        return Path(path).read_bytes()
    except OSError as error:
        raise FileError(f"{path}: could not be read: {error.strerror or error}") from error


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


# ---------------------------------------------------------------- locking


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
