"""Parts that most models of transformers copy from one another word for word, computed by the core's fast kernels.

While `fused(model)` is entered, each RMSNorm, SwiGLU block and rotary embedding of the model whose code *is* Llama's
(its compiled form is compared, so a model that differs in one operation is left alone) runs as one autograd node: fewer
passes over memory and fewer tensors kept for the backward pass. Knows no adapters and no losses.
"""

from __future__ import annotations

import contextlib
import functools
import sys
import types
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn
from transformers.activations import SiLUActivation
from transformers.models.llama import modeling_llama as llama

from lorakit.core import kernels

_ROTARY = "apply_rotary_pos_emb"


@contextlib.contextmanager
def fused(model: nn.Module) -> Iterator[int]:
    """Let the parts of `model` that are known run fast; its own code is back afterwards, whatever is raised.

    Yields:
        How many modules run fast.
    """
    changed: list[nn.Module] = []
    try:
        for module in model.modules():
            forward = None if "forward" in vars(module) else _fast_forward(module)
            if forward is not None:
                vars(module)["forward"] = forward
                changed.append(module)
        yield len(changed)
    finally:
        for module in changed:
            del vars(module)["forward"]


def _fast_forward(module: nn.Module) -> Callable[..., Any] | None:
    """A forward for this module that computes the same faster, or None."""
    own = type(module).forward
    if _same_code(own, llama.LlamaRMSNorm.forward):
        return functools.partial(_rms_norm, module) if not _trains(module) else None
    if _same_code(own, llama.LlamaMLP.forward):
        return functools.partial(_mlp, module) if type(module.act_fn) in (nn.SiLU, SiLUActivation) else None
    code = getattr(own, "__code__", None)
    if code is not None and _ROTARY in code.co_names and isinstance(own, types.FunctionType):
        rotate = own.__globals__.get(_ROTARY)
        if _same_code(rotate, llama.apply_rotary_pos_emb) and _same_code(
            sys.modules[own.__module__].__dict__.get("rotate_half"), llama.rotate_half
        ):
            # the module's own forward, with another function under that one name
            names = {**own.__globals__, _ROTARY: _apply_rotary}
            return types.MethodType(
                types.FunctionType(own.__code__, names, own.__name__, own.__defaults__, own.__closure__), module
            )
    return None


def _same_code(function: Any, known: Any) -> bool:
    """Whether two functions are compiled from the same statements (names of variables and comments aside)."""
    one, other = getattr(function, "__code__", None), known.__code__
    return (
        one is not None
        and all(
            getattr(one, part) == getattr(other, part) for part in ("co_code", "co_names", "co_freevars", "co_argcount")
        )
        and _numbers(one) == _numbers(other)
    )


def _numbers(code: types.CodeType) -> list[Any]:
    return [constant for constant in code.co_consts if not isinstance(constant, str | types.CodeType)]


def _trains(module: nn.Module) -> bool:
    return any(parameter.requires_grad for parameter in module.parameters(recurse=False))


def _rms_norm(module: Any, hidden_states: torch.Tensor) -> torch.Tensor:
    if module.weight.dtype != hidden_states.dtype:  # the product would be wider than its input
        return kernels.rms_norm_reference(hidden_states, module.weight, module.variance_epsilon)
    return kernels.rms_norm(hidden_states, module.weight, module.variance_epsilon)


def _mlp(module: Any, x: torch.Tensor) -> torch.Tensor:
    output: torch.Tensor = module.down_proj(kernels.swiglu(module.gate_proj(x), module.up_proj(x)))
    return output


def _apply_rotary(
    q: torch.Tensor, k: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, unsqueeze_dim: int = 1
) -> tuple[torch.Tensor, torch.Tensor]:
    cos, sin = cos.unsqueeze(unsqueeze_dim), sin.unsqueeze(unsqueeze_dim)
    return kernels.rotary(q, cos, sin), kernels.rotary(k, cos, sin)
