"""The adapter that a config would make in a model, without values: what is to be known of it before it is trained."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from lorakit.adapter import fingerprint
from lorakit.adapter.began import at_twice_the_rank
from lorakit.adapter.config import LoRAConfig
from lorakit.adapter.targets import find_targets
from lorakit.adapter.value import Adapter, Factors
from lorakit.core.layer import base_modules, base_parameters, bias_name


def blank_adapter(model: nn.Module, config: LoRAConfig) -> Adapter:
    """What `attach(model, config)` would give to save, its tensors on the meta device. The model may be there too.

    Raises:
        TargetError: the config names what is not in the model or cannot be adapted.
    """
    config = at_twice_the_rank(config) if config.from_start else config
    targets = find_targets(model, config)
    modules = dict(base_modules(model))
    factors = {}
    for target in targets.layers:
        A, B = (torch.empty(shape, device="meta") for shape in target.site.shapes(target.module, target.r, target.path))
        bias = B.new_empty(len(B)) if config.lora_bias else None
        magnitude = B.new_empty(len(B)) if config.delta == "dora" else None
        kind: Any = target.site.kind
        factors[target.path] = Factors(A=A, B=B, alpha=target.alpha, kind=kind, bias=bias, magnitude=magnitude)
    return Adapter(
        config=targets.config,
        base=fingerprint.of(model, list(base_parameters(model).items())),
        factors=factors,
        biases={path: _blank(modules[path].get_parameter(bias_name(modules[path]))) for path in targets.biases},
        tokens={
            path: _blank(modules[path].get_parameter("weight"))[: len(config.trainable_tokens)]
            for path in targets.tokens[:1]
        },
        replaced={
            f"{path}.{name}": _blank(tensor)
            for path in targets.replaced
            for name, tensor in modules[path].state_dict().items()
            if "lorakit_updates." not in name
        },
    )


def _blank(tensor: torch.Tensor) -> torch.Tensor:
    dtype = torch.float32 if tensor.is_floating_point() else tensor.dtype
    return torch.empty(tensor.shape, dtype=dtype, device="meta")
