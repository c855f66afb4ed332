"""PEFT's folder of a soft prompt, and the folder of an adapter that has low-rank updates and a soft prompt.

A soft prompt alone is exactly PEFT's: `adapter_config.json` with `peft_type` PROMPT_TUNING, P_TUNING or PREFIX_TUNING,
and one tensor, `prompt_embeddings`, (p, d) or (p, layers * 2 * d). PEFT has no form for both kinds in one, so such an
adapter is a folder of two of PEFT's, `lora/` and `prompt/`, and the manifest `lorakit_adapter.json` that says so: no
tool takes the one for the whole.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from lorakit.adapter.prompt_config import PromptConfig
from lorakit.adapter.value import Adapter, BaseInfo, Prompt
from lorakit.core.prompts import KeyValues
from lorakit.errors import AdapterFileError, ConfigError, FileError, bullet_list
from lorakit.files import read_json, write_json

MANIFEST = "lorakit_adapter.json"
PARTS = {"lora": "lora", "prompt": "prompt"}
"""Part of an adapter -> its folder."""
TENSOR = "prompt_embeddings"

_KINDS = {"PROMPT_TUNING": "prompt", "P_TUNING": "p_tuning", "PREFIX_TUNING": "prefix"}
_INITS = {"TEXT": "text", "SAMPLE_VOCAB": "vocabulary", "RANDOM": "random"}
_READ = {
    *("num_virtual_tokens", "num_layers", "num_attention_heads", "token_dim", "num_transformer_submodules"),
    *("prompt_tuning_init", "prompt_tuning_init_text"),
}
# what an encoder was while it was trained; what is saved is what it made
_NEUTRAL = {
    *("auto_mapping", "base_model_name_or_path", "inference_mode", "peft_type", "peft_version", "revision"),
    *("task_type", "tokenizer_name_or_path", "tokenizer_kwargs", "init_weights", "prefix_projection"),
    *("encoder_hidden_size", "encoder_num_layers", "encoder_dropout", "encoder_reparameterization_type"),
}


def is_prompt(values: Any) -> bool:
    """Whether a PEFT config is a soft prompt's."""
    return isinstance(values, dict) and values.get("peft_type") in _KINDS


def config_for_peft(prompt: Prompt, base: BaseInfo | None) -> dict[str, Any]:
    """adapter_config.json of a soft prompt. What PEFT sees from the model is null, as far as it is not known here."""
    config, shape = prompt.config, prompt.key_values
    name = (base.published or base.name) if base else None
    written: dict[str, Any] = {
        "auto_mapping": None,
        "base_model_name_or_path": name,
        "inference_mode": True,
        "num_attention_heads": None if shape is None else shape.heads,
        "num_layers": None if shape is None else shape.layers,
        "num_transformer_submodules": 1,
        "num_virtual_tokens": prompt.length,
        "peft_type": next(theirs for theirs, ours in _KINDS.items() if ours == config.soft_prompt),
        "revision": None,
        "task_type": "CAUSAL_LM",
        "token_dim": prompt.values.shape[1] if shape is None else shape.heads * shape.width,
    }
    if config.soft_prompt == "prefix":
        return written | {"encoder_hidden_size": written["token_dim"], "prefix_projection": False}
    if config.soft_prompt == "p_tuning":
        return written | {"encoder_hidden_size": written["token_dim"], "encoder_reparameterization_type": "MLP"}
    init = {ours: theirs for theirs, ours in _INITS.items()}[config.init]
    if init == "TEXT" and name is None:  # PEFT takes a text with the name of a tokenizer only, to begin with
        init = "RANDOM"
    return written | {
        "prompt_tuning_init": init,
        "prompt_tuning_init_text": config.prompt_text if init == "TEXT" else None,
        "tokenizer_kwargs": None,
        "tokenizer_name_or_path": name if init == "TEXT" else None,
    }


