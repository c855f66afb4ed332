"""What a config or an adapter's value becomes in a model: the update of each layer, not yet in its place."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from lorakit.adapter.config import FROM_DATA, LoRAConfig
from lorakit.adapter.targets import Target, Targets, readers
from lorakit.adapter.value import Adapter
from lorakit.core import initializers, lowrank
from lorakit.core.activated import ActivatedLoRA, Invocation
from lorakit.core.attention import AdaptedAttention
from lorakit.core.deltas import LayerUpdate, LoRA, Replacement, StackedUpdate, TokenRows
from lorakit.core.dora import DoRA, row_norms
from lorakit.core.embedding import AdaptedEmbedding
from lorakit.core.experts import AdaptedExperts
from lorakit.core.initializers import Init
from lorakit.core.layer import AdaptedLayer, AdaptedModule, ReplacedModule, bias_name
from lorakit.core.weights import base_weight_of
from lorakit.errors import ConfigError


def expected_shapes(adapter: Adapter, targets: Targets, modules: Mapping[str, nn.Module]) -> dict[str, tuple[int, ...]]:
    """Names (as `Adapter.tensors`) and shapes of every tensor an adapter with these targets must have."""
    shapes: dict[str, tuple[int, ...]] = {}
    for target in targets.layers:
        shape_A, shape_B = target.site.shapes(target.module, target.r, target.path)
        factors, channels = adapter.factors.get(target.path), getattr(target.module, "in_channels", None)
        if target.site.kind == "convolution" and factors is not None and factors.A.shape[1] == channels:
            shape_A = (shape_A[0], channels, *shape_A[2:])  # PEFT's A reads all channels of a grouped convolution
        shapes |= {f"{target.path}.A": shape_A, f"{target.path}.B": shape_B}
        if adapter.config.lora_bias:
            shapes[f"{target.path}.B.bias"] = shape_B[:1]
        if adapter.config.delta == "dora":
            shapes[f"{target.path}.magnitude"] = shape_B[:1]
    shapes |= {f"{path}.bias": tuple(_bias(modules[path]).shape) for path in targets.biases}
    for path in targets.tokens[:1]:
        dim = modules[path].get_parameter("weight").shape[1]
        shapes[f"{path}.tokens"] = (len(adapter.config.trainable_tokens), dim)
    for path in targets.replaced:
        module = modules[path]
        own = (module.as_base() if isinstance(module, AdaptedModule) else module).state_dict()
        shapes |= {f"{path}.{key}": tuple(tensor.shape) for key, tensor in own.items()}
    return shapes


def _bias(module: nn.Module) -> nn.Parameter:
    return module.get_parameter(bias_name(module))


def seeded(seed: int, path: str, device: torch.device | str = "cpu") -> torch.Generator:
    """A generator that depends on the seed and the layer's path only: not on the order of layers, nor on what was
    drawn before.
    """
    digest = hashlib.sha256(f"{seed}|{path}".encode()).digest()
    return torch.Generator(device).manual_seed(int.from_bytes(digest[:8], "big") >> 1)


def fresh_updates(
    config: LoRAConfig,
    targets: Targets,
    modules: Mapping[str, nn.Module],
    seed: int,
    inits: Mapping[str, Init] | None = None,
) -> Iterator[tuple[str, LayerUpdate]]:
    """Updates that change nothing yet, by module path; drawn from the seed and each path.

    Args:
        config: what the targets were found by.
        targets: its layers.
        modules: the model's, by path.
        seed: of draws.
        inits: module path -> factors to begin with, where they are known.

    Raises:
        TargetError: a layer cannot carry its rank, or its weight cannot be read.
        ConfigError: the init is not for these layers.
    """
    known = inits or {}
    invocation = _invocation(config)
    loras = {
        target.path: _fresh_lora(config, target, seed, known.get(target.path), invocation) for target in targets.layers
    }
    tokens = None
    if targets.tokens:
        indices = torch.tensor(config.trainable_tokens)
        tokens = TokenRows(indices, modules[targets.tokens[0]].get_parameter("weight").detach()[indices].float())
    for path in dict.fromkeys([*loras, *targets.biases, *targets.tokens]):
        bias = _bias(modules[path]).detach().float().clone() if path in targets.biases else None
        yield path, _update(path, targets, loras.get(path), bias, tokens)


def _update(
    path: str, targets: Targets, lora: LoRA | None, bias: torch.Tensor | None, tokens: TokenRows | None
) -> LayerUpdate:
    return LayerUpdate(lora, bias, tokens if path in targets.tokens else None, lent=path in targets.tokens[1:])


def _invocation(config: LoRAConfig) -> Invocation | None:
    """One object for all layers of an activated adapter."""
    return Invocation(config.alora_invocation_tokens) if config.alora_invocation_tokens else None


def _fresh_lora(
    config: LoRAConfig, target: Target, seed: int, init: Init | None, invocation: Invocation | None
) -> LoRA:
    stored = base_weight_of(target.module, target.path, target.site.weight_name)
    generator = seeded(seed, target.path)
    if init is None:
        init = beginning(config, target, stored.read(target.module), generator)
    else:  # which may begin other adapters too
        init = init._replace(A=init.A.detach().clone(), B=init.B.detach().clone())
    stuck = config.lora_fa and not stored.read(target.module).is_meta and not init.A.any()
    if stuck:
        raise ConfigError(
            f"{target.path}: lora_fa keeps A as it begins, and an embedding's begins as zero (init {config.init!r}), "
            "so it would never change; leave it out by exclude_modules, or choose init gaussian"
        )
    bias = initializers.bias(config.init, init.B.shape, generator) if config.lora_bias else None
    magnitude = None
    if config.delta == "dora":  # the layer's own function at first: rows as long as they are
        weight, s = target.site.rows(stored.read(target.module)), lowrank.scale(target.alpha, target.r, config.scaling)
        B = torch.zeros_like(init.B) if init.from_start else init.B
        if weight.is_meta:  # a skeleton's rows have no length
            magnitude = torch.ones(len(weight))
        else:
            magnitude = row_norms(weight, init.A.to(weight.device), B.to(weight.device), s).float()
    return _lora(config, target, init, invocation, bias, magnitude)


def beginning(config: LoRAConfig, target: Target, weight: torch.Tensor, generator: torch.Generator) -> Init:
    """The factors with which a layer begins, by the config's init.

    Raises:
        ConfigError: the init is not for this layer, or needs more than the layer.
    """
    site, stacked = target.site, target.site.kind == "experts"
    shape_A, shape_B = site.shapes(target.module, target.r, target.path)
    if factorise := initializers.factorisation(config.init):
        matrices = site.matrices(weight, 1 if stacked else shape_A[0] // shape_B[1])
        s = lowrank.scale(target.alpha, target.r, config.scaling)
        try:
            return initializers.from_weight(factorise, matrices, shape_A, shape_B, s, generator)
        except ConfigError as error:
            raise ConfigError(f"{target.path}: init {config.init!r}: {error}") from None
    if config.init in FROM_DATA:
        if weight.is_meta:  # a skeleton has no data either
            return Init(torch.zeros(shape_A), torch.zeros(shape_B), from_start=config.init == "lora_ga")
        raise ConfigError(
            f"init {config.init!r} looks at data: attach what lorakit.starts_from_data(model, config, batches) gives, "
            "instead of the config; lorakit train does it with its training rows"
        )
    if config.init == "loftq":
        if weight.is_meta:  # nor has it lost anything
            return Init(torch.zeros(shape_A), torch.zeros(shape_B))
        raise ConfigError(
            "init 'loftq' makes up for what quantising the base lost: attach what "
            "lorakit.starts_from_original(model, config) gives, instead of the config; lorakit train does it"
        )
    # an embedding looks up columns of A: its default starts with A zero, so that no rare token begins with a random row
    by_name = initializers.FOR_EMBEDDINGS if site.kind == "embedding" else initializers.INITIALIZERS
    initializer = by_name[config.init]
    if stacked:  # each a matrix of its own
        starts = [initializer(shape_A[1:], shape_B[1:], generator) for _ in range(shape_A[0])]
        return Init(torch.stack([start.A for start in starts]), torch.stack([start.B for start in starts]))
    if len(shape_A) > 2 and config.init == "orthogonal":
        raise ConfigError(f"{target.path}: init 'orthogonal' is defined for matrices, not for convolutions")
    return initializer(shape_A, shape_B, generator)


def _lora(
    config: LoRAConfig,
    target: Target,
    init: Init,
    invocation: Invocation | None,
    bias: torch.Tensor | None = None,
    magnitude: torch.Tensor | None = None,
) -> LoRA:
    settings: dict[str, Any] = {
        "alpha": target.alpha,
        "s": lowrank.scale(target.alpha, target.r, config.scaling),
        "dropout": config.dropout,
        "r": target.r,
        "from_start": init.from_start,
        "stacked": target.site.kind == "experts",
    }
    if magnitude is not None:
        return DoRA(init.A, init.B, magnitude, **settings)
    if invocation is not None:
        return ActivatedLoRA(init.A, init.B, invocation, bias=bias, **settings)
    return LoRA(init.A, init.B, bias=bias, **settings)


def loaded_updates(adapter: Adapter, targets: Targets) -> Iterator[tuple[str, LayerUpdate]]:
    """Updates from a value that was checked against the targets; copies, so that the value stays one."""
    loras, invocation = {}, _invocation(adapter.config)
    for target in targets.layers:
        f = adapter.factors[target.path]
        own = {name: tensor.detach().clone() for name, tensor in f.tensors().items()}
        as_target = replace(target, r=f.r, alpha=f.alpha)
        loras[target.path] = _lora(
            adapter.config, as_target, Init(own["A"], own["B"]), invocation, own.get("B.bias"), own.get("magnitude")
        )
    tokens = None
    if targets.tokens:
        rows = adapter.tokens[targets.tokens[0]].detach().float().clone()
        tokens = TokenRows(torch.tensor(adapter.config.trainable_tokens), rows)
    for path in dict.fromkeys([*loras, *targets.biases, *targets.tokens]):
        bias = adapter.biases[path].clone() if path in targets.biases else None
        yield path, _update(path, targets, loras.get(path), bias, tokens)


def by_module(
    updates: Mapping[str, LayerUpdate | Replacement], modules: Mapping[str, nn.Module]
) -> dict[str, LayerUpdate | Replacement | StackedUpdate]:
    """What each module is to hold, by its path: updates of parameters together, and an empty update where a module
    must be adapted for what it reads elsewhere.
    """
    held: dict[str, LayerUpdate | Replacement | StackedUpdate] = {}
    for path, update in updates.items():
        if path in modules:
            held[path] = update
            continue
        parent, _, name = path.rpartition(".")
        stacked = held.setdefault(parent, StackedUpdate())
        assert isinstance(stacked, StackedUpdate), "only modules of stacked weights have parameters with paths"
        stacked.updates[name] = update
    for path in readers(updates, modules):
        held.setdefault(path, LayerUpdate())
    return held


def mixin_for(module: nn.Module, update: LayerUpdate | Replacement | StackedUpdate) -> type[AdaptedModule]:
    """The class that makes a module compute with such an update."""
    if isinstance(update, Replacement):
        return ReplacedModule
    if isinstance(update, StackedUpdate):
        return AdaptedExperts
    if isinstance(module, nn.Embedding):
        return AdaptedEmbedding
    return AdaptedAttention if isinstance(module, nn.MultiheadAttention) else AdaptedLayer


def fresh_replacement(module: nn.Module) -> Replacement:
    """A trainable copy of a module as it is in the base, whatever other adapters put in its place."""
    return Replacement(module.as_base() if isinstance(module, AdaptedModule) else module)


def loaded_replacement(adapter: Adapter, path: str, module: nn.Module) -> Replacement:
    """The whole trained copy of the module at `path` that the value holds."""
    replacement = fresh_replacement(module)
    own = {name.removeprefix(f"{path}."): t for name, t in adapter.replaced.items() if name.startswith(f"{path}.")}
    if any(parameter.is_meta for parameter in replacement.copy.parameters()):
        replacement.copy.to_empty(device="cpu")  # a skeleton's module: the value brings the numbers
    replacement.copy.load_state_dict(own)
    return replacement
