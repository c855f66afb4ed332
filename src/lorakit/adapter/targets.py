"""Which modules a LoRAConfig means in a given model. Every name, pattern or exclusion that matches nothing is an
error.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from torch import nn

from lorakit.adapter import presets
from lorakit.adapter.config import PRESETS, LoRAConfig
from lorakit.adapter.naming import names_meaning
from lorakit.adapter.patterns import ends, matching
from lorakit.adapter.value import TAKES_BIAS, TAKES_MAGNITUDE
from lorakit.core import experts
from lorakit.core.attention import AdaptedAttention, is_output_projection
from lorakit.core.layer import AdaptedLayer, base_modules, batch_dim_inside, bias_dim, bias_name
from lorakit.core.sites import Site, is_attention, site_of
from lorakit.errors import TargetError, bullet_list, nearest

_IN_WORDS = {"embedding": "Embedding", "attention": "MultiheadAttention", "experts": "stacked experts"}


@dataclass(frozen=True)
class Target:
    """One weight to adapt: at `path`, the parameter `site.weight_name` of `module`."""

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
        tokens: path of the embedding of which rows are trained, and of every head tied to it; the embedding first.
        config: what they were found by, with names of this model in place of presets (but "all-linear" alone, which
        other libraries know too).
    """

    layers: tuple[Target, ...]
    biases: tuple[str, ...]
    replaced: tuple[str, ...]
    tokens: tuple[str, ...]
    config: LoRAConfig


def find_targets(model: nn.Module, config: LoRAConfig) -> Targets:
    """Resolve a config against a model.

    Raises:
        TargetError: something matches nothing, or a named module cannot be adapted. All problems at once, with the
        nearest names.
    """
    modules = dict(base_modules(model))
    problems: list[str] = []
    replaced = _match_names(config.modules_to_save, modules, "modules_to_save", problems)
    problems += [
        f"modules_to_save: {path} is a {type(modules[path]).__name__}, which is never called itself, so a copy of it "
        "would never be used; name what is in it"
        for path in replaced
        if type(modules[path]).forward is nn.Module.forward
    ]
    inside_replaced = tuple(f"{path}." for path in replaced)
    candidates = {
        path: module
        for path, module in modules.items()
        if path not in replaced and not path.startswith(inside_replaced)
    }
    words, names = _presets_and_names(config.target_modules)
    by_preset = _by_presets(model, candidates, words, problems)
    meant = {*by_preset, *_match_names(names, candidates, "target_modules", problems)}
    meant |= {f"{path}.out_proj" for path in meant & candidates.keys() if is_attention(candidates[path])}  # as in PEFT
    chosen = [path for path in candidates if path in meant]
    of_preset = [path for path in by_preset if path not in candidates]
    stacks = _stacks(candidates, tuple(dict.fromkeys((*config.target_parameters, *of_preset))), problems)
    if words and config.target_modules != "all-linear":
        config = _spelled_out(config, chosen, of_preset, modules)
    problems += [
        f"{path}: its module is in target_modules too; leave one of them out"
        for path in stacks
        if path.rpartition(".")[0] in chosen
    ]
    chosen += stacks
    if config.exclude_modules:
        excluded = set(_match_names(config.exclude_modules, dict.fromkeys(chosen), "exclude_modules", problems))
        chosen = [path for path in chosen if path not in excluded]
    if config.layers is not None:
        chosen = _only_layers(chosen, config.layers, problems)
    if not chosen and not problems and config.target_modules != "none":
        problems.append("no layer is left to adapt after exclude_modules and layers")
    ranks = _match_patterns(config.rank_pattern, chosen, "rank_pattern", problems)
    alphas = _match_patterns(config.alpha_pattern, chosen, "alpha_pattern", problems)
    layers: list[Target] = []
    for path in chosen:
        module = candidates[path.rpartition(".")[0] if path in stacks else path]
        site = stacks[path] if path in stacks else site_of(module)
        if site is None or (is_output_projection(module) and not is_attention(candidates[path.rpartition(".")[0]])):
            problems.append(f"{path}: {_why_not(module)}")
            continue
        # a pattern for an attention means both its projections, as it does to PEFT
        known = path if path in ranks or site.kind != "attention" else path.removesuffix(".out_proj")
        also = path if path in alphas or site.kind != "attention" else path.removesuffix(".out_proj")
        if config.lora_bias and site.kind not in TAKES_BIAS:
            problems.append(
                f"{path}: lora_bias=True is not supported for {_IN_WORDS[site.kind]}; leave it out by exclude_modules, "
                "or set lora_bias to false"
            )
        if config.delta == "dora" and site.kind not in TAKES_MAGNITUDE:
            problems.append(
                f"{path}: delta='dora' is not supported for {_IN_WORDS[site.kind]}; leave it out by exclude_modules, "
                "or choose delta='lora'"
            )
        layers.append(Target(path, module, site, int(ranks.get(known, config.r)), alphas.get(also, config.alpha)))
    if config.alora_invocation_tokens:
        problems += _not_token_by_token(model, layers, candidates)
    folded = [path for path in stacks if path in chosen and not experts.keeps_contract(module_at(path, candidates))]
    if folded and config.dropout:
        problems.append(f"dropout: {folded[0]} cannot have any, as its update is folded into it")
    biases = _biases(candidates, chosen, config.bias, problems)
    problems += [
        f"bias {config.bias!r}: cannot train the bias of {path}, whose parameters are targeted by name"
        for path in biases
        if any(stack.rpartition(".")[0] == path for stack in stacks)
    ]
    tokens = _embedding_and_tied(model, modules, config.trainable_tokens, [*chosen, *replaced], problems)
    if problems:
        raise TargetError(
            f"{type(model).__name__}: {len(problems)} problem(s) in the adapter's config:\n{bullet_list(problems)}"
        )
    return Targets(tuple(layers), biases, tuple(replaced), tokens, config)