def read_prompt(values: dict[str, Any], tensors: dict[str, Any], config_file: Path, tensor_file: Path) -> Prompt:
    """A soft prompt from PEFT's config and tensors.

    Raises:
        AdapterFileError: a setting is not supported, sizes do not belong together, or there are other tensors.
    """
    kind = _KINDS[values["peft_type"]]
    problems = [
        f"{key} is {value!r}, which this version does not support"
        for key, value in values.items()
        if key not in _READ | _NEUTRAL and value not in (None, False, {}, [], "")
    ]
    if values.get("num_transformer_submodules") not in (None, 1):
        problems.append(
            "num_transformer_submodules: virtual tokens in two stacks, which causal language models have not"
        )
    init = values.get("prompt_tuning_init")
    settings: dict[str, Any] = {"soft_prompt": kind, "virtual_tokens": values.get("num_virtual_tokens")}
    settings |= {"prompt_encoder": "none"}
    if kind == "prompt":
        settings |= {"prompt_init": _INITS.get(str(init), init) if init is not None else "random"}
        settings |= {"prompt_text": values.get("prompt_tuning_init_text") if init == "TEXT" else None}
    else:
        settings |= {"prompt_init": "random"}
    if not problems:
        try:
            config = PromptConfig(**settings)
        except (ConfigError, TypeError) as error:
            problems.append(str(error))
    if problems:
        raise AdapterFileError(f"{config_file}: cannot be used:\n{bullet_list(problems)}")
    if set(tensors) != {TENSOR}:
        raise AdapterFileError(
            f"{tensor_file}: a soft prompt is one tensor, {TENSOR}; found {', '.join(tensors) or 'none'}"
        )
    return Prompt(config=config, values=tensors[TENSOR], key_values=_key_values(values, config, config_file))


def _key_values(values: dict[str, Any], config: PromptConfig, where: Path) -> KeyValues | None:
    if not config.is_prefix:
        return None
    sizes = [values.get(key) for key in ("num_layers", "num_attention_heads", "token_dim")]
    if not all(isinstance(size, int) and not isinstance(size, bool) and size > 0 for size in sizes) or (
        sizes[2] % sizes[1]  # type: ignore[operator]
    ):
        raise AdapterFileError(
            f"{where}: of a prefix num_layers, num_attention_heads and token_dim say how it is divided; found {sizes}"
        )
    layers, heads, width = (int(size) for size in sizes)  # type: ignore[arg-type]
    return KeyValues(layers, heads, width // heads)


# ---------------------------------------------------------------- both kinds in one folder


def write_manifest(folder: Path) -> None:
    """Say that a folder is an adapter of two parts."""
    write_json(folder / MANIFEST, {"format": 1, "parts": PARTS})


def read_manifest(folder: Path) -> None:
    """See that a folder is one of two parts as we write it.

    Raises:
        AdapterFileError: its manifest says something else, or a part is missing.
    """
    try:
        found = read_json(folder / MANIFEST)
    except FileError as error:
        raise AdapterFileError(str(error)) from error
    if found != {"format": 1, "parts": PARTS}:
        raise AdapterFileError(f"{folder / MANIFEST}: not a manifest of this version of lorakit: {found}")
    missing = [name for name in PARTS.values() if not (folder / name).is_dir()]
    if missing:
        raise AdapterFileError(f"{folder}: an adapter of two parts without its folder {' and '.join(missing)}")


def joined(lora: Adapter, prompt: Adapter, folder: Path) -> Adapter:
    """One adapter of two parts.

    Raises:
        AdapterFileError: they were made on different bases, or one of them is not what its folder says.
    """
    if lora.prompt is not None or prompt.prompt is None:
        raise AdapterFileError(
            f"{folder}: {PARTS['lora']}/ must hold low-rank updates and {PARTS['prompt']}/ a soft prompt"
        )
    if lora.base != prompt.base:
        raise AdapterFileError(
            f"{folder}: its two parts were made on different bases ({lora.base and lora.base.name}, "
            f"{prompt.base and prompt.base.name})"
        )
    return replace(lora, prompt=prompt.prompt)
