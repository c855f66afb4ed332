"""The names that an adapter's tensors have in PEFT's models and in its files."""

from __future__ import annotations

from collections.abc import Mapping

from torch import nn

from lorakit.compat.peft.lora_layers import LoraAttention, LoraLayer, ModulesToSaveWrapper
from lorakit.compat.peft.parameters import LoraExperts
from lorakit.compat.peft.tokens import TrainableTokensWrapper
from lorakit.core.layer import base_modules


def key_map(model: nn.Module, adapter: str) -> Mapping[str, str]:
    """Every tensor of an adapter: name in the model (PEFT's) -> name in files (without the adapter's)."""
    found: dict[str, str] = {}
    inside: dict[str, str] = {}  # of an attention -> where PEFT has what is in it
    for own_path, module in base_modules(model):
        parent, _, last = own_path.rpartition(".")
        path = f"{inside[parent]}.{last}" if parent in inside else own_path
        if isinstance(module, LoraAttention):
            inside[own_path] = f"{path}.base_layer"
        if isinstance(module, LoraExperts):
            for depth, wrapper in enumerate(module.wrappers()):
                if adapter in wrapper.loras():
                    found |= _factors(wrapper, path + ".base_layer" * depth, adapter)
        elif isinstance(module, LoraLayer) and adapter in module.here():
            if adapter in module.loras():
                found |= _factors(module, path, adapter)
            trained = module._trained_bias()
            if trained is not None and module.lorakit_state.names[trained[0]] == adapter:
                name = module.bias_key()
                found[f"{path}.{name}"] = f"{path}.{name}"
        elif isinstance(module, ModulesToSaveWrapper) and adapter in module.copies():
            for name in module.copies()[adapter].state_dict():
                found[f"{path}.modules_to_save.{adapter}.{name}"] = f"{path}.{name}"
        elif isinstance(module, TrainableTokensWrapper) and adapter in module.rows() and not module.lorakit_tied:
            name = f"{path}.token_adapter.trainable_tokens_delta"
            found[f"{name}.{adapter}"] = name
    return found


def _factors(layer: LoraLayer, path: str, adapter: str) -> dict[str, str]:
    keys = [key for key, _ in layer._factor_keys(layer.loras()[adapter], adapter)]
    return {f"{path}.{key}": f"{path}.{key.replace(f'.{adapter}', '', 1)}" for key in keys}