def input_embedding(model: nn.Module) -> nn.Module | None:
    """The table that token ids are looked up in, if the model names one."""
    getter = getattr(model, "get_input_embeddings", None)
    return getter() if callable(getter) else None


def _not_token_by_token(model: nn.Module, layers: Sequence[Target], modules: Mapping[str, nn.Module]) -> list[str]:
    """Layers that an activated adapter cannot be in: what they are given does not show which token is which."""
    if getattr(getattr(model, "config", None), "is_encoder_decoder", False):
        return ["alora_invocation_tokens: an encoder and a decoder have tokens of their own; for one stack alone"]
    head = presets.output_head(model)
    of_experts = set(presets.members(model, modules)["experts"])
    problems = []
    for target in layers:
        if target.site.kind != "matrix":
            why = "is no layer that multiplies each token by a matrix"
        elif target.module is head:
            why = "is the output head, which is not given every token"
        elif target.path in of_experts:
            why = "is in an expert, which is given some tokens alone"
        elif batch_dim_inside(modules.get(target.path.rpartition(".")[0])) == 1:
            why = "is given sequences first"
        else:
            continue
        problems.append(f"alora_invocation_tokens: {target.path} {why}; leave it out by exclude_modules")
    return problems


def module_at(path: str, modules: Mapping[str, nn.Module]) -> nn.Module:
    """The module that holds what a path names: the module of that path, or the one whose parameter it is."""
    return modules[path] if path in modules else modules[path.rpartition(".")[0]]


def readers(paths: Iterable[str], modules: Mapping[str, nn.Module]) -> list[str]:
    """Paths of the MultiheadAttentions whose output projection is among `paths`: they read its weight without calling
    it, so they too must be adapted.
    """
    return [path.rpartition(".")[0] for path in paths if path in modules and is_output_projection(modules[path])]


def _presets_and_names(targets: str | tuple[str, ...]) -> tuple[tuple[str, ...], str | tuple[str, ...]]:
    """The presets among `target_modules`, and the rest."""
    if targets == "none":
        return (), ()
    if isinstance(targets, str):
        return ((targets,), ()) if targets in PRESETS else ((), targets)
    return tuple(t for t in targets if t in PRESETS), tuple(t for t in targets if t not in PRESETS)


