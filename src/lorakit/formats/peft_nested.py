"""Where PEFT keeps the factors of modules that multiply by several weights, and how its config names them.

PEFT wraps such a module, so names show the wrapping. A MultiheadAttention's output projection is inside the wrapper:
`attn.base_layer.out_proj`. Experts, and other modules of which parameters are targeted by name, are wrapped once a
parameter, in the module's order: the last one's factors are at `experts`, those of the one before at
`experts.base_layer`. Only of experts is that order known without the model. A stack's A is (experts * r, in), one
expert after the other; its B is (out, r * experts), of which every `experts`-th column is one expert's.

PEFT adapts both projections of an attention named in `target_modules`, and knows no exclusions for
`target_parameters`; where a config of ours says more, `settings` says the same by whole paths.

Two of PEFT's ways are part of the format. Up to 0.21.2 it adds an attention's output update twice (peft#3774), so its
tensors mean that, and ours are written to mean it too, with that version named (halving and doubling are exact). And on
the mixtures it knows from transformers 4 it takes the strings "all-linear" and regular expressions to mean all experts
and the router, and names that end in `gate_proj`, `up_proj` or `down_proj` to mean experts; so adapters with experts
are written with lists, and those that also hold such layers outside the experts only lorakit reads.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch

from lorakit.adapter import naming
from lorakit.adapter.config import LoRAConfig
from lorakit.adapter.patterns import ends, matching
from lorakit.adapter.value import Adapter, Factors, Kind
from lorakit.core import lowrank

ADDS_TWICE = "0.21.2"
_INSIDE = ".base_layer"
_STACKS = ("gate_up_proj", "up_proj", "down_proj")  # as modules of experts define them, which is how PEFT wraps them
_OUT, _PACKED_BIAS = "out_proj", "in_proj_bias"


# ---------------------------------------------------------------- attention


def attention_of(path: str, kind: str) -> str:
    """The path by which PEFT's patterns know a layer: that of the attention for its output projection."""
    return path.removesuffix(f".{_OUT}") if kind == "attention" else path


def _is_output(path: str, kind: str) -> bool:
    return attention_of(path, kind) != path


def input_only(adapter: Adapter) -> list[str]:
    """Attentions of which the input projection alone is adapted: by its tensors it is a layer like others."""
    return sorted(
        path
        for path, f in adapter.factors.items()
        if f.kind == "attention" and not _is_output(path, f.kind) and f"{path}.{_OUT}" not in adapter.factors
    )


def adds_twice(peft_version: Any) -> bool:
    """Whether the PEFT that wrote a file (the oldest name no version) adds an attention's output update twice."""
    match = re.match(r"(\d+)\.(\d+)\.(\d+)", str(peft_version))
    return match is None or tuple(map(int, match.groups())) <= tuple(map(int, ADDS_TWICE.split(".")))


def halved(path: str, f: Factors) -> torch.Tensor:
    """B as it is written where PEFT adds the update twice."""
    return f.B / 2 if _is_output(path, f.kind) else f.B


def doubled(factors: Mapping[str, Factors]) -> dict[str, Factors]:
    """Undo `halved`."""
    return {path: replace(f, B=f.B * 2) if _is_output(path, f.kind) else f for path, f in factors.items()}


def evened(adapter: Adapter) -> Adapter:
    """The same update with one rank and alpha for both projections of each attention, since PEFT has one: zeros make up
    for the rank, B for the scale.
    """
    factors = dict(adapter.factors)
    for path, out in adapter.factors.items():
        own = factors.get(attention_of(path, out.kind), out)
        if (own.r, own.alpha) == (out.r, out.alpha):
            continue
        r, attention = max(own.r, out.r), attention_of(path, out.kind)
        for name, f in ((attention, own), (path, out)):
            factors[name] = _widened(f, r, adapter.scale(name) / lowrank.scale(out.alpha, r, adapter.config.scaling))
            factors[name] = replace(factors[name], alpha=out.alpha)
    return replace(adapter, factors=factors)


def _widened(f: Factors, r: int, scale: float) -> Factors:
    A = torch.cat([f.A, f.A.new_zeros(r - f.r, f.A.shape[1])])
    B = torch.cat([f.B, f.B.new_zeros(f.B.shape[0], r - f.r)], dim=1)
    return replace(f, A=A, B=B if scale == 1.0 else B.float() * scale)


def exactly(known_as: str, kind: Kind) -> str:
    """A pattern for one layer, or for both projections of one attention."""
    return re.escape(known_as) + (rf"(\.{_OUT})?" if kind == "attention" else "")


