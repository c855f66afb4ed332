"""From gradients to a step: learning-rate schedules, AdamW, clipping, fp16 scaling. Knows named tensors, no layers."""

from __future__ import annotations

import math
from collections.abc import Mapping
from collections.abc import Set as AbstractSet
from typing import Any

import torch

from lorakit.errors import RunError
from lorakit.training.config import TrainConfig

_MOMENTS = ("exp_avg", "exp_avg_sq", "step")  # AdamW's state of one parameter: m, v and the number of its steps


def warmup_steps(config: TrainConfig, total_steps: int) -> int:
    """Steps of warm-up: the configured share, rounded up as in transformers, always leaving a step at the full rate."""
    return min(math.ceil(config.warmup * total_steps), total_steps - 1)


def default_learning_rate(width: int, *, full: bool = False) -> float:
    """The peak rate where none is given: 1.2 / width, at most 3e-3, to two digits; a tenth of it where all weights are
    trained (`full`), as is the rule of thumb.

    The constant is measured at width 576, where 2e-3 and 3e-3 do equally well (docs/log.md: E2E, learning rate and
    rank); that the best rate falls as 1 / width is the rule of maximal update parametrisation (arXiv 2203.03466), not
    measured here.
    """
    return float(f"{min(3e-3, 1.2 / width) / (10 if full else 1):.2g}")


def learning_rate(config: TrainConfig, step: int, total_steps: int) -> float:
    """The learning rate of a step, a pure function of its number.

    The curves are those of transformers' ``get_{cosine,linear,constant}_schedule_with_warmup``, so settings carry over.

    Args:
        config: `learning_rate` (the peak), `schedule` and `warmup`.
        step: 0 for the first optimiser step.
        total_steps: optimiser steps of the whole run.
    """
    peak = config.learning_rate
    assert peak is not None, "train resolves it before the first step"
    warmup = warmup_steps(config, total_steps)
    if step < warmup:
        return peak * step / warmup
    progress = (step - warmup) / (total_steps - warmup)  # in [0, 1)
    factor = {"cosine": 0.5 * (1 + math.cos(math.pi * progress)), "linear": 1 - progress, "constant": 1.0}
    return peak * factor[config.schedule]


def make_optimizer(
    config: TrainConfig,
    tensors: Mapping[str, torch.nn.Parameter],
    output_side: AbstractSet[str] = frozenset(),
    prompt_side: AbstractSet[str] = frozenset(),
) -> torch.optim.AdamW:
    """AdamW over named tensors, in their order; fused (one pass over memory) on every device that can.

    Its state is there from the start, where torch would allocate it in the first step, scattered among what the step
    has left (see `training.gradients`).

    Args:
        config: rates and decay.
        tensors: what is trained.
        output_side: names of those that take `loraplus_lr_ratio` times the rate, where it is set (LoRA+, arXiv
        2402.12354).
        prompt_side: names of those that take `prompt_ratio` times the rate.
    """
    device = next(iter(tensors.values())).device.type
    ratios = dict.fromkeys(tensors, 1.0)
    if config.loraplus_lr_ratio is not None:
        ratios |= dict.fromkeys(output_side, config.loraplus_lr_ratio)
    ratios |= dict.fromkeys(prompt_side, config.prompt_ratio)
    groups: list[dict[str, Any]] = [
        {"params": [tensors[name] for name, own in ratios.items() if own == ratio], "ratio": ratio}
        for ratio in sorted(set(ratios.values()))
    ]
    optimizer = torch.optim.AdamW(
        groups,
        lr=learning_rate(config, 0, 1),  # set anew before each step
        betas=(config.adam_beta1, config.adam_beta2),
        eps=config.adam_epsilon,
        weight_decay=config.weight_decay,
        fused=device in ("cpu", "cuda", "mps", "xpu"),
    )
    for tensor in tensors.values():
        moments = {name: torch.zeros_like(tensor) for name in _MOMENTS[:2]}
        optimizer.state[tensor] = {**moments, "step": torch.zeros((), device=tensor.device)}
    return optimizer


def set_learning_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    """Give every parameter group the rate of the coming step, times the group's ratio."""
    for group in optimizer.param_groups:
        group["lr"] = rate * group["ratio"]


def make_scaler(dtype: torch.dtype, device: torch.device) -> torch.amp.GradScaler:
    """Loss scaling for an fp16 base, whose gradients underflow without; for other dtypes one that does nothing."""
    return torch.amp.GradScaler(device.type, enabled=dtype == torch.float16)


def clip_gradients(tensors: Mapping[str, torch.nn.Parameter], largest_norm: float) -> float:
    """Scale all gradients down to a global L2 norm of at most `largest_norm` (0: leave them).

    Returns:
        The norm before clipping; not finite when any gradient is not.
    """
    gradients = [tensor.grad for tensor in tensors.values() if tensor.grad is not None]
    norm = torch.nn.utils.get_total_norm(gradients)
    if largest_norm > 0 and torch.isfinite(norm):
        torch.nn.utils.clip_grads_with_norm_(tensors.values(), largest_norm, norm)
    return float(norm)


def optimizer_tensors(
    optimizer: torch.optim.Optimizer, tensors: Mapping[str, torch.nn.Parameter]
) -> dict[str, torch.Tensor]:
    """AdamW's state under names: ``exp_avg.<tensor>``, ``exp_avg_sq.<tensor>``, ``step.<tensor>``.

    A tensor that never got a gradient (an expert no token was sent to) has taken no step and is left out.
    """
    return {
        f"{moment}.{name}": optimizer.state[parameter][moment]
        for name, parameter in tensors.items()
        if optimizer.state[parameter]["step"] > 0
        for moment in _MOMENTS
    }


@torch.no_grad()
def restore_optimizer(
    optimizer: torch.optim.Optimizer, tensors: Mapping[str, torch.nn.Parameter], saved: Mapping[str, torch.Tensor]
) -> None:
    """Put back what `optimizer_tensors` gave, bit for bit.

    Raises:
        RunError: the saved state is of other tensors.
    """
    known = {f"{moment}.{name}" for name in tensors for moment in _MOMENTS}
    if unknown := sorted(set(saved) - known):
        raise RunError(f"the checkpoint's optimiser state is of another adapter: it has {', '.join(unknown[:5])}")
    for name, parameter in tensors.items():
        if f"step.{name}" not in saved:
            continue
        state = optimizer.state[parameter]
        for moment in _MOMENTS:
            value = saved[f"{moment}.{name}"]
            if value.shape != state[moment].shape:
                raise RunError(
                    f"the checkpoint's {moment} of {name} has shape {tuple(value.shape)}, the adapter "
                    f"{tuple(state[moment].shape)}"
                )
            state[moment].copy_(value)
