"""Adapters whose A and B began as a part of the base's weight (PiSSA, OLoRA, LoRA-GA), as values.

In a model such an adapter is s (B A - B0 A0) on the base as it is. As a value it is a plain adapter of twice the rank,
[B - B0, B0] [A; A - A0], that every format carries and every tool adds to the same base. From those halves its other
form can be had, in which PEFT saves it: A and B of rank r, for a residual base W - s B0 A0. The split is exact for any
adapter of even rank, whatever made it.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace

from lorakit.adapter.config import LoRAConfig
from lorakit.adapter.value import Adapter
from lorakit.core import lowrank
from lorakit.errors import AdapterError, bullet_list

BEGAN = "began"
"""Key of a value's metadata: how it began (init, r), as JSON; its halves are as they were then."""


def alpha_for_twice_the_rank(alpha: float, config: LoRAConfig) -> float:
    """The alpha that gives twice the rank the same scale."""
    return alpha * (math.sqrt(2) if config.scaling == "rslora" else 2)


def at_twice_the_rank(config: LoRAConfig) -> LoRAConfig:
    """The config of the plain adapter that one of this config is as a value."""
    return _scaled(config, lambda r: 2 * r, lambda alpha: alpha_for_twice_the_rank(alpha, config), init="default")


def residual_form(adapter: Adapter) -> tuple[Adapter, Adapter]:
    """An adapter of half the rank for another base, and the update that makes that base of the adapter's own.

    Args:
        adapter: of even rank everywhere.

    Returns:
        (A and B of rank r, the update -s B0 A0): base + second + first is base + adapter.

    Raises:
        AdapterError: a layer of odd rank, whole tensors, that stand for the adapter's own base, or a soft prompt.
    """
    adapter.require_no_prompt("the residual form")
    odd = [f"{path}: rank {f.r // f.rank_shares}" for path, f in adapter.factors.items() if f.r // f.rank_shares % 2]
    if odd or not adapter.factors:
        raise AdapterError(
            "the residual form halves the rank; these ranks are odd, so this adapter did not begin as a part of its "
            f"base's weight:\n{bullet_list(odd)}"
        )
    if adapter.config.alora_invocation_tokens:
        raise AdapterError(
            "the residual form is on another base, which this activated adapter (aLoRA) would leave as it is for the "
            "tokens before its invocation"
        )
    if adapter.config.delta != "lora":
        raise AdapterError(
            f"the residual form is of updates s B A; this adapter's are {adapter.config.delta!r}, which depend on the "
            "base besides"
        )
    live, moved = {}, {}
    for path, f in adapter.factors.items():
        stacked = f.kind == "experts"
        (A, change_B), (change_A, B0) = lowrank.halves(f.A, f.B, stacked=stacked)
        A0, half = A - change_A, _half(f.alpha, adapter.config)
        live[path] = replace(f, A=A.contiguous(), B=(change_B + B0).contiguous(), alpha=half)
        moved[path] = replace(f, A=A0.contiguous(), B=-B0, alpha=half, bias=None)
    config = _scaled(adapter.config, lambda r: r // 2, lambda alpha: _half(alpha, adapter.config))
    base_alone = replace(config, bias="none", lora_bias=False, modules_to_save=(), trainable_tokens=())
    return (
        replace(adapter, config=config, factors=live, base=None),
        Adapter(config=base_alone, factors=moved, base=adapter.base),
    )


def _half(alpha: float, config: LoRAConfig) -> float:
    return alpha / alpha_for_twice_the_rank(1.0, config)


def _scaled(
    config: LoRAConfig, rank: Callable[[int], int], alpha: Callable[[float], float], **changes: str
) -> LoRAConfig:
    return config.replace(
        r=rank(config.r),
        alpha=alpha(config.alpha),
        rank_pattern={key: rank(value) for key, value in config.rank_pattern.items()},
        alpha_pattern={key: alpha(value) for key, value in config.alpha_pattern.items()},
        **changes,
    )
