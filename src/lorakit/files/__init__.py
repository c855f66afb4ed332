"""Every byte lorakit writes or reads. Knows files, not what is in them.

Writing is atomic, of files (`single`) and of folders (`folders`). Reading is strict, one reader per format
(`json_files`, `tensors`): damage is an error that names the file and the place.
"""

from lorakit.files.cache import cache_folder, make_room, mark_used
from lorakit.files.folders import (
    MANIFEST,
    atomic_folder,
    free_folder,
    is_vacant,
    locked_folder,
    remove_leftovers,
    verify_folder,
)
from lorakit.files.json_files import JsonLines, parse_json, read_json, write_json
from lorakit.files.single import fsync_folder, read_bytes, sha256_file, write_bytes, write_text
from lorakit.files.tensors import (
    SafetensorsWriter,
    open_safetensors,
    read_safetensors,
    read_safetensors_header,
    read_torch,
    torch_dtypes,
    write_safetensors,
    write_torch,
)

__all__ = [
    "MANIFEST",
    "JsonLines",
    "SafetensorsWriter",
    "atomic_folder",
    "cache_folder",
    "free_folder",
    "fsync_folder",
    "is_vacant",
    "locked_folder",
    "make_room",
    "mark_used",
    "open_safetensors",
    "parse_json",
    "read_bytes",
    "read_json",
    "read_safetensors",
    "read_safetensors_header",
    "read_torch",
    "remove_leftovers",
    "sha256_file",
    "torch_dtypes",
    "verify_folder",
    "write_bytes",
    "write_json",
    "write_safetensors",
    "write_text",
    "write_torch",
]