# ---------------------------------------------------------------- names


def names(factors: Mapping[str, Factors]) -> dict[str, str]:
    """The name PEFT gives to each path of a matrix, an attention's or an expert stack's factors."""
    stacks: dict[str, list[str]] = {}
    for path, f in factors.items():
        if f.kind == "experts":
            module, _, parameter = path.rpartition(".")
            stacks.setdefault(module, []).append(parameter)
    named = {}
    for path, f in factors.items():
        if f.kind == "experts":
            module, _, parameter = path.rpartition(".")
            wrapped_after = _in_order(stacks[module]).index(parameter)
            named[path] = module + _INSIDE * (len(stacks[module]) - 1 - wrapped_after)
        elif _is_output(path, f.kind):
            named[path] = f"{attention_of(path, f.kind)}{_INSIDE}.{_OUT}"
        else:
            named[path] = path
    return named


def _in_order(parameters: Iterable[str]) -> list[str]:
    return sorted(parameters, key=lambda name: _STACKS.index(name) if name in _STACKS else -1)


def _has_order(parameters: Sequence[str]) -> bool:
    return len(parameters) < 2 or all(name in _STACKS for name in parameters)


def without_order(factors: Mapping[str, Factors]) -> list[str]:
    """Modules of which several parameters have factors and no reader could tell which is whose."""
    stacks: dict[str, list[str]] = {}
    for path, f in factors.items():
        if f.kind == "experts":
            stacks.setdefault(path.rpartition(".")[0], []).append(path.rpartition(".")[2])
    return [module for module, parameters in stacks.items() if not _has_order(parameters)]


def paths(
    named: Mapping[str, int],
    config: LoRAConfig,
    targets: Sequence[str],
    attentions: Iterable[str],
    problems: list[str],
) -> dict[str, tuple[str, Kind]]:
    """Undo `names`: (path, kind) for each name; what cannot be understood is left out and told in `problems`.

    Args:
        named: every name with factors in a file, with the number of rows of its A.
        config: its ranks.
        targets: `target_parameters` as PEFT knows them.
        attentions: paths of attentions of which the file has the input projection alone.
        problems: added to.
    """
    found: dict[str, tuple[str, Kind]] = {}
    attentions, stacks = set(attentions), dict[str, dict[int, str]]()
    for name, rows in named.items():
        module = re.sub(rf"({re.escape(_INSIDE)})+$", "", name)
        if _is_stack(name, rows, module, config, targets, named):
            stacks.setdefault(module, {})[name.count(_INSIDE, len(module))] = name
        elif name.endswith(f"{_INSIDE}.{_OUT}"):
            attention = name.removesuffix(f"{_INSIDE}.{_OUT}")
            attentions.add(attention)
            found[name] = (f"{attention}.{_OUT}", "attention")
        elif _INSIDE in name:
            problems.append(f"{name}: unexpected; neither inside a MultiheadAttention nor named by target_parameters")
        else:
            found[name] = (name, "matrix")
    for name in attentions & found.keys():
        found[name] = (name, "attention")
    for module, by_depth in stacks.items():
        parameters = _in_order(_parameters_of(module, targets))
        if len(parameters) != len(by_depth):  # a target without a module's name may be other modules' alone
            parameters = _in_order(_parameters_of(module, [target for target in targets if "." in target]))
        if sorted(by_depth) != list(range(len(parameters))) or not _has_order(parameters):
            problems.append(
                f"{module}: cannot tell which factors belong to which of its parameters {', '.join(parameters)}"
            )
            continue
        for depth, name in by_depth.items():
            found[name] = (f"{module}.{parameters[len(parameters) - 1 - depth]}", "experts")
    for target in targets:
        if not any(_ends(path, target) for path, kind in found.values() if kind == "experts") and not problems:
            problems.append(f"target_parameters {target!r}: no tensor in the file is for such a parameter")
    return found


def _parameters_of(module: str, targets: Iterable[str]) -> set[str]:
    """The module's parameters that `target_parameters` means."""
    last = [(target.rpartition(".")[2], target) for target in targets]
    return {name for name, target in last if _ends(f"{module}.{name}", target)}


def _is_stack(
    name: str, rows: int, module: str, config: LoRAConfig, targets: Sequence[str], named: Mapping[str, int]
) -> bool:
    """Whether factors are a stack's. A target without a module's name ("down_proj") says nothing of which modules have
    such a parameter: then wrapping tells, or more rows than a matrix of the config's rank has.
    """
    meant = [target for target in targets if _parameters_of(module, [target])]
    wrapped = name != module or module + _INSIDE in named
    return bool(meant) and (wrapped or any("." in target for target in meant) or rows != rank(config, module))