def _by_presets(
    model: nn.Module, candidates: Mapping[str, nn.Module], words: Sequence[str], problems: list[str]
) -> list[str]:
    """Paths of layers, and names of stacked parameters, that presets mean."""
    if not words:
        return []
    meant = presets.members(model, candidates)
    there = ", ".join(f"{word} ({len(paths)})" for word, paths in meant.items() if paths)
    problems += [
        f"target_modules {word!r}: {type(model).__name__} has none of that; "
        + (f"presets that mean something in it: {there}" if there else "name its modules instead")
        for word in words
        if not meant[word]
    ]
    return list(dict.fromkeys(path for word in words for path in meant[word]))


def _spelled_out(
    config: LoRAConfig, chosen: Sequence[str], stacks: Sequence[str], modules: Mapping[str, nn.Module]
) -> LoRAConfig:
    """The config with names in place of presets, which mean the same in this model to every library."""
    outputs = {f"{path}.out_proj" for path in chosen if is_attention(modules[path])}  # meant by the attention's name
    paths = [path for path in chosen if path not in outputs]
    parameters = names_meaning(stacks, [*stacks, *_parameters(modules)], least=2)
    if isinstance(parameters, str):  # target_parameters takes no expression, and whole names serve as well
        parameters = tuple(stacks)
    return config.replace(
        target_modules=names_meaning(paths, modules.keys() - outputs),
        target_parameters=tuple(dict.fromkeys((*config.target_parameters, *parameters))),
    )


def _parameters(modules: Mapping[str, nn.Module]) -> dict[str, tuple[nn.Module, str]]:
    """Full name of each parameter -> its module and its name there."""
    return {
        f"{path}.{name}" if path else name: (module, name)
        for path, module in modules.items()
        for name, parameter in module._parameters.items()
        if parameter is not None
    }


def _stacks(candidates: Mapping[str, nn.Module], names: Sequence[str], problems: list[str]) -> dict[str, Site]:
    """The parameters that `target_parameters` names, by full name."""
    if not names:
        return {}
    parameters = _parameters(candidates)
    found: dict[str, Site] = {}
    asked: dict[type, str | None] = {}
    for path in _match_names(names, parameters, "target_parameters", problems):
        module, name = parameters[path]
        kind, site, why = type(module), experts.experts_site(module, name), None
        if "." not in path:
            why = f"Targeting an nn.Parameter on the top-level module is not supported (parameter {path!r})"
        elif site is None:
            why = f"{path}: is no matrix and no stack of them, or a bias of experts, so it has no low-rank update"
        elif is_output_projection(module):
            why = f"{path}: is read by a MultiheadAttention, which does not call {kind.__name__}; name it as a module"
        elif isinstance(module, AdaptedLayer | AdaptedAttention):
            why = f"{path}: another adapter has the {kind.__bases__[1].__name__} itself in target_modules"
        else:
            if kind not in asked:
                asked[kind] = experts.why_not(module)
            why = None if asked[kind] is None else f"{path}: {asked[kind]}"
        if why is not None:
            problems.append(why)
        elif site is not None:
            found[path] = site
    return found


def _matches(pattern: str, path: str) -> bool:
    """Whether `pattern` is the end of a module path, on whole components: "q_proj" and "attn.q_proj" match
    "h.0.attn.q_proj".
    """
    return path == pattern or path.endswith(f".{pattern}")


def _match_names(names: str | Sequence[str], paths: Iterable[str], what: str, problems: list[str]) -> list[str]:
    """Paths meant by a regular expression (a string) or a list of path ends, in the model's order."""
    paths = [path for path in paths if path]
    if isinstance(names, str):
        found = matching(names, paths, what)
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
            thing = "parameter" if what == "target_parameters" else "module"
            # looking for the nearest takes long in a big model: for the first few only
            words = PRESETS if what == "target_modules" else ()
            hint = _did_you_mean(name, paths, words) if len(problems) < 5 else ""
            problems.append(f"{what} {name!r}: matches no {thing}{hint}")
    meant = {path for found in found_by_name.values() for path in found}
    return [path for path in paths if path in meant]


