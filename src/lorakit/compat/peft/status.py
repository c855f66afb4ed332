"""What PEFT tells of a model: `get_layer_status`, `get_model_status`.

"irregular" is what layers do not agree on. They cannot disagree on what is merged: a model is merged as a whole.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from torch import nn

from lorakit.compat.peft.errors import PeftValueError
from lorakit.compat.peft.layers import BaseTunerLayer
from lorakit.compat.peft.lora_layers import LoraLayer
from lorakit.compat.peft.model import PeftModel
from lorakit.compat.peft.parameters import ParamWrapper
from lorakit.compat.peft.tokens import TrainableTokensWrapper
from lorakit.core.deltas import trainable
from lorakit.core.layer import base_modules


@dataclass
class TunerLayerStatus:
    """One adapted layer."""

    name: str
    module_type: str
    enabled: bool
    active_adapters: list[str]
    merged_adapters: list[str]
    requires_grad: dict[str, bool | str]
    available_adapters: list[str]
    devices: dict[str, list[str]]
    quantization_backend: str | None


@dataclass
class TunerModelStatus:
    """All adapted layers of a model."""

    base_model_type: str
    adapter_model_type: str
    peft_types: dict[str, str]
    trainable_params: int
    total_params: int
    num_adapter_layers: int
    enabled: bool | str
    active_adapters: list[str] | str
    merged_adapters: list[str]
    requires_grad: dict[str, bool | str]
    available_adapters: list[str]
    devices: dict[str, list[str]]
    quantization_backend: str | None


def _agreed(values: Iterable[bool | str]) -> bool | str:
    found = set(values)
    return found.pop() if len(found) == 1 else "irregular"


def _active(layers: Sequence[TunerLayerStatus]) -> list[str] | str:
    """The active adapters, where each layer has all of them, or all of those that are in it."""
    most = max((layer.active_adapters for layer in layers), key=len)
    in_it = ([name for name in most if name in layer.available_adapters] for layer in layers)
    agree = all(layer.active_adapters in (most, here) for layer, here in zip(layers, in_it, strict=True))
    return most if agree else "irregular"


def _type_name(module: BaseTunerLayer) -> str:
    if isinstance(module, LoraLayer):
        return repr(module).partition("(")[0]
    return "TrainableTokensLayer" if isinstance(module, TrainableTokensWrapper) else "ModulesToSaveWrapper"


def get_layer_status(model: nn.Module) -> list[TunerLayerStatus]:
    """The status of each adapted layer.

    Raises:
        PeftValueError: there is none.
    """
    inner, prefix = (model.get_base_model(), "model.") if isinstance(model, PeftModel) else (model, "")
    found = []
    for path, layer in base_modules(inner):
        if not isinstance(layer, BaseTunerLayer):
            continue
        for depth, module in enumerate(layer.wrappers() if isinstance(layer, ParamWrapper) else [layer]):
            tensors = {name: [p for _, p in trainable(update)] for name, update in module.updates().items()}
            within = ".token_adapter" if isinstance(layer, TrainableTokensWrapper) else ".base_layer" * depth
            found.append(
                TunerLayerStatus(
                    name=prefix + path + within,
                    module_type=_type_name(module),
                    enabled=not module.disable_adapters,
                    active_adapters=module.active_adapters,
                    merged_adapters=module.merged_adapters,
                    requires_grad={name: _agreed(p.requires_grad for p in own) for name, own in tensors.items()},
                    available_adapters=sorted(tensors),
                    devices={name: sorted({p.device.type for p in own}) for name, own in tensors.items()},
                    quantization_backend=None,
                )
            )
    if not found:
        raise PeftValueError("No adapter layers found in the model: give it adapters first (get_peft_model)")
    return found


def get_model_status(model: nn.Module) -> TunerModelStatus:
    """The status of all adapted layers together.

    Raises:
        PeftValueError: there is none.
    """
    layers = get_layer_status(model)
    names = sorted({name for layer in layers for name in layer.available_adapters})
    parameters = list(model.parameters())
    wrapped = isinstance(model, PeftModel)
    kind = type(model.get_base_model() if isinstance(model, PeftModel) else model)
    return TunerModelStatus(
        base_model_type=kind.__name__ if wrapped or hasattr(model, "config") else "other",
        adapter_model_type=type(model.base_model).__name__ if isinstance(model, PeftModel) else "None",
        peft_types=dict.fromkeys(model.peft_config, "LORA") if isinstance(model, PeftModel) else {},
        trainable_params=sum(p.numel() for p in parameters if p.requires_grad),
        total_params=sum(p.numel() for p in parameters),
        num_adapter_layers=len(layers),
        enabled=_agreed(layer.enabled for layer in layers),
        active_adapters=_active(layers),
        merged_adapters=sorted({name for layer in layers for name in layer.merged_adapters}),
        requires_grad={
            n: _agreed(layer.requires_grad[n] for layer in layers if n in layer.requires_grad) for n in names
        },
        available_adapters=names,
        devices={n: sorted({d for layer in layers for d in layer.devices.get(n, [])}) for n in names},
        quantization_backend=None,
    )
