"""Where the factors of each layer begin, where that is found out from data (EVA, LoRA-GA): what `attach` takes instead
of a config. Knows batches as what the model is called with; rows and tokens are the caller's.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from lorakit.adapter.compress import exact_pattern
from lorakit.adapter.config import FROM_DATA, LoRAConfig
from lorakit.adapter.naming import exactly
from lorakit.adapter.targets import Target, find_targets
from lorakit.core import initializers
from lorakit.core.components import PrincipalComponents, shared_ranks
from lorakit.core.initializers import Init
from lorakit.core.sites import LinearSite
from lorakit.errors import ConfigError, TargetError, bullet_list

_HELD = 1 << 30  # bytes of gradients of weights, in fp32, that are held at a time
_SPARE = 32  # directions that are kept beyond those that may be used: what is cut off between batches cannot come back


@dataclass(frozen=True, kw_only=True, eq=False)
class Starts:
    """A config, and the factors with which each of its layers begins.

    Attributes:
        config: means the layers that have a start, with their ranks.
        inits: module path -> start.
    """

    config: LoRAConfig
    inits: Mapping[str, Init]


def starts_from_data(
    model: nn.Module,
    config: LoRAConfig,
    batches: Sequence[Any],
    *,
    loss: Callable[[nn.Module, Any], torch.Tensor] | None = None,
    forward: Callable[[nn.Module, Any], Any] | None = None,
    seed: int = 0,
) -> Starts:
    """Find out from data where an adapter begins. The model is as it was afterwards.

    Args:
        model: the base, without adapters.
        config: with init "eva" or "lora_ga".
        batches: what the model is called with: mappings of its arguments by name, or its one argument. Without padding:
            every token counts.
        loss: of the model and a batch, for lora_ga; None: `forward`'s `.loss`.
        forward: how the model is called with a batch; None: `model(**batch)` or `model(batch)`.
        seed: of random starts of decompositions.

    Returns:
        What `attach` and `add` take in place of the config.

    Raises:
        ConfigError: another init, no batches, or a rank the layers or the data cannot give.
        TargetError: layers for which the init is not defined, by name.
    """
    if config.init not in FROM_DATA:
        raise ConfigError(f"init {config.init!r} looks at no data: attach the config itself")
    if not batches:
        raise ConfigError(f"init {config.init!r} needs at least one batch")
    run = forward or _call

    def loss_of_forward(model: nn.Module, batch: Any) -> torch.Tensor:
        found: torch.Tensor = run(model, batch).loss
        return found

    if config.init == "eva":
        return _eva(model, config, batches, run, seed)
    return _lora_ga(model, config, batches, loss or loss_of_forward)


def starts_in(tensors: Mapping[str, torch.Tensor], config: LoRAConfig, model: nn.Module) -> Starts:
    """The starts of an adapter that has been trained since, from its tensors ("<path>.A", "<path>.B", ...): of the
    same layers and ranks; what they hold is to be restored.
    """
    targets = find_targets(model, config).layers
    if config.init == "eva":
        held = {target.path: tensors.get(f"{target.path}.A") for target in targets}
        config = with_ranks(config, targets, {path: 0 if A is None else len(A) for path, A in held.items()})
    inits = {
        target.path: Init(tensors[f"{target.path}.A"], tensors[f"{target.path}.B"], from_start=config.from_start)
        for target in targets
        if f"{target.path}.A" in tensors
    }
    return Starts(config=config, inits=inits)


def _call(model: nn.Module, batch: Any) -> Any:
    return model(**batch) if isinstance(batch, Mapping) else model(batch)


def _targets(model: nn.Module, config: LoRAConfig, defined: Callable[[Target], bool], for_what: str) -> list[Target]:
    targets = list(find_targets(model, config).layers)
    strangers = [target.path for target in targets if not defined(target)]
    if strangers:
        raise TargetError(
            f"init {config.init!r} is defined for {for_what}, not for\n{bullet_list(strangers)}\n"
            "Leave them out by exclude_modules"
        )
    return targets


@contextlib.contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    was_training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(was_training)


# ---------------------------------------------------------------- EVA


def _eva(
    model: nn.Module, config: LoRAConfig, batches: Sequence[Any], run: Callable[[nn.Module, Any], Any], seed: int
) -> Starts:
    """A: the directions in which a layer's inputs vary most; ranks to the layers where they vary in more."""
    targets = _targets(model, config, _sees_its_input, "layers that multiply their input by a matrix")
    most = {target.path: round(target.r * config.eva_rho) for target in targets}
    seen = _inputs_of(model, targets, most, batches, run, seed)
    short = [
        f"{target.path}: {seen[target.path].varying} for rank {target.r}"
        for target in targets
        if seen[target.path].varying < target.r
    ]
    if short:
        raise ConfigError(
            f"init 'eva': inputs do not vary in as many directions as the rank, in\n{bullet_list(short)}\n"
            "Lower r, or give more data"
        )
    ranks = {target.path: target.r for target in targets}
    if config.eva_rho > 1:
        shares = {target.path: seen[target.path].shares[: most[target.path]] for target in targets}
        ranks = shared_ranks(shares, sum(ranks.values()))
    inits = {}
    for target in targets:
        r, directions = ranks[target.path], seen[target.path].directions
        assert directions is not None, "every target has seen a row"
        if r:
            outputs = target.site.shapes(target.module, r, target.path)[1][0]
            inits[target.path] = Init(directions[:r].float().contiguous(), torch.zeros(outputs, r))
    return Starts(config=with_ranks(config, targets, ranks), inits=inits)


def _sees_its_input(target: Target) -> bool:
    """Whether the layer is called, with rows that its matrix multiplies."""
    return isinstance(target.site, LinearSite) and target.site.kind == "matrix"


