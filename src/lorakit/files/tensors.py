"""Files of tensors: safetensors, whole or tensor by tensor, and what torch.save writes, read without running code."""

from __future__ import annotations

import contextlib
import io
import json
import math
import struct
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from lorakit.errors import FileError, bullet_list
from lorakit.files.json_files import parse_json
from lorakit.files.single import write_bytes, write_pieces

if TYPE_CHECKING:
    import torch


_MAX_HEADER = 64 * 1024 * 1024  # bytes; safetensors itself stops at 100 MB. 1,000 adapters x 7 x 80 tensors need less.


_SAFETENSORS_BYTES = {
    **dict.fromkeys(("BOOL", "I8", "U8", "F8_E4M3", "F8_E5M2"), 1),
    **dict.fromkeys(("I16", "U16", "F16", "BF16"), 2),
    **dict.fromkeys(("I32", "U32", "F32"), 4),
    **dict.fromkeys(("I64", "U64", "F64"), 8),
}


def write_safetensors(
    path: str | Path, tensors: Mapping[str, torch.Tensor], metadata: Mapping[str, str] | None = None
) -> None:
    """Wide dtypes first (each number then lies at a multiple of its size), then in the order of names, so equal content
    gives equal bytes. The tensors are written as they lie in memory: no more than one of them is copied at a time.

    Args:
        path: the target file.
        tensors: name -> tensor; moved to the CPU and made contiguous as needed. Those that share memory (tied weights)
            are stored each on its own.
        metadata: strings for the header.
    """
    names = sorted(tensors, key=lambda name: (-tensors[name].element_size(), name))
    layout = {name: (tensors[name].dtype, tuple(tensors[name].shape)) for name in names}

    def pieces() -> Iterator[bytes | memoryview]:
        yield _head(layout, metadata or {})
        for name in names:
            yield _raw(tensors[name])

    write_pieces(path, pieces())


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
        try:
            self._file = self._path.open("xb")
            self._file.write(_head(layout, metadata or {"format": "pt"}))
        except OSError as error:
            raise FileError(f"{path}: could not be written: {error.strerror or error}") from error

    def write(self, name: str, tensor: torch.Tensor) -> None:
        """Append the next tensor of the layout."""
        assert self._left, "every tensor of the layout has been written"
        expected = self._left.pop(0)
        assert (name, tensor.dtype, tuple(tensor.shape)) == (expected, *self._layout[expected]), "not the next one"
        try:
            self._file.write(_raw(tensor))
        except OSError as error:
            raise FileError(f"{self._path}: could not be written: {error.strerror or error}") from error

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self._file.close()
        assert kind is not None or not self._left, f"not written: {self._left[:3]}"


def _head(layout: Mapping[str, tuple[torch.dtype, tuple[int, ...]]], metadata: Mapping[str, str]) -> bytes:
    """What stands before the tensors."""
    names = {dtype: name for name, dtype in torch_dtypes().items()}
    header: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    position = 0
    for name, (dtype, shape) in layout.items():
        end = position + math.prod(shape) * _SAFETENSORS_BYTES[names[dtype]]
        header[name] = {"dtype": names[dtype], "shape": list(shape), "data_offsets": [position, end]}
        position = end
    encoded = json.dumps(header, sort_keys=True, separators=(",", ":"), ensure_ascii=False).encode()
    encoded += b" " * (-len(encoded) % 8)  # tensors begin at a multiple of eight bytes
    return struct.pack("<Q", len(encoded)) + encoded


def _raw(tensor: torch.Tensor) -> memoryview:
    """The bytes of a tensor; its own where it lies in one piece on the CPU."""
    import torch

    return tensor.detach().to("cpu").contiguous().reshape(-1).view(torch.uint8).numpy().data


def torch_dtypes() -> dict[str, torch.dtype]:
    """The dtypes of a header by its names for them."""
    import torch

    floats = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
    floats |= {"F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2}
    whole = {"I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8}
    return floats | whole | {"BOOL": torch.bool}


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
        # torch's own message advises to read it without the restriction, which runs what is in the file
        raise FileError(
            f"{path}: not a file of tensors alone, or damaged ({type(error).__name__} in torch's restricted reader); "
            "save lora_state_dict(model) with torch.save, or tensors as safetensors"
        ) from error
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
