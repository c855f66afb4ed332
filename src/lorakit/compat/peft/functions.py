"""PEFT's functions: make a model, take state dicts out and put them in."""

from __future__ import annotations

import dataclasses
import re
import warnings
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from lorakit.adapter.attach import adapters
from lorakit.compat.peft.config import LoraConfig, PeftConfig
from lorakit.compat.peft.errors import MismatchError, UnsupportedError
from lorakit.compat.peft.handle import PeftAdapters
from lorakit.compat.peft.keys import key_map
from lorakit.compat.peft.layers import BaseTunerLayer
from lorakit.compat.peft.model import TASK_CLASSES, PeftModel
from lorakit.compat.peft.tuner import LoraModel
from lorakit.core.layer import base_modules, base_parameters
from lorakit.errors import AdapterError, bullet_list, nearest

PREFIX = "base_model.model."


def get_peft_model(
    model: nn.Module,
    peft_config: PeftConfig,
    adapter_name: str = "default",
    mixed: bool = False,
    autocast_adapter_dtype: bool = True,
    revision: str | None = None,
    low_cpu_mem_usage: bool = False,
) -> PeftModel:
    """Give `model` a fresh adapter, in place, and wrap it in the class of the config's task.

    Args:
        model: any module with layers that multiply.
        peft_config: a LoraConfig.
        adapter_name: any non-empty string.
        mixed: False; this version has one method to mix.
        autocast_adapter_dtype: hold the adapter in fp32 whatever the model's dtype; else in the layers' own.
        revision: of the base, noted in the config.
        low_cpu_mem_usage: leave the adapter on the meta device, for `set_peft_model_state_dict` to fill.

    Raises:
        UnsupportedError: another method than LoRA, or a feature of it that this version has not.
        TargetError: a target, pattern or module to save that matches nothing; the model is untouched.
    """
    if mixed:
        raise UnsupportedError("mixed=True: this version has one method, LoRA")
    if not isinstance(peft_config, LoraConfig):
        raise UnsupportedError(f"{type(peft_config).__name__}: this version has LoRA")
    inner = model.get_base_model() if isinstance(model, PeftModel) else model
    if isinstance(inner.__dict__.get("_lorakit"), PeftAdapters):
        warnings.warn(
            "You are trying to modify a model with PEFT for a second time. If you want to reload the model with a "
            "different config, make sure to call `.unload()` before.",
            stacklevel=2,
        )
        if adapter_name in inner.peft_config:  # type: ignore[operator]
            LoraModel.around(inner).delete_adapter(adapter_name)
    model, named = inner, peft_config.base_model_name_or_path
    name = model.__dict__.get("name_or_path") or None
    if named is not None and named != name:
        warnings.warn(
            f"The PEFT config's `base_model_name_or_path` was renamed from '{named}' to '{name}'. Please ensure that "
            "the correct base model is loaded when loading this checkpoint.",
            stacklevel=2,
        )
    peft_config.base_model_name_or_path = name
    if revision is not None:
        if peft_config.revision not in (None, revision):
            warnings.warn(
                f"peft config has already set base model revision to {peft_config.revision}, overwriting with "
                f"revision {revision}",
                stacklevel=2,
            )
        peft_config.revision = revision
    made = TASK_CLASSES.get(peft_config.task_type or "", PeftModel)
    return made(model, peft_config, adapter_name, autocast_adapter_dtype, low_cpu_mem_usage)


def inject_adapter_in_model(
    peft_config: PeftConfig,
    model: nn.Module,
    adapter_name: str = "default",
    low_cpu_mem_usage: bool = False,
    state_dict: Mapping[str, torch.Tensor] | None = None,
) -> nn.Module:
    """Give `model` a fresh adapter, in place, without a wrapper around it, and return it.

    Args:
        peft_config: a LoraConfig.
        model: any module with layers that multiply.
        adapter_name: any non-empty string.
        low_cpu_mem_usage: leave it on the meta device, for `set_peft_model_state_dict` to fill.
        state_dict: adapt the layers that have tensors in it, whatever the config targets; its tensors are not loaded.
    """
    if not isinstance(peft_config, LoraConfig):
        raise UnsupportedError(f"{type(peft_config).__name__}: this version has LoRA")
    if state_dict is not None:
        found = (
            re.fullmatch(r"(?:base_model\.model\.)?(.+)\.lora_(?:embedding_)?[AB](?:\..+)?", k) for k in state_dict
        )
        targets = {match[1].replace(".base_layer.", ".") for match in found if match}  # what an attention holds
        peft_config = dataclasses.replace(peft_config, target_modules=targets, layers_to_transform=None)
    LoraModel(model, peft_config, adapter_name, low_cpu_mem_usage)
    return model


