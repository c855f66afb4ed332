"""Adapter folders as PEFT users name them: a path, a subfolder, or a repository on the hub."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any

import torch

from lorakit.adapter.value import Adapter
from lorakit.compat.peft.errors import PeftValueError, UnsupportedError
from lorakit.errors import AdapterError, AdapterFileError
from lorakit.files import read_safetensors
from lorakit.formats import Context, codec
from lorakit.formats.peft import CONFIG_FILE, TENSOR_FILE


def adapter_folder(name: str | Path, subfolder: str | None = None, **options: Any) -> Path:
    """The folder of an adapter: `name` (and `subfolder` in it) if there is one, else downloaded from the hub.

    Args:
        name: path, or repository.
        subfolder: in it.
        **options: `revision`, `token`, `cache_dir` ... for the hub; others are ignored.

    Raises:
        PeftValueError: neither a folder with an adapter nor such a repository.
    """
    folder = Path(name) / subfolder if subfolder else Path(name)
    if folder.is_dir():
        if not (folder / CONFIG_FILE).is_file():
            inside = sorted(p.parent.name for p in folder.glob(f"*/{CONFIG_FILE}"))
            raise PeftValueError(
                f"Can't find '{CONFIG_FILE}' at '{folder}'"
                + (f"; adapters are in {', '.join(inside)}" if inside else "")
            )
        return folder
    from huggingface_hub import snapshot_download

    known = inspect.signature(snapshot_download).parameters
    try:
        files = [f"{subfolder}/{f}" if subfolder else f for f in (CONFIG_FILE, TENSOR_FILE)]
        local = snapshot_download(
            str(name), allow_patterns=files, **{k: v for k, v in options.items() if k in known and v is not None}
        )
    except Exception as error:  # whatever the hub's client raises: no such repository, no network, not a name at all
        raise PeftValueError(f"Can't find '{CONFIG_FILE}' at '{name}': no such folder, and {error}") from error
    return adapter_folder(local, subfolder)


def read_adapter(folder: Path) -> Adapter:
    """Read an adapter folder strictly. A fresh adapter, whose update is zero, is taken too: PEFT's users save them.

    Raises:
        AdapterFileError: damaged, not understood in full, or not sound.
    """
    adapter = codec("peft").read(folder, Context())
    try:
        adapter.check(allow_zero=True)
    except AdapterError as error:
        raise AdapterFileError(f"{folder}: {error}") from None
    return adapter


def load_peft_weights(
    model_id: str | Path, device: str | None = None, key_mapping: dict[str, str] | None = None, **options: Any
) -> dict[str, torch.Tensor]:
    """The tensors of an adapter's file, as they are named in it.

    Args:
        model_id: folder or repository.
        device: where to; None: the CPU.
        key_mapping: not supported.
        **options: for the hub, and `subfolder`.
    """
    if key_mapping:
        raise UnsupportedError("key_mapping is not in this version")
    folder = adapter_folder(model_id, options.pop("subfolder", None), **options)
    tensors, _ = read_safetensors(folder / TENSOR_FILE)
    return {name: tensor.to(device or "cpu") for name, tensor in tensors.items()}
