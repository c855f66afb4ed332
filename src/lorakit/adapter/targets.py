"""Which modules a LoRAConfig means in a given model. Every name, pattern or exclusion that matches nothing is an
error.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from torch import nn

from lorakit.adapter.config import LoRAConfig
from lorakit.core.layer import base_modules, bias_dim
from lorakit.core.sites import Site, is_linear, site_of
from lorakit.errors import ConfigError, TargetError, bullet_list, nearest


@dataclass(frozen=True)
class Target:
    """One layer to adapt."""

    path: str
    module: nn.Module
    site: Site
    r: int
    alpha: float


@dataclass(frozen=True)
class Targets:
    """All that a config means in a model.

    Attributes:
        layers: layers that get a low-rank update, in the model's order.
        biases: paths of modules whose bias is trained.
        replaced: paths of modules trained whole.
    """

    layers: tuple[Target, ...]
    biases: tuple[str, ...]
    replaced: tuple[str, ...]


def find_targets(model: nn.Module, config: LoRAConfig) -> Targets:
    """Resolve a config against a model.

    Raises:
        TargetError: something matches nothing, or a named module cannot be adapted. All problems at once, with the
        nearest names.
    """
    modules = dict(base_modules(model))
    problems: list[str] = []
    replaced = _match_names(config.modules_to_save, modules, "modules_to_save", problems)
    inside_replaced = tuple(f"{path}." for path in replaced)
    candidates = {
        path: module
        for path, module in modules.items()
        if path not in replaced and not path.startswith(inside_replaced)
    }
    if config.target_modules == "all-linear":
        head = output_head(model)
        chosen = [path for path, module in candidates.items() if is_linear(module) and module is not head]
        if not chosen:
            problems.append(
                f"target_modules 'all-linear': no linear layer in {type(model).__name__}; name modules instead"
            )
    else:
        chosen = _match_names(config.target_modules, candidates, "target_modules", problems)
    if config.exclude_modules:
        excluded = set(_match_names(config.exclude_modules, dict.fromkeys(chosen), "exclude_modules", problems))
        chosen = [path for path in chosen if path not in excluded]
    if config.layers is not None:
        chosen = _only_layers(chosen, config.layers, problems)
    if not chosen and not problems:
        problems.append("no layer is left to adapt after exclude_modules and layers")
    ranks = _match_patterns(config.rank_pattern, chosen, "rank_pattern", problems)
    alphas = _match_patterns(config.alpha_pattern, chosen, "alpha_pattern", problems)
    layers = []
    for path in chosen:
        site = site_of(candidates[path])
        if site is None:
            problems.append(f"{path}: {_why_not(candidates[path])}")
            continue
        layers.append(
            Target(path, candidates[path], site, int(ranks.get(path, config.r)), alphas.get(path, config.alpha))
        )
    biases = _biases(candidates, chosen, config.bias, problems)
    if problems:
        raise TargetError(
            f"{type(model).__name__}: {len(problems)} problem(s) in the adapter's config:\n{bullet_list(problems)}"
        )
    return Targets(tuple(layers), biases, tuple(replaced))


def output_head(model: nn.Module) -> nn.Module | None:
    """The layer that makes a language model's logits (which "all-linear" leaves out), if the model names one."""
    getter = getattr(model, "get_output_embeddings", None)
    return getter() if callable(getter) else None


def _matches(pattern: str, path: str) -> bool:
    """Whether `pattern` is the end of a module path, on whole components: "q_proj" and "attn.q_proj" match
    "h.0.attn.q_proj".
    """
    return path == pattern or path.endswith(f".{pattern}")


def _compile(pattern: str, what: str) -> re.Pattern[str]:
    try:
        return re.compile(pattern)
    except re.error as error:
        raise ConfigError(f"{what}: {pattern!r} is not a regular expression: {error}") from None


