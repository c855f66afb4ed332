"""Stacked experts with the updates of any number of adapters: only the tokens sent to an expert pay for its update.

transformers keeps the experts of a mixture (Mixtral, Qwen-MoE, OLMoE, DeepSeek, gpt-oss, ...) in one module, with one
3-D parameter for each of its two projections, and one contract for all of them, on which its own fast implementations
rely: `forward(hidden_states, top_k_index, top_k_weights)`, and attributes that say whether there is a gate, a bias, a
norm, and how the stacks lie. The forward here is written on that contract, so it knows which token each row is, as a
route must; it takes no part in the choice of experts. Where no adapter is active the module's own forward runs.

A module is taken for one of these if its forward is the contract's, and if what is computed here is what it computes.

Any other module's parameters, of two or three dimensions, can have updates too. What the module does with them is not
known, so the updates are folded into the parameters for the length of each pass: that costs a copy of them, an input
has no place where elements could be dropped, and all rows see the same weights.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import nn

from lorakit.core import kernels
from lorakit.core.active import Route, Rows, Selection
from lorakit.core.deltas import LayerUpdate, LoRA, StackedUpdate
from lorakit.core.layer import AdaptedModule
from lorakit.core.sites import ExpertsSite
from lorakit.errors import AdapterError

_CONTRACT = "transformers.integrations.moe"


class AdaptedExperts(AdaptedModule):
    """A module of stacked experts, or of other parameters, with the low-rank updates of any number of adapters
    (`StackedUpdate`).
    """

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Each token's weighted sum over its experts, of base and updates; or the module with updated parameters.

        Args:
            *args: the module's; of experts hidden_states (tokens, d), top_k_index (tokens, k), top_k_weights (tokens,
            k).
            **kwargs: the same by name.

        Raises:
            AdapterError: a route, where updates can only be folded in.
        """
        selection = self.lorakit_state.current()
        if not keeps_contract(self):
            return self._folded(selection, *args, **kwargs)
        if isinstance(selection, Route):
            x = args[0] if args else kwargs["hidden_states"]
            held = [_Held(cast("StackedUpdate", u), 1.0, rows) for u, rows in self.routed_updates(selection, x)]
        else:
            held = [_Held(cast("StackedUpdate", u), weight, None) for u, weight in self.active_updates(selection)]
        if not held:
            return super().forward(*args, **kwargs)
        return mixture(self, held, *args, **kwargs)

    def _folded(self, selection: Selection | Route, *args: Any, **kwargs: Any) -> Any:
        if isinstance(selection, Route):
            if any(slot in self.lorakit_updates for slot in selection.slots if slot is not None):
                raise AdapterError(
                    f"{type(self).__name__}: updates of its parameters are folded in, so rows cannot have their own"
                )
            return super().forward(*args, **kwargs)
        active = cast("list[tuple[StackedUpdate, float]]", self.active_updates(selection))
        if not active:
            return super().forward(*args, **kwargs)
        changed: dict[str, torch.Tensor] = {}
        for name in weight_names(self):
            loras = [(cast("LayerUpdate", u.updates[name]).lora, w) for u, w in active if name in u.updates]
            own, site = self.get_parameter(name), experts_site(self, name)
            with torch.autocast(own.device.type, enabled=False):
                for lora, weight in loras:
                    assert lora is not None, "what is updated by name is updated by low rank"
                    assert site is not None, "find_targets refuses parameters without one"
                    A, B = lora.factors()
                    change = site.dense(A.float(), B.float(), lora.s * weight)
                    changed[name] = changed.get(name, own.float()) + change
        return self.as_base(**{name: wide.to(self.get_parameter(name)) for name, wide in changed.items()}).forward(
            *args, **kwargs
        )


@dataclass(frozen=True)
class _Held:
    """An adapter here, its weight, and the tokens it is for (None: all)."""

    update: StackedUpdate
    weight: float
    tokens: Rows | None