def _inner(model: nn.Module) -> tuple[nn.Module, PeftAdapters, str]:
    """(model with adapters in it, its handle, prefix of its names)."""
    inner = getattr(model, "_orig_mod", model)
    inner = inner._modules.get("_fsdp_wrapped_module") or inner
    prefix = ""
    if isinstance(inner, PeftModel):
        inner, prefix = inner.get_base_model(), PREFIX
    elif isinstance(inner, LoraModel):
        inner, prefix = inner.model, "model."
    handle = adapters(inner)
    if not isinstance(handle, PeftAdapters):
        raise AdapterError("this model's adapters are lorakit.attach's: use lorakit.adapters(model).extract(name)")
    return inner, handle, prefix


def get_peft_model_state_dict(
    model: nn.Module,
    state_dict: Mapping[str, torch.Tensor] | None = None,
    adapter_name: str = "default",
    unwrap_compiled: bool = False,
    save_embedding_layers: str | bool = "auto",
) -> dict[str, torch.Tensor]:
    """An adapter's tensors under the names they have in files: `base_model.model.<path>.lora_A.weight` ...

    Args:
        model: a PeftModel, or a model adapters were injected into (then without `base_model.model.`).
        state_dict: taken from this one; None: from the model.
        adapter_name: which.
        unwrap_compiled: without effect, a compiled model is always unwrapped.
        save_embedding_layers: not True; base weights do not belong to an adapter.
    """
    if save_embedding_layers is True:
        raise UnsupportedError("save_embedding_layers=True: name the embedding in modules_to_save")
    inner, handle, prefix = _inner(model)
    _refuse_from_start(handle, adapter_name)
    source = getattr(model, "_orig_mod", model).state_dict() if state_dict is None else state_dict
    return {prefix + name: source[prefix + key] for key, name in key_map(inner, adapter_name).items()}


def _refuse_from_start(handle: PeftAdapters, name: str) -> None:
    """A and B of PiSSA or OLoRA mean nothing without where they began, which their names in PEFT's files leave out."""
    config = handle._resident(name).config
    if config.from_start:
        raise UnsupportedError(
            f"adapter {name!r} began as a part of the base's weight (init_lora_weights={config.init!r}), and the base "
            "is left alone here: save_pretrained writes the adapter, as a plain one of twice the rank for that base"
        )