def _inputs_of(
    model: nn.Module,
    targets: Sequence[Target],
    most: Mapping[str, int],
    batches: Sequence[Any],
    run: Callable[[nn.Module, Any], Any],
    seed: int,
) -> dict[str, PrincipalComponents]:
    """The components of each layer's inputs; layers that are given the same tensor share theirs."""
    found: dict[str, PrincipalComponents] = {}
    newest: list[Any] = [None, None]  # the last input seen, and whose

    def note(path: str) -> Callable[[nn.Module, Any], None]:
        def hook(module: nn.Module, args: Any) -> None:
            x = args[0]
            if x is newest[0] and (path not in found or found[path] is found[newest[1]]):
                found[path] = found[newest[1]]
                return
            newest[:] = [x, path]
            found.setdefault(path, PrincipalComponents(max(most.values()) + _SPARE, seed)).add(
                x.reshape(-1, x.shape[-1])
            )

        return hook

    hooks = [target.module.register_forward_pre_hook(note(target.path)) for target in targets]
    try:
        with _evaluating(model), torch.no_grad():
            for batch in batches:
                run(model, batch)
                newest[:] = [None, None]
    finally:
        for hook in hooks:
            hook.remove()
    unseen = [target.path for target in targets if target.path not in found]
    if unseen:
        raise TargetError(f"init 'eva': never called in these batches:\n{bullet_list(unseen)}")
    return found


def with_ranks(config: LoRAConfig, targets: Sequence[Target], ranks: Mapping[str, int]) -> LoRAConfig:
    """The config that gives each of its layers the rank in `ranks`, its alpha in proportion, and leaves out those of
    rank 0.
    """
    kept = [target for target in targets if ranks[target.path]]
    alphas = {target.path: target.alpha * ranks[target.path] / target.r for target in kept}
    config = config.replace(
        rank_pattern=exact_pattern({target.path: ranks[target.path] for target in kept}, config.r),
        alpha_pattern=exact_pattern(alphas, config.alpha),
    )
    if len(kept) == len(targets):
        return config
    # names could mean longer paths that end like these
    return config.replace(target_modules=exactly(target.path for target in kept), exclude_modules=None, layers=None)


# ---------------------------------------------------------------- LoRA-GA


def _lora_ga(
    model: nn.Module, config: LoRAConfig, batches: Sequence[Any], loss: Callable[[nn.Module, Any], torch.Tensor]
) -> Starts:
    """A and B: singular directions of the gradient of each weight."""
    targets = _targets(
        model,
        config,
        lambda target: target.site.kind != "embedding",
        "layers with a weight of their own (an embedding's may be the head's too)",
    )
    inits = {}
    for some in _by_size(targets):
        for target, gradient in zip(some, _gradients(model, some, batches, loss), strict=True):
            shape_A, shape_B = target.site.shapes(target.module, target.r, target.path)
            groups = 1 if target.site.kind == "experts" else shape_A[0] // shape_B[1]
            matrices = target.site.matrices(gradient, groups)
            r = target.r // groups
            if 2 * r > min(matrices.shape[1:]):
                raise ConfigError(
                    f"{target.path}: init 'lora_ga' takes 2 r = {2 * r} directions of a matrix of "
                    f"{matrices.shape[1]} x {matrices.shape[2]}; lower its rank"
                )
            A, B = (factor.float().contiguous() for factor in initializers.lora_ga(matrices, r, config.lora_ga_gamma))
            inits[target.path] = Init(A.reshape(shape_A), B.reshape(shape_B), from_start=True)
    return Starts(config=config, inits=inits)


def _by_size(targets: Sequence[Target]) -> Iterator[list[Target]]:
    """Groups of which the gradients can be held at a time; at least one layer each."""
    group: list[Target] = []
    held = 0
    for target in targets:
        size = 4 * target.module.get_parameter(target.site.weight_name).numel()
        if group and held + size > _HELD:
            yield group
            group, held = [], 0
        group.append(target)
        held += size
    yield group


def _gradients(
    model: nn.Module,
    targets: Sequence[Target],
    batches: Sequence[Any],
    loss: Callable[[nn.Module, Any], torch.Tensor],
) -> list[torch.Tensor]:
    """The gradient of the mean loss over the batches in each weight, fp32 on the CPU; of nothing else."""
    weights = [target.module.get_parameter(target.site.weight_name) for target in targets]
    sums = [torch.zeros(weight.shape) for weight in weights]
    flags = [(parameter, parameter.requires_grad, parameter.grad) for parameter in model.parameters()]

    def taken(total: torch.Tensor) -> Callable[[torch.Tensor], None]:
        def hook(weight: torch.Tensor) -> None:
            if weight.grad is not None:
                total.add_(weight.grad.float().cpu())
                weight.grad = None

        return hook

    hooks = []
    try:
        for parameter, _, _ in flags:
            parameter.requires_grad_(False)
            parameter.grad = None
        for weight, total in zip(weights, sums, strict=True):
            weight.requires_grad_(True)
            hooks.append(weight.register_post_accumulate_grad_hook(taken(total)))  # type: ignore[no-untyped-call]
        with _evaluating(model), torch.enable_grad():
            for batch in batches:
                (loss(model, batch) / len(batches)).backward()  # type: ignore[no-untyped-call]
    finally:
        for hook in hooks:
            hook.remove()
        for parameter, flag, gradient in flags:
            parameter.requires_grad_(flag)
            parameter.grad = gradient
    none = [target.path for target, total in zip(targets, sums, strict=True) if not total.any()]
    if none:
        raise TargetError(f"init 'lora_ga': the loss does not depend on the weights of\n{bullet_list(none)}")
    return sums
