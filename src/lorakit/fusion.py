"""Parts that most models of transformers copy from one another word for word, computed by the core's fast kernels.

While `fused(model)` is entered, each RMSNorm, SwiGLU block and rotary embedding of the model whose code *is* Llama's
(its compiled form is compared, so a model that differs in one operation is left alone) runs as one autograd node: fewer
passes over memory and fewer tensors kept for the backward pass. Adapted layers whose names say that they are given the
same tensor compute together (`core.shared`), and the last decoder layer's MLP runs only for tokens whose result is read
(`KEEP`). Knows no losses.
"""

from __future__ import annotations

import contextlib
import functools
import types
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn
from transformers.activations import SiLUActivation
from transformers.models.llama import modeling_llama as llama

from lorakit.core import activated, kernels
from lorakit.core.layer import AdaptedLayer
from lorakit.core.shared import share

KEEP = "lorakit_keep"  # keyword under which the places to keep, (P,), travel through forward() to `_last_layer`
_ROTARY = "apply_rotary_pos_emb"
_SAME_INPUT = (  # names of layers in the order in which models call them
    ("q_proj", "k_proj", "v_proj"),
    ("query", "key", "value"),
    ("gate_proj", "up_proj"),
)


@contextlib.contextmanager
def fused(model: nn.Module) -> Iterator[int]:
    """Let the parts of `model` that are known run fast; its own code is back afterwards, whatever is raised.

    Yields:
        How many modules run fast.
    """
    changed: list[nn.Module] = []
    shared = share(_siblings(model))
    try:
        last = _last_of(model)
        for module in model.modules():
            forward = None if "forward" in vars(module) else _fast_forward(module, module is last)
            if forward is not None:
                vars(module)["forward"] = forward
                changed.append(module)
        yield len(changed)
    finally:
        for module in changed:
            vars(module).pop("forward", None)
        for group in shared:
            group.leave()


def keeps(model: nn.Module) -> bool:
    """Whether the running `fused(model)` heeds `KEEP`: the model then gives logits for those places only."""
    last = _last_of(model)
    forward = None if last is None else vars(last).get("forward")
    return isinstance(forward, functools.partial) and forward.func is _last_layer


def decoder_layers(model: nn.Module) -> nn.ModuleList | None:
    """The layers of a language model as transformers lays them out, `<prefix>.layers`; None where there are none."""
    layers = getattr(getattr(model, str(getattr(model, "base_model_prefix", "")), None), "layers", None)
    return layers if isinstance(layers, nn.ModuleList) and len(layers) else None


def _last_of(model: nn.Module) -> nn.Module | None:
    layers = decoder_layers(model)
    return None if layers is None else layers[-1]


def _siblings(model: nn.Module) -> Iterator[list[AdaptedLayer]]:
    """Adapted layers of one module that are probably given the same tensor."""
    for module in model.modules():
        for names in _SAME_INPUT:
            layers = [getattr(module, name, None) for name in names]
            found = [layer for layer in layers if isinstance(layer, AdaptedLayer) and layer.lorakit_shared is None]
            if len(found) > 1:
                yield found


def _fast_forward(module: nn.Module, is_last: bool) -> Callable[..., Any] | None:
    """A forward for this module that computes the same faster, or None."""
    own = type(module).forward
    if is_last:
        checkpointed = getattr(module, "gradient_checkpointing", False)  # by its own forward, which is to be replaced
        same = _same_code(own, llama.LlamaDecoderLayer.forward) and not checkpointed
        return functools.partial(_last_layer, module) if same else None
    if _same_code(own, llama.LlamaRMSNorm.forward):
        return functools.partial(_rms_norm, module)
    if _same_code(own, llama.LlamaMLP.forward):
        return functools.partial(_mlp, module) if type(module.act_fn) in (nn.SiLU, SiLUActivation) else None
    if isinstance(own, types.FunctionType) and _ROTARY in own.__code__.co_names:
        rotate: Any = own.__globals__.get(_ROTARY)
        if _same_code(rotate, llama.apply_rotary_pos_emb) and _same_code(
            rotate.__globals__.get("rotate_half"), llama.rotate_half
        ):
            # the module's own forward, with another function under that one name
            names = {**own.__globals__, _ROTARY: _apply_rotary}
            forward = types.FunctionType(own.__code__, names, own.__name__, own.__defaults__, own.__closure__)
            forward.__kwdefaults__ = own.__kwdefaults__
            return types.MethodType(forward, module)
    return None


def _same_code(function: Any, known: Any) -> bool:
    """Whether two functions take the same arguments and are compiled from the same statements.

    Names of local variables, comments, docstrings and annotations may differ. What a decorator has wrapped is compared
    too: transformers wraps the forward of every decoder layer alike. (With the package `kernels` installed,
    `known` may be no function but a module; then nothing equals it.)
    """
    return (
        isinstance(function, types.FunctionType)
        and isinstance(known, types.FunctionType)
        and _essence(function) == _essence(known)
        and hasattr(function, "__wrapped__") == hasattr(known, "__wrapped__")
        and (not hasattr(function, "__wrapped__") or _same_code(function.__wrapped__, known.__wrapped__))  # type: ignore[attr-defined]
    )


def _essence(function: types.FunctionType) -> tuple[Any, ...]:
    code = function.__code__
    arguments = code.co_varnames[: code.co_argcount + code.co_kwonlyargcount]
    # places count, since the statements name constants by place; what a docstring says does not
    constants = [None if isinstance(constant, str) else constant for constant in code.co_consts]
    flags = code.co_flags
    return code.co_code, code.co_names, code.co_freevars, arguments, constants, flags, function.__defaults__


def _rms_norm(module: Any, hidden_states: torch.Tensor) -> torch.Tensor:
    weight = module.weight
    # the fast form has no gradient for the weight, and a product with another dtype would be wider than its input
    plain = weight.requires_grad or weight.dtype != hidden_states.dtype
    norm = kernels.rms_norm_reference if plain else kernels.rms_norm
    return norm(hidden_states, weight, module.variance_epsilon)


def _mlp(module: Any, x: torch.Tensor) -> torch.Tensor:
    output: torch.Tensor = module.down_proj(kernels.swiglu(module.gate_proj(x), module.up_proj(x)))
    return output


def _last_layer(module: Any, hidden_states: torch.Tensor, **kwargs: Any) -> torch.Tensor:
    """Llama's decoder layer; after its attention, only the places to keep go on."""
    keep = kwargs.pop(KEEP, None)
    attended, _ = module.self_attn(hidden_states=module.input_layernorm(hidden_states), **kwargs)
    hidden_states = hidden_states + attended
    if keep is not None:
        hidden_states = hidden_states[:, keep]
    with contextlib.nullcontext() if keep is None else activated.kept(keep):
        output: torch.Tensor = hidden_states + module.mlp(module.post_attention_layernorm(hidden_states))
    return output


def _apply_rotary(
    q: torch.Tensor, k: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, unsqueeze_dim: int = 1
) -> tuple[torch.Tensor, torch.Tensor]:
    cos, sin = cos.unsqueeze(unsqueeze_dim), sin.unsqueeze(unsqueeze_dim)
    return kernels.rotary(q, cos, sin), kernels.rotary(k, cos, sin)
