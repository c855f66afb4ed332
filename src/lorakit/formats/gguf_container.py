"""The container of a GGUF file: metadata and tensors, written as version 3 and read strictly. Little-endian, as all
files of adapters are. Knows no names of models or layers.

Layout: magic, version, counts; metadata as (key, type, value); tensors as (name, dimensions innermost first, type,
offset); then the data, each tensor at a multiple of the alignment.
"""

from __future__ import annotations

import functools
import math
import mmap
import struct
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from lorakit import files
from lorakit.errors import FileError

if TYPE_CHECKING:
    import numpy as np
    import torch

MAGIC = b"GGUF"
_VERSION = 3
_ALIGNMENT = 32
_MAX_NAME = 63  # bytes; ggml keeps tensor names in 64 with a terminating zero
_STRING, _ARRAY, _UINT32, _FLOAT32 = 8, 9, 4, 6
_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_F32, _F16 = 0, 1


# ---------------------------------------------------------------- writing


def write(
    path: Path,
    metadata: Mapping[str, str | int | float | list[int]],
    tensors: Mapping[str, torch.Tensor],
    tensor_type: Literal["f32", "f16"],
) -> None:
    """Write a file, tensors in the order of their names, so that equal content gives equal bytes.

    Args:
        path: the target file.
        metadata: key -> string, unsigned integer (32 bits) or a list of such, or number (fp32).
        tensors: name -> tensor of one to four dimensions; in the file the last dimension comes first.
        tensor_type: dtype of storage.

    Raises:
        FileError: it could not be written, or a value is too large for the dtype.
    """
    head = MAGIC + struct.pack("<IQQ", _VERSION, len(tensors), len(metadata))
    for key, value in metadata.items():
        head += _string(key) + _value(value)
    body = bytearray()
    for name in sorted(tensors):
        assert len(name.encode()) <= _MAX_NAME, "names of GGUF tensors are short"
        shape = tensors[name].shape[::-1]
        kind = _F32 if tensor_type == "f32" else _F16
        head += _string(name) + struct.pack(f"<I{len(shape)}QIQ", len(shape), *shape, kind, len(body))
        body += _data(tensors[name], tensor_type, f"{path}: {name}")
        body += bytes(-len(body) % _ALIGNMENT)
    files.write_bytes(path, head + bytes(-len(head) % _ALIGNMENT) + bytes(body))


def _data(tensor: torch.Tensor, tensor_type: str, where: str) -> bytes:
    import torch

    stored = tensor.detach().to("cpu", torch.float32 if tensor_type == "f32" else torch.float16).contiguous()
    if not torch.isfinite(stored).all():
        raise FileError(f"{where}: its largest value, {float(tensor.abs().max()):g}, is too large for {tensor_type}")
    return stored.numpy().tobytes()


def _string(text: str) -> bytes:
    data = text.encode()
    return struct.pack("<Q", len(data)) + data


def _value(value: str | int | float | list[int]) -> bytes:
    if isinstance(value, list):
        return struct.pack(f"<IIQ{len(value)}I", _ARRAY, _UINT32, len(value), *value)
    if isinstance(value, str):
        return struct.pack("<I", _STRING) + _string(value)
    if isinstance(value, int):
        return struct.pack("<II", _UINT32, value)
    return struct.pack("<If", _FLOAT32, value)


# ---------------------------------------------------------------- reading


def read(path: Path) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """Metadata and tensors (fp32, whatever they are stored in) of a file, every byte of it accounted for.

    Raises:
        FileError: cut short, damaged, or of a version or tensor type that cannot be read.
    """
    data = files.read_bytes(path)
    try:
        return _read(data, path)
    except _DamagedError as error:
        raise FileError(f"{path}: cut short or damaged: {error}") from None


@dataclass(frozen=True)
class Entry:
    """A tensor of a file.

    Attributes:
        shape: last dimension innermost.
        kind: ggml's number of the type of its data.
        offset: of its first byte, from the end of the header.
    """

    shape: tuple[int, ...]
    kind: int
    offset: int


@dataclass(frozen=True)
class Header:
    """All of a file but the data.

    Attributes:
        metadata: key -> value.
        entries: name -> tensor.
        alignment: of tensors, in bytes.
        size: bytes before the data.
    """

    metadata: dict[str, Any]
    entries: dict[str, Entry]
    alignment: int
    size: int


def read_header(data: bytes | mmap.mmap, path: Path, *, lists: bool = True) -> Header:
    """The header of a file that is in memory, or mapped into it.

    Args:
        data: of the whole file.
        path: named in errors.
        lists: keep lists of texts (a vocabulary); else an empty list stands for each.

    Raises:
        FileError: no GGUF file, cut short, damaged, or of a version that cannot be read.
    """
    if data[:4] != MAGIC:
        raise FileError(f"{path}: not a GGUF file")
    try:
        return _header(_Cursor(data, 4, lists=lists), path)
    except _DamagedError as error:
        raise FileError(f"{path}: cut short or damaged: {error}") from None


