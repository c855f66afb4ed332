"""Where verbs that make an adapter of adapters put it: a folder in PEFT's format, tokenizer and all."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from lorakit.errors import AdapterError, bullet_list

if TYPE_CHECKING:
    from lorakit.adapter.value import Adapter

# what `save_pretrained` of a tokenizer writes
_TOKENIZER_FILES = (
    *("tokenizer_config.json", "tokenizer.json", "special_tokens_map.json", "added_tokens.json", "chat_template.jinja"),
    *("chat_template.json", "vocab.json", "vocab.txt", "merges.txt", "tokenizer.model", "spiece.model"),
)


def refuse_taken(output: str) -> None:
    """Refuse a place where something lies, before any work is done.

    Raises:
        AdapterError: the folder is there and not empty.
    """
    from lorakit.files import is_vacant

    if not is_vacant(output):
        raise AdapterError(f"--output {output}: something is there already; remove it or name another folder")


def tokenizer_of(adapters: Sequence[str], chosen: str | None = None) -> dict[str, bytes]:
    """The tokenizer files that lie beside the adapters: name -> content; empty where none has any.

    Args:
        adapters: folders (or files, which have none beside them that count).
        chosen: the one of them to take it from; None: they must not differ.

    Raises:
        AdapterError: they differ, or `chosen` is none of them.
    """
    if chosen is not None and chosen not in adapters:
        raise AdapterError(f"--tokenizer {chosen}: name one of the adapters: {', '.join(adapters)}")
    found = {adapter: _tokenizer_files(Path(adapter)) for adapter in ([chosen] if chosen is not None else adapters)}
    having = {adapter: files for adapter, files in found.items() if files}
    first = next(iter(having.values()), {})
    differing = [adapter for adapter, files in having.items() if files != first]
    if differing:
        listing = bullet_list([f"{adapter}: differs from that of {next(iter(having))}" for adapter in differing])
        raise AdapterError(
            f"the tokenizers or chat templates beside the adapters differ:\n{listing}\n"
            "Choose whose the result is used with: --tokenizer ADAPTER"
        )
    return first


def _tokenizer_files(folder: Path) -> dict[str, bytes]:
    return {name: (folder / name).read_bytes() for name in _TOKENIZER_FILES if (folder / name).is_file()}


def write_adapter(adapter: Adapter, output: str, tokenizer: dict[str, bytes]) -> None:
    """Write adapter and tokenizer into the new folder `output`, all or nothing.

    Raises:
        AdapterFileError, FileError: it cannot be written.
    """
    from lorakit.files import atomic_folder, write_bytes

    with atomic_folder(output) as building:
        adapter.save(building)
        for name, content in tokenizer.items():
            write_bytes(building / name, content)
