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
    metadata, text = _split(path.read_text("utf-8")) if path.is_file() else ({}, _text(model))
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


def _text(model: PeftModel) -> str:
    """What the files beside it say, for people: settings, and how to load them."""
    config = model.peft_config[_name(model)]
    trained = sum(p.numel() for p in model.base_model.handle.trainable_tensors(_name(model)).values())
    base = config.base_model_name_or_path or "the base model it was trained on"
    rows = "\n".join(
        f"| {name} | {value} |"
        for name, value in {
            "base model": base,
            "rank `r`": config.r,
            "`lora_alpha`": config.lora_alpha,
            "`use_rslora`": config.use_rslora,
            "`lora_dropout`": config.lora_dropout,
            "`target_modules`": config.to_dict()["target_modules"],
            "`modules_to_save`": config.modules_to_save or "none",
            "parameters": f"{trained:,}",
        }.items()
    )
    return f"""# LoRA adapter for {base}

A low-rank adapter ([LoRA](https://arxiv.org/abs/2106.09685)): `adapter_model.safetensors` holds its factors and
`adapter_config.json` its settings. It works only together with the base model.

| setting | value |
|---|---|
{rows}

## How to use it

With lorakit:

```python
import lorakit

model, tokenizer = lorakit.load_model("{base}")
lorakit.attach(model, "path/to/this/folder")
```

With transformers and PEFT, or with the same names from lorakit (`from lorakit.compat.peft import PeftModel`):

```python
from peft import PeftModel
from transformers import AutoModelForCausalLM

model = AutoModelForCausalLM.from_pretrained("{base}")
model = PeftModel.from_pretrained(model, "path/to/this/folder")
```

What it was trained on, and how it was measured, is for whoever trained it to write here.

Written by lorakit {__version__}.
"""


def _name(model: PeftModel) -> str:
    return model.active_adapters[0] if model.active_adapters else next(iter(model.peft_config))
