"""Examples of large data sets, kept in the user's cache folder and found again by what they were made of.

What is kept is only what encoding would give again, so a file that is missing, damaged or another's is as good as none:
the rows are encoded and it is written anew. Knows no data sets' files: where a row stood is told by the row at hand.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Callable, Sequence
from importlib import metadata, resources
from itertools import accumulate, islice, pairwise
from pathlib import Path

import numpy as np
import torch

from lorakit import files
from lorakit.data.chat import ChatFormat, Example
from lorakit.data.rendering import dated
from lorakit.data.schema import Parsed
from lorakit.data.sources import Row
from lorakit.errors import FileError
from lorakit.version import __version__

WORTHWHILE = 1_000_000  # characters that rows say: fewer are encoded about as fast as a cache is asked
MOST_BYTES = 4 * 10**9  # of all that is kept: 800 million tokens

_log = logging.getLogger(__name__)
_UNDETERMINED = ("strftime_now", "random", "lipsum")  # in a template: it may write another text the next time
_ENCODED_BY = ("transformers", "tokenizers", "jinja2")

# of a file: one value a token, an example, or a row
_LAYOUT = {
    "ids": torch.int32, "trained": torch.bool,
    "lengths": torch.int64, "ends": torch.bool, "prompt_cut": torch.int64, "answer_cut": torch.int64,
    "eos_appended": torch.bool,
    "examples": torch.int64,
}  # fmt: skip
_OF_EXAMPLES = ("lengths", "ends", "prompt_cut", "answer_cut", "eos_appended")
_Kept = dict[str, torch.Tensor]


def cached_examples(
    rows: Sequence[Row], parsed: Sequence[Parsed], chat_format: ChatFormat, encode: Callable[[], list[list[Example]]]
) -> list[list[Example]]:
    """What `encode()` gives, from the cache if it was given before for the same rows and format.

    Args:
        rows: in their order.
        parsed: what each of them says.
        chat_format: that `encode` encodes them by.
        encode: the examples of each row.
    """
    said, size = _digest_of(parsed)
    format_key = key_of(chat_format) if size >= WORTHWHILE else None
    if format_key is None:
        return encode()
    key = hashlib.sha256(f"{said} {format_key}".encode()).hexdigest()
    path = files.cache_folder() / "tokens" / f"{key}.safetensors"
    if (found := _read(path, key, rows, chat_format)) is not None:
        files.mark_used(path)
        return found
    examples = encode()
    try:
        _write(path, key, examples)
    except OSError as error:  # also FileError: a run needs its tokens, not that they are kept
        _log.info("tokens are not kept: %s", error)
    return examples


def _digest_of(parsed: Sequence[Parsed]) -> tuple[str, int]:
    """Hash and number of characters of what rows say. Keys that are ignored are no part of it."""
    hasher, size = hashlib.sha256(), 0
    for each in parsed:
        text = repr(each)
        hasher.update(f"{len(text)} {text}".encode())
        size += len(text)
    return hasher.hexdigest(), size


def key_of(chat_format: ChatFormat) -> str | None:
    """Hash of all that makes examples of what a row says; None where not all of it can be known.

    That is so for a tokenizer that is a program of its own, and for a template that reads the clock (in another way
    than `rendering.dated` knows) or draws at random.
    """
    tokenizer, template = chat_format.tokenizer, chat_format.template
    kind = type(tokenizer)
    if not (kind.__module__.startswith("transformers.") and tokenizer.is_fast):
        return None
    if template is not None and any(word in dated(template) for word in _UNDETERMINED):
        return None
    chat_format.ids("")  # a tokenizer may come with a limit that its first use takes away
    parts = [
        __version__,
        [metadata.version(name) for name in _ENCODED_BY],
        _code_digest(),
        template,
        sorted(chat_format.stop_ids),
        [chat_format.max_length, chat_format.train_on],
        f"{kind.__module__}.{kind.__qualname__}",
        [tokenizer.bos_token_id, tokenizer.eos_token_id, bool(tokenizer.split_special_tokens)],
        {name: str(text) for name, text in sorted(tokenizer.special_tokens_map.items())},
        hashlib.sha256(tokenizer.backend_tokenizer.to_str().encode()).hexdigest(),
    ]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


def _code_digest() -> str:
    """Hash of the code here, which may change without the version while it is worked on."""
    hasher = hashlib.sha256()
    for file in sorted(resources.files("lorakit.data").iterdir(), key=lambda file: file.name):
        if file.name.endswith(".py"):
            hasher.update(file.read_bytes())
    return hasher.hexdigest()


# ---------------------------------------------------------------- files


def _write(path: Path, key: str, examples: Sequence[Sequence[Example]]) -> None:
    flat = [example for of_row in examples for example in of_row]
    tensors = {
        "ids": _tensor(np.concatenate([np.asarray(example.ids, np.int32) for example in flat])),
        "trained": _tensor(np.concatenate([np.asarray(example.trained, np.bool_) for example in flat])),
        "lengths": torch.tensor([len(example.ids) for example in flat]),
        **{name: torch.tensor([getattr(example, name) for example in flat]) for name in _OF_EXAMPLES[1:]},
        "examples": torch.tensor([len(of_row) for of_row in examples]),
    }
    size = sum(tensor.nbytes for tensor in tensors.values())
    if size > MOST_BYTES:
        return
    files.write_safetensors(path, tensors, {"key": key, "sha256": _checksum(tensors)})
    files.make_room(path.parent, MOST_BYTES)


def _tensor(array: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(array)


def _checksum(tensors: _Kept) -> str:
    hasher = hashlib.sha256()
    for name in sorted(tensors):
        hasher.update(f"{name} {len(tensors[name])} ".encode())
        hasher.update(tensors[name].numpy().data)
    return hasher.hexdigest()


def _read(path: Path, key: str, rows: Sequence[Row], chat_format: ChatFormat) -> list[list[Example]] | None:
    """The examples of rows from a file; None where there is none, or not a sound one."""
    if not path.is_file():
        return None
    try:
        tensors, about = files.read_safetensors(path)
    except FileError as error:
        _log.info("tokens are made anew: %s", error)
        return None
    if not _is_sound(tensors, about, key, len(rows), chat_format):
        _log.info("tokens are made anew: %s is damaged", path)
        return None
    ids, trained = tensors["ids"].numpy(), tensors["trained"].numpy()
    ends = accumulate(tensors["lengths"].tolist(), initial=0)
    fields = zip(pairwise(ends), *(tensors[name].tolist() for name in _OF_EXAMPLES[1:]), strict=True)
    return [
        [
            Example(
                ids[start:end].tolist(),
                trained[start:end].tolist(),
                row.origin,
                ends=ended,
                prompt_cut=prompt_cut,
                answer_cut=answer_cut,
                eos_appended=appended,
            )
            for (start, end), ended, prompt_cut, answer_cut, appended in islice(fields, count)
        ]
        for row, count in zip(rows, tensors["examples"].tolist(), strict=True)
    ]


def _is_sound(tensors: _Kept, about: dict[str, str], key: str, rows: int, chat_format: ChatFormat) -> bool:
    """Whether a file holds what `_write` wrote for these rows: the checksum says so, and the rest that it adds up."""
    if {name: tensor.dtype for name, tensor in tensors.items()} != _LAYOUT or about.get("key") != key:
        return False
    if any(tensor.dim() != 1 for tensor in tensors.values()) or about.get("sha256") != _checksum(tensors):
        return False
    lengths, counts, ids = tensors["lengths"], tensors["examples"], tensors["ids"]
    return (
        len(counts) == rows
        and bool((counts >= 1).all())
        and int(counts.sum()) == len(lengths)
        and all(len(tensors[name]) == len(lengths) for name in _OF_EXAMPLES)
        and bool(((lengths >= 1) & (lengths <= chat_format.max_length)).all())
        and int(lengths.sum()) == len(ids) == len(tensors["trained"])
        and bool((ids >= 0).all())
        and bool((tensors["prompt_cut"] >= 0).all() and (tensors["answer_cut"] >= 0).all())
    )