def _match_names(names: str | Sequence[str], paths: Iterable[str], what: str, problems: list[str]) -> list[str]:
    """Paths meant by a regular expression (a string) or a list of path ends, in the model's order."""
    paths = [path for path in paths if path]
    if isinstance(names, str):
        pattern = _compile(names, what)
        found = [path for path in paths if pattern.fullmatch(path)]
        if not found:
            last = sorted({path.rsplit(".", 1)[-1] for path in paths})
            guess = nearest(names, last) or last[:5]
            hint = (
                f'a single string is a regular expression for whole paths; for names write a list, e.g. ["{guess[0]}"]'
                if guess
                else ""
            )
            problems.append(f"{what} {names!r}: matches no module; {hint}")
        return found
    found_by_name = {name: [path for path in paths if _matches(name, path)] for name in names}
    for name, found in found_by_name.items():
        if not found:
            # looking for the nearest takes long in a big model: for the first few only
            hint = _did_you_mean(name, paths) if len(problems) < 5 else ""
            problems.append(f"{what} {name!r}: matches no module{hint}")
    meant = {path for found in found_by_name.values() for path in found}
    return [path for path in paths if path in meant]


def _did_you_mean(name: str, paths: Sequence[str]) -> str:
    # Compare with as many trailing components as the name has, so "attn.qproj" is held against "attn.q_proj".
    depth = name.count(".") + 1
    tails = sorted({".".join(path.split(".")[-depth:]) for path in paths})
    guess = nearest(name, tails)
    if guess:
        return f"; did you mean {' or '.join(guess)}?"
    return f"; there are {', '.join(tails[:8])}{' ...' if len(tails) > 8 else ''}"


def _match_patterns(
    patterns: dict[str, int] | dict[str, float], paths: Sequence[str], what: str, problems: list[str]
) -> dict[str, float]:
    """Value per path; the first pattern that matches counts, as in PEFT: an end of the path, or a regular expression
    for one.
    """
    values: dict[str, float] = {}
    for key, value in patterns.items():
        pattern = _compile(rf"(.*\.)?({key})", what)
        found = [path for path in paths if pattern.fullmatch(path)]
        if not found:
            problems.append(f"{what} {key!r}: matches no adapted layer{_did_you_mean(key, paths)}")
        for path in found:
            values.setdefault(path, value)
    return values


def _only_layers(paths: Sequence[str], layers: Sequence[int], problems: list[str]) -> list[str]:
    numbered = {path: int(match[1]) for path in paths if (match := re.search(r"(?:^|\.)(\d+)(?:\.|$)", path))}
    present = sorted(set(numbered.values()))
    absent = sorted(set(layers) - set(present))
    if absent:
        span = f"{present[0]} to {present[-1]}" if present else "no number at all"
        problems.append(f"layers: {absent} not among the chosen modules, which have {span}")
    return [path for path in paths if numbered.get(path) in set(layers)]


def _why_not(module: nn.Module) -> str:
    name = type(module).__name__
    if any(True for _ in module.children()):
        inside = [child for child, layer in module.named_modules() if child and site_of(layer) is not None]
        return f"{name} is a block, not a layer" + (f"; name layers inside it, e.g. {inside[0]!r}" if inside else "")
    if isinstance(module, nn.Embedding) and module.max_norm is not None:
        return "Embedding with max_norm rewrites its weight while it runs, so it cannot be kept frozen"
    return (
        f"{name} is no layer lorakit knows how to adapt (Linear, transformers Conv1D, Embedding, Conv1d/2d/3d, "
        "each with its own forward)"
    )


def _biases(
    candidates: dict[str, nn.Module], chosen: Sequence[str], which: str, problems: list[str]
) -> tuple[str, ...]:
    if which == "none":
        return ()
    paths = [path for path, module in candidates.items() if isinstance(getattr(module, "bias", None), nn.Parameter)]
    if which == "lora_only":
        paths = [path for path in paths if path in set(chosen)]
    if not paths:
        problems.append(f"bias {which!r}: no such layer has a bias; use bias='none'")
    problems += [
        f"bias {which!r}: cannot tell how {type(candidates[path]).__name__} at {path} adds its bias"
        for path in paths
        if bias_dim(candidates[path], site_of(candidates[path])) is None
    ]
    return tuple(paths)