def _did_you_mean(name: str, paths: Sequence[str], words: Sequence[str] = ()) -> str:
    # Compare with as many trailing components as the name has, so "attn.qproj" is held against "attn.q_proj".
    depth = name.count(".") + 1
    tails = sorted({".".join(path.split(".")[-depth:]) for path in paths})
    guess = nearest(name, [*words, *tails])
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
        found = matching(ends(key), paths, f"{what} {key!r}")
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
    if is_attention(module):
        return (
            f"{name} with kdim or vdim keeps its input projection in three weights of different widths, which has no "
            "place in adapter files; exclude it (its out_proj can be adapted)"
        )
    if isinstance(module, nn.MultiheadAttention) or is_output_projection(module):
        return f"{name}: only torch's own MultiheadAttention, with its own forward, can be adapted"
    if any(True for _ in module.children()):
        inside = [child for child, layer in module.named_modules() if child and site_of(layer) is not None]
        return f"{name} is a block, not a layer" + (f"; name layers inside it, e.g. {inside[0]!r}" if inside else "")
    if isinstance(module, nn.Embedding) and module.max_norm is not None:
        return "Embedding with max_norm rewrites its weight while it runs, so it cannot be kept frozen"
    return (
        f"{name} is no layer lorakit knows how to adapt (Linear, transformers Conv1D, Embedding, Conv1d/2d/3d, "
        "each with its own forward)"
    )


def _embedding_and_tied(
    model: nn.Module,
    modules: Mapping[str, nn.Module],
    tokens: Sequence[int],
    taken: Sequence[str],
    problems: list[str],
) -> tuple[str, ...]:
    """Paths of the input embedding and of the linear layers that have its weight too."""
    if not tokens:
        return ()
    named = input_embedding(model)
    embeddings = [path for path, m in modules.items() if isinstance(m, nn.Embedding) and named in (None, m)]
    if len(embeddings) != 1:
        problems.append(
            f"trainable_tokens: {type(model).__name__} has {len(embeddings)} embeddings and does not say which one is "
            "for tokens; train it by modules_to_save or target_modules instead"
        )
        return ()
    embedding = modules[embeddings[0]]
    weight = embedding.get_parameter("weight")
    if site_of(embedding) is None:
        problems.append(f"trainable_tokens: {embeddings[0]}: {_why_not(embedding)}")
    if max(tokens) >= len(weight):
        problems.append(f"trainable_tokens: {max(tokens)} is no row of {embeddings[0]}, which has {len(weight)}")
    tied = [p for p, m in modules.items() if m is not embedding and m._parameters.get("weight") is weight]
    both = [path for path in (embeddings[0], *tied) if path in taken]
    if both:
        problems.append(
            f"trainable_tokens: {' and '.join(both)} cannot also be adapted or trained whole: leave it out of "
            "target_modules and modules_to_save, or drop trainable_tokens"
        )
    return (embeddings[0], *tied)


def _biases(
    candidates: dict[str, nn.Module], chosen: Sequence[str], which: str, problems: list[str]
) -> tuple[str, ...]:
    if which == "none":
        return ()
    paths = [
        path
        for path, module in candidates.items()
        if isinstance(getattr(module, bias_name(module), None), nn.Parameter)
    ]
    if which == "lora_only":
        paths = [path for path in paths if path in set(chosen)]
    if not paths:
        problems.append(f"bias {which!r}: no such layer has a bias; use bias='none'")
    problems += [
        f"bias {which!r}: cannot tell how {type(candidates[path]).__name__} at {path} adds its bias"
        for path in paths
        if bias_dim(candidates[path], site_of(candidates[path])) is None
    ]
    if which == "all":
        problems += [
            f"bias 'all': {name} of the {type(module).__name__} at {path} cannot be trained; use bias='lora_only'"
            for path, module in candidates.items()
            for name in ("bias_k", "bias_v", "gate_up_proj_bias", "up_proj_bias", "down_proj_bias")
            if isinstance(getattr(module, name, None), nn.Parameter)
        ]
    return tuple(paths)