def rank(config: LoRAConfig, path: str) -> int:
    """The rank that a config gives to the layer PEFT knows as `path`."""
    return int(by_pattern(config.rank_pattern, path, config.r))


def by_pattern(patterns: Mapping[str, Any], path: str, otherwise: float) -> float:
    """The value of the first pattern that matches."""
    return next((value for key, value in patterns.items() if matching(ends(key), [path], "pattern")), otherwise)


def _ends(path: str, end: str) -> bool:
    return path == end or path.endswith(f".{end}")


def bias_name(path: str, factors: Mapping[str, Factors]) -> str:
    """The name PEFT gives to a trained bias of the module at `path`."""
    attentions = {attention_of(p, f.kind) for p, f in factors.items() if f.kind == "attention"}
    if path in attentions:
        return f"{path}{_INSIDE}.{_PACKED_BIAS}"
    if path.endswith(f".{_OUT}") and attention_of(path, "attention") in attentions:
        return f"{attention_of(path, 'attention')}{_INSIDE}.{_OUT}{_INSIDE}.bias"
    return f"{path}{_INSIDE}.bias" if path in factors else f"{path}.bias"


def path_of_bias(name: str) -> str:
    """Undo `bias_name`."""
    for end in (f".{_PACKED_BIAS}", ".bias"):
        name = name.removesuffix(end)
    return name.removesuffix(_INSIDE).replace(f"{_INSIDE}.{_OUT}", f".{_OUT}")


# ---------------------------------------------------------------- stacks


def flat(f: Factors) -> tuple[torch.Tensor, torch.Tensor]:
    """A (experts, r, in), B (experts, out, r) as PEFT's (experts * r, in) and (out, r * experts)."""
    return f.A.flatten(0, 1), f.B.permute(1, 2, 0).flatten(1)


def stacked(A: torch.Tensor, B: torch.Tensor, r: int) -> tuple[torch.Tensor, torch.Tensor] | None:
    """Undo `flat`; None where these are no factors of rank `r`."""
    if A.ndim != 2 or B.ndim != 2 or len(A) % r or not len(A) or B.shape[1] != len(A):
        return None
    experts = len(A) // r
    return A.reshape(experts, r, -1), B.reshape(len(B), r, experts).permute(2, 0, 1).contiguous()


# ---------------------------------------------------------------- config


def settings(adapter: Adapter) -> dict[str, Any]:
    """With which PEFT adapts what the adapter holds: the config's own where PEFT means the same by them, else whole
    paths.
    """
    config, written = adapter.config, adapter.config.to_dict()
    modules = {attention_of(p, f.kind) for p, f in adapter.factors.items() if f.kind != "experts"}
    stacks = [path for path, f in adapter.factors.items() if f.kind == "experts"]
    outputs = [path for path, f in adapter.factors.items() if _is_output(path, f.kind)]
    in_pairs = not input_only(adapter) and all(attention_of(path, "attention") in adapter.factors for path in outputs)
    restricted = config.exclude_modules is not None or config.layers is not None
    differs = (
        not in_pairs  # PEFT has both projections or none
        or (outputs and config.exclude_modules is not None)
        or (outputs and config.target_modules == "all-linear")  # which means their Linear alone, to no effect
        or any(_named(path, config.target_modules) for path in outputs)
        or (stacks and (isinstance(config.target_modules, str) or restricted))
        or (isinstance(config.target_modules, str) and config.layers is not None)  # PEFT takes layers with a list only
    )
    other: dict[str, Any] = {"peft_version": ADDS_TWICE} if outputs else {}
    if stacks:  # of which PEFT knows neither
        other = other | {"lora_dropout": 0.0, "init_lora_weights": True}
    if not differs:
        return other | {
            "target_modules": written["target_modules"],
            "exclude_modules": written["exclude_modules"],
            "layers_to_transform": written["layers"],
            "target_parameters": written["target_parameters"] or None,
        }
    return other | {
        "target_modules": sorted(modules) if stacks else naming.exactly(sorted(modules)),
        "exclude_modules": None,
        "layers_to_transform": None,
        "target_parameters": stacks or None,
    }


def _named(path: str, target_modules: str | tuple[str, ...]) -> bool:
    if isinstance(target_modules, str):
        return bool(matching(target_modules, [path], "target_modules"))
    return any(_ends(path, name) for name in target_modules)