def set_peft_model_state_dict(
    model: nn.Module,
    peft_model_state_dict: Mapping[str, torch.Tensor],
    adapter_name: str = "default",
    ignore_mismatched_sizes: bool = False,
    low_cpu_mem_usage: bool = False,
) -> Any:
    """Put tensors under their names in files into an adapter of the model.

    Returns:
        `missing_keys` and `unexpected_keys`, both empty.

    Raises:
        MismatchError: a tensor is missing, unexpected or of another shape; nothing is changed.
    """
    if ignore_mismatched_sizes:
        raise UnsupportedError("ignore_mismatched_sizes is not in this version: what does not fit is not loaded")
    inner, handle, prefix = _inner(model)
    _refuse_from_start(handle, adapter_name)
    own = dict(inner.state_dict(keep_vars=True))
    places = {prefix + name: own[key] for key, name in key_map(inner, adapter_name).items()}
    given = dict(peft_model_state_dict)
    if prefix and given and not any(name.startswith(prefix) for name in given):
        given = {prefix + name: tensor for name, tensor in given.items()}
    problems = [f"missing: {name} {tuple(t.shape)}" for name, t in places.items() if name not in given]
    for name, tensor in given.items():
        if name not in places:
            guess = nearest(name, places, 1)
            problems.append(f"unexpected: {name}" + (f"; nearest is {guess[0]}" if guess else ""))
        elif tensor.shape != places[name].shape:
            problems.append(
                f"size mismatch for {name}: {tuple(tensor.shape)}, the model has {tuple(places[name].shape)}"
            )
    if problems:
        raise MismatchError(f"nothing was loaded into adapter {adapter_name!r}:\n{bullet_list(problems)}")
    if any(place.is_meta for place in places.values()):
        device = next((p.device for p in base_parameters(inner).values()), None)
        keys = {prefix + name: key for key, name in key_map(inner, adapter_name).items()}
        inner.load_state_dict({keys[n]: t.to(device, copy=True) for n, t in given.items()}, strict=False, assign=True)
        return torch.nn.modules.module._IncompatibleKeys([], [])
    with torch.no_grad():
        for name, tensor in given.items():
            places[name].copy_(tensor)
    return torch.nn.modules.module._IncompatibleKeys([], [])


def get_base_model_state_dict(model: nn.Module) -> dict[str, torch.Tensor]:
    """The base's tensors under the base's own names."""
    inner, handle, _ = _inner(model)
    found: dict[str, torch.Tensor] = {}
    with handle.unfolded():
        for path, module in base_modules(inner):
            plain = module.as_base() if isinstance(module, BaseTunerLayer) else module
            dot = f"{path}." if path else ""
            found |= {dot + name: p for name, p in plain._parameters.items() if p is not None}
            found |= {
                dot + name: b
                for name, b in plain._buffers.items()
                if b is not None and name not in plain._non_persistent_buffers_set
            }
    return found


def set_base_model_state_dict(model: nn.Module, state_dict: Mapping[str, torch.Tensor], strict: bool = True) -> Any:
    """Put tensors under the base's own names into the base.

    Raises:
        MismatchError: with `strict`, a tensor is missing or unexpected; a shape differs.
    """
    own = get_base_model_state_dict(model)
    missing, unexpected = [n for n in own if n not in state_dict], [n for n in state_dict if n not in own]
    problems = [f"Missing key: {n}" for n in missing] + [f"Unexpected key: {n}" for n in unexpected] if strict else []
    problems += [f"size mismatch for {n}" for n, t in state_dict.items() if n in own and own[n].shape != t.shape]
    if problems:
        raise MismatchError(f"nothing was loaded into the base:\n{bullet_list(problems)}")
    with torch.no_grad():
        for name, tensor in state_dict.items():
            if name in own:
                own[name].copy_(tensor)
    return torch.nn.modules.module._IncompatibleKeys(missing, unexpected)


def prepare_model_for_kbit_training(
    model: Any,
    use_gradient_checkpointing: bool = True,
    gradient_checkpointing_kwargs: dict[str, Any] | None = None,
    auto_clear_cache: bool = True,
) -> Any:
    """Freeze the model, hold what is left in half precision in fp32, and, if it is quantised, turn gradient
    checkpointing on.

    Args:
        model: a transformers model.
        use_gradient_checkpointing: whether to turn it on.
        gradient_checkpointing_kwargs: for `model.gradient_checkpointing_enable`.
        auto_clear_cache: give the memory of the copies in half precision back.
    """
    for parameter in model.parameters():
        parameter.requires_grad_(False)
        if parameter.dtype in (torch.float16, torch.bfloat16) and type(parameter).__name__ != "Params4bit":
            parameter.data = parameter.data.float()
    if auto_clear_cache and torch.cuda.is_available():
        torch.cuda.empty_cache()
    quantised = any(getattr(model, name, False) for name in ("is_loaded_in_8bit", "is_loaded_in_4bit", "is_quantized"))
    if quantised and use_gradient_checkpointing:
        if hasattr(model, "enable_input_require_grads"):
            model.enable_input_require_grads()
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=gradient_checkpointing_kwargs or {})
    return model