def _header(cursor: _Cursor, path: Path) -> Header:
    (version,) = cursor.unpack("I")
    if version not in (2, 3):
        raise FileError(f"{path}: GGUF version {version}; this version of lorakit reads 2 and 3, little-endian")
    tensor_count, key_count = cursor.unpack("QQ")
    metadata: dict[str, Any] = {}
    for _ in range(key_count):  # a false count ends at the end of the data
        key = cursor.string()
        if key in metadata:
            raise _DamagedError(f"the key {key!r} twice")
        metadata[key] = cursor.value(cursor.unpack("I")[0])
    entries: dict[str, Entry] = {}
    for _ in range(tensor_count):
        name = cursor.string()
        if name in entries:
            raise _DamagedError(f"the tensor {name!r} twice")
        (dimensions,) = cursor.unpack("I")
        if not 1 <= dimensions <= 4:
            raise _DamagedError(f"the tensor {name!r} has {dimensions} dimensions")
        *shape, kind, offset = cursor.unpack(f"{dimensions}QIQ")
        entries[name] = Entry(tuple(shape[::-1]), kind, offset)
    alignment = metadata.get("general.alignment", _ALIGNMENT)
    if type(alignment) is not int or alignment < 1:
        raise _DamagedError(f"an alignment of {alignment!r}")
    return Header(metadata, entries, alignment, cursor.position + -cursor.position % alignment)


def _read(data: bytes, path: Path) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    header = read_header(data, path)
    start = header.size
    tensors, position = {}, 0
    for name, entry in sorted(header.entries.items(), key=lambda item: item[1].offset):
        if entry.offset != position:
            raise _DamagedError(f"the data of {name!r} overlap or leave a hole at byte {position}")
        tensors[name], size = _tensor(data, start + entry.offset, entry, name)
        position = entry.offset + size + -(entry.offset + size) % header.alignment
    if len(data) > start + position:
        raise _DamagedError(f"{len(data) - start - position:,} bytes after the last tensor")
    return header.metadata, tensors


def _tensor(data: bytes, begin: int, entry: Entry, name: str) -> tuple[torch.Tensor, int]:
    """One tensor in fp32, and its size in the file."""
    import numpy as np
    import torch
    from gguf.quants import dequantize

    kind, row_bytes = _stored_as(entry, name)
    size = math.prod(entry.shape[:-1]) * row_bytes
    if begin + size > len(data):
        raise _DamagedError(f"the tensor {name!r} of shape {entry.shape} ends after the file")
    raw = np.frombuffer(data, np.uint8, size, begin).reshape(*entry.shape[:-1], row_bytes)
    try:
        values = dequantize(raw, kind)
    except NotImplementedError:
        raise _DamagedError(f"the tensor {name!r} is of type {kind.name}, which is no weight") from None
    return torch.from_numpy(np.array(values, np.float32).reshape(entry.shape)), size


def _stored_as(entry: Entry, name: str) -> tuple[Any, int]:
    """gguf's own name of a tensor's type, and the bytes of a row."""
    from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

    try:
        kind = GGMLQuantizationType(entry.kind)
    except ValueError:
        raise _DamagedError(f"the tensor {name!r} is of the unknown type {entry.kind}") from None
    block, block_bytes = GGML_QUANT_SIZES[kind]
    if entry.shape[-1] % block:
        raise _DamagedError(f"the tensor {name!r} of shape {entry.shape} does not divide into blocks of {block}")
    return kind, entry.shape[-1] // block * block_bytes


@functools.lru_cache(maxsize=4)
def _header_at(path: Path, size: int, changed: int) -> Header:
    """The header of the file of that size and time, without its lists of texts: it is asked for several times."""
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        return read_header(data, path, lists=False)


