"""The model card PEFT writes beside an adapter: README.md with metadata by which the hub finds it."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from lorakit.files import write_text
from lorakit.version import __version__

if TYPE_CHECKING:
    from lorakit.compat.peft.model import PeftModel


def write_model_card(folder: Path, model: PeftModel) -> None:
    """Write README.md into `folder`, or, where there is one, bring its metadata up to date and keep its text."""
    path = folder / "README.md"
    metadata, text = _split(path.read_text("utf-8")) if path.is_file() else ({}, "# Adapter\n\nA LoRA adapter.\n")
    base: Any = model.get_base_model()
    tags = [*(metadata.get("tags") or []), "lora"]
    config = getattr(base, "config", None)
    if config is not None:
        name = getattr(config, "_name_or_path", None) or getattr(base, "name_or_path", "")
        metadata["base_model"] = name
        if name:
            tags.append(f"base_model:adapter:{name}")
        tags.append("transformers")
    metadata["library_name"] = "peft"  # the format's name on the hub
    metadata["tags"] = sorted(set(tags))
    if "lorakit" not in text:
        text = f"{text.rstrip()}\n\nWritten by lorakit {__version__}.\n"
    front = yaml.safe_dump(metadata, sort_keys=True, allow_unicode=True)
    write_text(path, f"---\n{front}---\n{text}")


def _split(card: str) -> tuple[dict[str, Any], str]:
    """(metadata, text after it)."""
    if card.startswith("---\n") and "\n---" in card[3:]:
        front, _, text = card[4:].partition("\n---")
        metadata = yaml.safe_load(front)
        if isinstance(metadata, dict):
            return metadata, text.lstrip("\n")
    return {}, card