@dataclass(frozen=True)
class _Group:
    """Neighbouring rows sent to one expert, and of them those of each adapter: (place in `held`, first, last + 1)."""

    expert: int
    start: int
    end: int
    parts: tuple[tuple[int, int, int], ...]


def mixture(
    module: nn.Module,
    held: Sequence[_Held],
    hidden_states: torch.Tensor,
    top_k_index: torch.Tensor,
    top_k_weights: torch.Tensor,
) -> torch.Tensor:
    """What the contract says such a module computes, plus the updates: sum_k w_k down_e(act(up_e(x))), e = index[k].

    Args:
        module: keeps to the contract.
        held: the adapters that are active here.
        hidden_states: (tokens, d).
        top_k_index: (tokens, k) experts; an index past the last expert is none.
        top_k_weights: (tokens, k).

    Returns:
        (tokens, d) in the dtype of `hidden_states`.
    """
    own = cast("Any", module)
    (tokens, d), k = hidden_states.shape, top_k_index.shape[-1]
    order, groups = _grouped(top_k_index, own.num_experts, held)
    x = hidden_states[order // k]  # (rows, d): by expert, then by adapter
    up, down = weight_names(module)
    h = _project(module, up, x, groups, held)
    h = own._apply_gate(h) if own.has_gate else own.act_fn(h)
    y = _project(module, down, h, groups, held)
    if own.has_post_expert_norm:
        y = own.post_expert_norm(y)
    y = y * top_k_weights.reshape(-1)[order].unsqueeze(-1)
    if own.config._experts_implementation == "eager":  # as it does: expert by expert, each sum rounded
        total, token = torch.zeros_like(hidden_states), order // k
        for group in groups:
            here = slice(group.start, group.end)
            total.index_add_(0, token[here], y[here].to(total.dtype))
        return total
    each = y.new_zeros(tokens * k, d).index_copy(0, order, y)
    return each.view(tokens, k, d).sum(1).to(hidden_states.dtype)


def _grouped(index: torch.Tensor, experts: int, held: Sequence[_Held]) -> tuple[torch.Tensor, list[_Group]]:
    """The order of (token, choice) pairs that makes the rows of an expert, and in them of an adapter, neighbours."""
    key, width = index.reshape(-1), 1
    routed = any(one.tokens is not None for one in held)
    if routed:
        width = len(held) + 1
        adapter = index.new_full((len(index),), len(held))  # of a token without one
        for i, one in enumerate(held):
            adapter[cast("Rows", one.tokens)] = i
        key = key * width + adapter.repeat_interleave(index.shape[-1])
    counts = torch.bincount(key, minlength=experts * width)[: experts * width].tolist()
    order = torch.argsort(key, stable=True)[: sum(counts)]
    bounds = list(pairwise([0, *accumulate(counts)]))
    groups = []
    for expert in range(experts):
        mine = bounds[expert * width : (expert + 1) * width]
        start, end = mine[0][0], mine[-1][1]
        if start == end:
            continue
        parts = [(i, *(mine[i] if routed else (start, end))) for i in range(len(held))]
        groups.append(_Group(expert, start, end, tuple(part for part in parts if part[1] < part[2])))
    return order, groups


def _project(
    module: nn.Module, name: str, x: torch.Tensor, groups: Sequence[_Group], held: Sequence[_Held]
) -> torch.Tensor:
    """Each group of rows of `x` through its expert's weight, bias and updates: (rows, in) -> (rows, out)."""
    own = cast("Any", module)
    stack: torch.Tensor = module.get_parameter(name)
    weights = (stack.mT if own.is_transposed else stack).unbind(0)  # (out, in) each
    biases = module.get_parameter(f"{name}_bias").unbind(0) if own.has_bias else [None] * len(weights)
    loras: list[tuple[LoRA, tuple[torch.Tensor, ...], tuple[torch.Tensor, ...]] | None] = []
    for one in held:
        lora = cast("LayerUpdate", one.update.updates[name]).lora if name in one.update.updates else None
        # unbound once: the gradient of each slice on its own would be a tensor as large as the stack
        factors = None if lora is None else lora.factors()
        loras.append(None if lora is None or factors is None else (lora, factors[0].unbind(0), factors[1].unbind(0)))
    done = []
    for group in groups:
        e, mine = group.expert, x[group.start : group.end]
        parts = [(held[i].weight, found, a, b) for i, a, b in group.parts if (found := loras[i]) is not None]
        if len(parts) == 1 and parts[0][2:] == (group.start, group.end) and parts[0][1][0].can_fuse(x, stack):
            weight, (lora, A, B), _, _ = parts[0]
            y = kernels.lora_linear(mine, kernels.LoRAOperands(weights[e], None, A[e], B[e], lora.s * weight))
        else:
            y = F.linear(mine, weights[e])
            for weight, (lora, A, B), a, b in parts:
                change = lora.for_expert(x[a:b], A[e], B[e], y.dtype)
                y[a - group.start : b - group.start] += change if weight == 1.0 else change * weight
        bias = biases[e]
        done.append(y if bias is None else y + bias)  # apart, as transformers adds it
    return torch.cat(done) if done else x.new_zeros(0, weights[0].shape[0])


# ---------------------------------------------------------------- which modules


def keeps_contract(module: nn.Module) -> bool:
    """Whether a module runs by transformers' interface for experts."""
    kind: Any = type(module).__bases__[1] if isinstance(module, AdaptedExperts) else type(module)
    return getattr(kind.forward, "__globals__", {}).get("__name__") == _CONTRACT


def weight_names(module: nn.Module) -> tuple[str, ...]:
    """The parameters of a module that can have updates: of one that keeps to the contract its two stacks, in the order
    in which a token passes them; else those of two or three dimensions, in the module's order.
    """
    if keeps_contract(module):
        return ("gate_up_proj" if cast("Any", module).has_gate else "up_proj"), "down_proj"
    return tuple(name for name, p in module._parameters.items() if p is not None and p.ndim in (2, 3))


def experts_site(module: nn.Module, parameter: str) -> ExpertsSite | None:
    """The site of the parameter called `parameter`, or None where it can have no update."""
    if parameter not in weight_names(module):
        return None
    single = module.get_parameter(parameter).ndim == 2
    transposed = not single and bool(getattr(module, "is_transposed", False))
    return ExpertsSite(parameter, transposed=transposed, single=single)


def why_not(module: nn.Module) -> str | None:
    """Why a module with an `experts_site` cannot be adapted all the same; None where it can.

    Runs experts on three tokens, and what is written here on the same: a later version of the contract may say more
    than is heeded here. Weights on the meta device are believed, and a module that is adapted already was asked before.
    """
    own, names = cast("Any", module), weight_names(module)
    if not keeps_contract(module):
        called = type(module).forward is not nn.Module.forward
        return None if called else "is never called itself, so updates of its parameters would never be used"
    if own._is_expert_parallel:
        return "its experts are spread over several devices, each with a part of the stack"
    stack = module.get_parameter(names[0])
    if stack.device.type == "meta" or isinstance(module, AdaptedExperts):
        return None
    generator = torch.Generator().manual_seed(0)
    d, k = stack.shape[1 if own.is_transposed else 2], min(2, own.num_experts)
    x = torch.empty(3, d).normal_(generator=generator).to(stack)
    scores = torch.empty(3, k).uniform_(0.2, 1, generator=generator).to(stack)
    index = torch.stack([torch.randperm(own.num_experts, generator=generator)[:k] for _ in range(3)]).to(stack.device)
    with torch.no_grad():
        expected, got = own(x, index, scores).float(), mixture(module, (), x, index, scores).float()
    error, bound = float((got - expected).norm()), 1e-3 if stack.dtype.itemsize > 2 else 5e-2
    if error > bound * float(expected.norm()):  # false for NaN: weights that are not there yet prove nothing
        return f"its experts do not compute what transformers says they do (off by {error:.1g})"
    return None