class MappedFile:
    """A GGUF file whose tensors stay where they are: mapped into memory, read from disk when they are looked at.

    Attributes:
        path: of the file.
        header: of it, without its lists of texts.
        header_bytes: as they stand in the file.
    """

    def __init__(self, path: Path) -> None:
        """Map a file.

        Raises:
            FileError: it cannot be read, or is no sound GGUF file.
        """
        self.path = path
        try:
            with path.open("rb") as file:  # copied on writing: whatever happens here, the file stays as it is
                self._data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
        except (OSError, ValueError) as error:  # an empty file cannot be mapped
            raise FileError(f"{path}: cannot be read: {error}") from error
        self.header = _header_at(path, len(self._data), path.stat().st_mtime_ns)
        self.header_bytes = self._data[: self.header.size]
        self._raw: dict[str, tuple[str, int, int]] = {}  # name -> type, first byte, bytes of a row
        for name, entry in self.header.entries.items():
            try:
                kind, row_bytes = _stored_as(entry, name)
            except _DamagedError as error:
                raise FileError(f"{path}: cut short or damaged: {error}") from None
            begin = self.header.size + entry.offset
            if begin + math.prod(entry.shape[:-1]) * row_bytes > len(self._data):
                raise FileError(
                    f"{path}: cut short or damaged: the tensor {name!r} of shape {entry.shape} ends after the file"
                )
            self._raw[name] = kind.name, begin, row_bytes

    def kind(self, name: str) -> str:
        """ggml's name for the type of a tensor: F32, Q4_K, ..."""
        return self._raw[name][0]

    def nbytes(self, name: str) -> int:
        """Bytes of a tensor's data."""
        return math.prod(self.header.entries[name].shape[:-1]) * self._raw[name][2]

    def raw(self, name: str) -> torch.Tensor:
        """A tensor's bytes, row by row: (*shape without the last dimension, bytes of a row) uint8, not copied."""
        import torch

        _, begin, row_bytes = self._raw[name]
        shape = (*self.header.entries[name].shape[:-1], row_bytes)
        if not math.prod(shape):
            return torch.empty(shape, dtype=torch.uint8)
        return torch.frombuffer(self._data, dtype=torch.uint8, count=math.prod(shape), offset=begin).view(shape)

    def copied(self, target: Path, changes: Iterable[tuple[str, torch.Tensor]]) -> None:
        """Write the same file with other data for some tensors; metadata, types and all else are this file's bytes.

        For files inside an `atomic_folder`, which makes them durable and puts them in place.

        Args:
            target: a file that does not exist yet.
            changes: (name, bytes as `raw` has them), taken one by one.

        Raises:
            FileError: it could not be written.
        """
        import torch

        try:
            with target.open("xb") as file:
                file.write(self._data)
                for name, raw in changes:
                    assert raw.dtype == torch.uint8, "bytes"
                    assert raw.numel() == self.nbytes(name), f"{name}: of another size than in the file"
                    file.seek(self._raw[name][1])
                    file.write(raw.contiguous().numpy().data)
        except OSError as error:
            raise FileError(f"{target}: could not be written: {error.strerror or error}") from error

    def values(self, name: str) -> np.ndarray:
        """A tensor's numbers in fp32, by gguf's own code.

        Raises:
            FileError: it is of a type that has none.
        """
        import numpy as np
        from gguf import GGMLQuantizationType
        from gguf.quants import dequantize

        try:
            values = dequantize(self.raw(name).numpy(), GGMLQuantizationType[self.kind(name)])
        except NotImplementedError:
            raise FileError(
                f"{self.path}: the tensor {name!r} is of type {self.kind(name)}, which is no weight"
            ) from None
        return np.array(values, np.float32).reshape(self.header.entries[name].shape)


class _DamagedError(Exception):
    """What is wrong with the content; `read` adds the file."""


class _Cursor:
    """Reads a GGUF header from the front, never past its end."""

    def __init__(self, data: bytes | mmap.mmap, position: int, *, lists: bool = True) -> None:
        self.data = data
        self.lists = lists
        self.position = position

    def unpack(self, form: str) -> tuple[Any, ...]:
        values = struct.Struct(f"<{form}")
        if self.position + values.size > len(self.data):
            raise _DamagedError(f"the header ends at byte {self.position}")
        self.position += values.size
        return values.unpack_from(self.data, self.position - values.size)

    def string(self) -> str:
        (length,) = self.unpack("Q")
        if length > len(self.data) - self.position:
            raise _DamagedError(f"a text of {length:,} bytes at byte {self.position}")
        self.position += length
        try:
            return self.data[self.position - length : self.position].decode()
        except UnicodeDecodeError:
            raise _DamagedError(f"text that is not UTF-8 before byte {self.position}") from None

    def _pass_strings(self, count: int) -> None:
        position, data, length_at, end = self.position, self.data, struct.Struct("<Q").unpack_from, len(self.data) - 8
        for _ in range(count):
            if position > end:
                raise _DamagedError(f"the header ends at byte {position}")
            position += 8 + length_at(data, position)[0]
        self.position = position  # past the end, what is read next says so

    def value(self, kind: int) -> Any:
        if kind == _STRING:
            return self.string()
        if kind == _ARRAY:
            inner, count = self.unpack("IQ")
            if inner in _SCALARS and count <= len(self.data) - self.position:
                return list(self.unpack(f"{count}{_SCALARS[inner]}"))
            if inner == _STRING and self.lists:
                return [self.string() for _ in range(count)]
            if inner == _STRING:
                self._pass_strings(count)
                return []
            raise _DamagedError(f"an array of {count:,} values of type {inner} before byte {self.position}")
        if kind not in _SCALARS:
            raise _DamagedError(f"a value of the unknown type {kind} before byte {self.position}")
        return self.unpack(_SCALARS[kind])[0]
