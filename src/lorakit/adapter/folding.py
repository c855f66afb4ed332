"""Folding the active adapters into a model's weights: for the length of a block, or for good.

Arithmetic is fp32 and each weight is rounded once, to the dtype it is stored in. A block keeps the base's own
parameters aside and puts the same objects back, so no number of blocks changes a bit.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import cast

import torch
from torch import nn

from lorakit.adapter.updates import seeded
from lorakit.core.activated import ActivatedLoRA
from lorakit.core.active import Selection
from lorakit.core.attention import AdaptedAttention
from lorakit.core.deltas import LayerUpdate, Replacement, StackedUpdate
from lorakit.core.experts import AdaptedExperts, experts_site, weight_names
from lorakit.core.folding import fold
from lorakit.core.layer import AdaptedLayer, AdaptedModule, ReplacedModule, base_modules, base_parameters, bias_name
from lorakit.core.sites import Site
from lorakit.core.weights import base_weight_of
from lorakit.errors import AdapterError, bullet_list
from lorakit.quant.tensor import WAYS_OUT, format_of

MINIMUM_SURVIVAL = 0.8
"""Share of the update that must survive rounding, over all layers, unless a caller says otherwise."""


@dataclass(frozen=True, kw_only=True)
class FoldedLayer:
    """What folding did to one parameter.

    Attributes:
        name: the parameter's full name.
        survived: share of the update left after rounding to the storage dtype (`core.folding.Folded`).
        ratio: ||update|| / ||old parameter||.
        energy: squared norm of the update.
    """

    name: str
    survived: float
    ratio: float
    energy: float


@dataclass(frozen=True, kw_only=True)
class FoldReport:
    """How much of an adapter survives in the merged weights.

    Attributes:
        layers: one entry a parameter that changed.
        dtypes: dtypes the parameters are stored in.
        untied: parameters that shared their tensor with another module before and have their own in the merged model.
    """

    layers: tuple[FoldedLayer, ...]
    dtypes: tuple[str, ...]
    untied: tuple[str, ...]

    @property
    def survived(self) -> float:
        """Share of the whole update left after rounding: the layers' shares, weighted by the size of their updates."""
        layers = [layer for layer in self.layers if layer.energy]
        total = math.fsum(layer.energy for layer in layers)
        # the base's own rounding, to a narrower dtype than it had, can push the projection above 1
        return min(1.0, math.fsum(layer.survived * layer.energy for layer in layers) / total) if total else 1.0

    def check(self, minimum: float) -> None:
        """Refuse a merge that loses too much.

        Raises:
            AdapterError: less than `minimum` of the update survives; says where most is lost, and the ways out.
        """
        if self.survived >= minimum:
            return
        worst = sorted((layer for layer in self.layers if layer.energy), key=lambda layer: layer.survived)[:5]
        listed = [
            f"{layer.name}: {layer.survived:.0%} survives (update is {layer.ratio:.1e} of the weight)"
            for layer in worst
        ]
        raise AdapterError(
            f"only {self.survived:.1%} of the update would survive rounding to {', '.join(self.dtypes)} (at least "
            f"{minimum:.0%} is asked for); most is lost in\n{bullet_list(listed)}\n"
            "Keep the adapter unmerged, merge in a wider dtype (fp32), round stochastically, or accept the loss with "
            "a lower minimum_survival."
        )


Owner = tuple[str, nn.Module, str]
"""(full name, module, the parameter's name in it)."""


def folded_parameters(
    modules: Mapping[str, AdaptedModule],
    selection: Selection,
    seed: int | None,
    *,
    dtype: torch.dtype | None = None,
    rewrite: bool = False,
) -> Iterator[tuple[Owner, torch.Tensor, FoldedLayer]]:
    """Every parameter that a selection changes, as it is stored once folded in; one at a time, nothing is written.

    Args:
        modules: path -> module, in the model's order.
        selection: adapters and weights.
        seed: round stochastically, drawing from it and each parameter's name; None: to the nearest.
        dtype: of storage; None: each parameter's own.
        rewrite: quantised weights in their own format (`core.folding.fold`).

    Raises:
        AdapterError: as `require_biases`, or an update that cannot be folded in.
    """
    refuse_activated(modules, selection)
    require_biases(modules, selection)
    for path, module in modules.items():
        for owner, update in _updates(path, module, selection):
            name, inner, own_name = owner
            own = inner.get_parameter(own_name).detach()
            generator = None if seed is None else seeded(seed, name, own.device)
            folded = fold(own, update, dtype=dtype, generator=generator, where=name, rewrite=rewrite)
            yield (
                owner,
                folded.weight,
                FoldedLayer(name=name, survived=folded.survived, ratio=folded.ratio, energy=folded.energy),
            )


def changed_parameters(path: str, module: AdaptedModule, selection: Selection) -> list[str]:
    """Full names of the parameters of a module that a selection changes; computes nothing."""
    active = [update for update, _ in module.active_updates(selection)]
    if isinstance(module, AdaptedLayer | AdaptedAttention):
        updates, site = cast("list[LayerUpdate]", active), module.lorakit_site
        of_weight = any(update.lora is not None or update.tokens is not None for update in updates)
        names = [site.weight_name] if site is not None and of_weight else []
        names += [bias_name(module)] if any(update.changes_bias for update in updates) else []
    elif isinstance(module, AdaptedExperts):
        stacked = cast("list[StackedUpdate]", active)
        names = [name for name in weight_names(module) if any(name in update.updates for update in stacked)]
    else:
        names = list(base_parameters(module)) if active else []
    return [f"{path}.{name}" if path else name for name in names]


def _updates(path: str, module: AdaptedModule, selection: Selection) -> Iterator[tuple[Owner, torch.Tensor]]:
    """The dense change of each of a module's own parameters."""

    def full(name: str) -> str:
        return f"{path}.{name}" if path else name

    active = module.active_updates(selection)
    if isinstance(module, AdaptedExperts):
        for name in weight_names(module):
            stacked = cast("list[tuple[StackedUpdate, float]]", active)
            updates = [(cast("LayerUpdate", u.updates[name]), weight) for u, weight in stacked if name in u.updates]
            yield from _layer_updates(full, module, experts_site(module, name), updates)
        return
    if isinstance(module, AdaptedLayer | AdaptedAttention):
        yield from _layer_updates(full, module, module.lorakit_site, cast("list[tuple[LayerUpdate, float]]", active))
        return
    copies = [
        (dict(replacement.copy.named_parameters()), weight)
        for replacement, weight in cast("list[tuple[Replacement, float]]", active)
    ]
    if not copies:
        return
    inside = dict(base_modules(module))
    for name, own in base_parameters(module).items():
        wide = own.detach().to(torch.promote_types(own.dtype, torch.float32))
        inner, _, last = name.rpartition(".")
        change = sum_of((tensors[name].detach() - wide, weight) for tensors, weight in copies)
        yield (full(name), inside[inner], last), change


def _layer_updates(
    full: Callable[[str], str], module: nn.Module, site: Site | None, updates: list[tuple[LayerUpdate, float]]
) -> Iterator[tuple[Owner, torch.Tensor]]:
    """The dense change of one weight and of the layer's bias."""
    changing = [(u, weight) for u, weight in updates if u.lora is not None or u.tokens is not None]
    if changing and site is not None:
        name = site.weight_name
        base_weight_of(module, full(name), name)  # refuses a storage that cannot be written
        own = module.get_parameter(name).detach()
        changes = [(update.lora.dense(site, own), weight) for update, weight in changing if update.lora is not None]
        changes += [(update.tokens.dense(own), weight) for update, weight in changing if update.tokens is not None]
        yield (full(name), module, name), sum_of(changes)
    if any(update.changes_bias for update, _ in updates):
        name = bias_name(module)
        own = module.get_parameter(name).detach()
        wide = own.to(torch.promote_types(own.dtype, torch.float32))
        changes = [(update.bias.detach() - wide, weight) for update, weight in updates if update.bias is not None]
        loras = [(update.lora, weight) for update, weight in updates if update.lora is not None]
        changes += [(lora.bias.detach().float(), lora.s * w) for lora, w in loras if lora.bias is not None]
        yield (full(name), module, name), sum_of(changes)


def sum_of(terms: Iterable[tuple[torch.Tensor, float]]) -> torch.Tensor:
    """The weighted sum of tensors; at least one."""
    total: torch.Tensor | None = None
    for tensor, weight in terms:
        scaled = tensor if weight == 1.0 else tensor * weight
        total = scaled if total is None else total + scaled
    assert total is not None, "called with what is active"
    return total


def preview(
    model: nn.Module, modules: Mapping[str, AdaptedModule], selection: Selection, seed: int | None
) -> FoldReport:
    """What folding would do; every weight is computed and let go again, a quantised one stored in its own format.

    Raises:
        AdapterError: an update cannot be folded in, or is not finite in the dtype of its weight.
    """
    layers, dtypes, names = [], set(), []
    for (name, _, _), stored, layer in folded_parameters(modules, selection, seed, rewrite=True):
        layers.append(layer)
        dtypes.add(format_of(stored) or str(stored.dtype).removeprefix("torch."))
        names.append(name)
    kept = {name for group in staying_tied(model, modules, selection) for name in group}
    shared = shared_parameters(model) - kept
    return FoldReport(
        layers=tuple(layers), dtypes=tuple(sorted(dtypes)), untied=tuple(name for name in names if name in shared)
    )


def shared_parameters(model: nn.Module) -> set[str]:
    """Full names of parameters that are the same tensor under more than one name (tied weights)."""
    return {name for group in _tied(model) for name in group}


def _tied(model: nn.Module) -> list[list[str]]:
    """Groups of full names of one tensor."""
    names: dict[int, list[str]] = {}
    for path, module in base_modules(model):
        for name, parameter in module._parameters.items():
            if parameter is not None:
                names.setdefault(id(parameter), []).append(f"{path}.{name}" if path else name)
    return [group for group in names.values() if len(group) > 1]


def staying_tied(model: nn.Module, modules: Mapping[str, AdaptedModule], selection: Selection) -> list[list[str]]:
    """The groups in which every module's change is the same: rows of an embedding that are its head's too, say."""

    def change(name: str) -> list[tuple[int, ...]]:
        path, _, own_name = name.rpartition(".")
        module = modules.get(path)
        if module is None or own_name != "weight":
            return []
        found: list[tuple[int, ...]] = []
        for update, _ in module.active_updates(selection):
            if isinstance(update, Replacement):
                found.append((id(update.copy._parameters[own_name]),))
            elif isinstance(update, LayerUpdate):
                found.append((0 if update.lora is None else id(update.lora.origin), id(update.tokens)))
        return found

    groups = [(group, [change(name) for name in group]) for group in _tied(model)]
    return [group for group, changes in groups if changes[0] and all(each == changes[0] for each in changes)]


class Exchange:
    """The base's parameters kept aside while folded ones stand in their place."""

    def __init__(self) -> None:
        self._kept: list[tuple[nn.Module, str, nn.Parameter | torch.Tensor]] = []

    def put(self, modules: Mapping[str, AdaptedModule], selection: Selection) -> None:
        """Fold a selection in; where that fails half-way, nothing is changed."""
        try:
            for (_, module, name), stored, _ in folded_parameters(modules, selection, None):
                own = module.get_parameter(name)
                self._kept.append((module, name, own))
                module._parameters[name] = nn.Parameter(stored, requires_grad=own.requires_grad)
            for inner, name, buffer in trained_buffers(modules, selection):
                self._kept.append((inner, name, cast("torch.Tensor", inner._buffers[name])))
                inner._buffers[name] = buffer.clone()
        except BaseException:
            self.back()
            raise

    def back(self) -> None:
        """Put every kept tensor back where it was, the same object."""
        while self._kept:
            module, name, own = self._kept.pop()
            if isinstance(own, nn.Parameter):
                module._parameters[name] = own
            else:
                module._buffers[name] = own


def fold_in(model: nn.Module, modules: Mapping[str, AdaptedModule], selection: Selection, seed: int | None) -> None:
    """Write a selection into the parameters for good, one at a time; `preview` has said that all can be.

    A parameter shared with another module is given to its adapted module alone first, and the config of a transformers
    model is told that its embeddings are tied no more; unless all that share it change alike.
    """
    staying = staying_tied(model, modules, selection)
    again = {name for group in staying for name in group[1:]}
    shared = shared_parameters(model) - {name for group in staying for name in group}
    untied = False
    for (name, module, own_name), stored, _ in folded_parameters(modules, selection, seed):
        own = module.get_parameter(own_name)
        if name in again:
            continue
        if name in shared:
            module._parameters[own_name] = nn.Parameter(stored, requires_grad=own.requires_grad)
            untied = True
        else:
            with torch.no_grad():
                own.copy_(stored)
    for inner, name, buffer in trained_buffers(modules, selection):
        cast("torch.Tensor", inner._buffers[name]).copy_(buffer)
    config = getattr(model, "config", None)
    if untied and getattr(config, "tie_word_embeddings", False):
        config.tie_word_embeddings = False  # type: ignore[union-attr]


def trained_buffers(
    modules: Mapping[str, AdaptedModule], selection: Selection
) -> Iterator[tuple[nn.Module, str, torch.Tensor]]:
    """Buffers (a batch norm's statistics) that a whole trained module brings along: those of the first that is
    active.
    """
    for module in modules.values():
        if not isinstance(module, ReplacedModule):
            continue
        active = cast("list[tuple[Replacement, float]]", module.active_updates(selection))
        if active:
            inside = dict(base_modules(module))
            for name, buffer in active[0][0].copy.named_buffers():
                path, _, last = name.rpartition(".")
                yield inside[path], last, buffer.detach()


def require_active(selection: Selection) -> None:
    """Refuse to fold in nothing.

    Raises:
        AdapterError: no adapter is active.
    """
    if not selection.weights:
        raise AdapterError("no adapter is active, so there is nothing to merge; activate one first")


def require_dense(modules: Mapping[str, AdaptedModule], selection: Selection) -> None:
    """Refuse to write an update into quantised weights.

    Raises:
        AdapterError: one would be changed; says how much of the update would survive it, where that can be told.
    """
    quantised = {}
    for path, module in modules.items():
        for name in changed_parameters(path, module, selection):
            inner, _, own_name = name[len(path) + 1 if path else 0 :].rpartition(".")
            parameter = module.get_submodule(inner)._parameters.get(own_name)  # None: `require_biases` says so
            if parameter is not None and (stored := format_of(parameter)) is not None:
                quantised[name] = stored
    if not quantised:
        return
    try:
        layers = [layer for _, _, layer in folded_parameters(modules, selection, None, rewrite=True)]
        report = FoldReport(layers=tuple(layers), dtypes=(), untied=())
        survived = f"of the update {report.survived:.1%} would survive in them"
    except AdapterError as error:  # a format that is only read
        survived = f"how much would survive in them cannot be told ({error})"
    raise AdapterError(
        f"{len(quantised)} of the weights to change are quantised ({', '.join(sorted({*quantised.values()}))}); "
        f"{survived}. Ways out: {WAYS_OUT}"
    )


def refuse_activated(modules: Mapping[str, AdaptedModule], selection: Selection) -> None:
    """Refuse to fold in what counts for some tokens alone.

    Raises:
        AdapterError: it does.
    """
    for module in modules.values():
        for update, _ in module.active_updates(selection):
            if isinstance(update, LayerUpdate) and isinstance(update.lora, ActivatedLoRA):
                raise AdapterError(
                    "cannot be merged: an activated adapter (aLoRA) counts from its invocation "
                    f"{list(update.lora.invocation.tokens)} on alone, which no weights do; keep it unmerged"
                )


def require_biases(modules: Mapping[str, AdaptedModule], selection: Selection) -> None:
    """Refuse to fold in a bias of B (`lora_bias`) where the layer has none to take it.

    Raises:
        AdapterError: with every such layer.
    """
    lacking = []
    for path, module in modules.items():
        if isinstance(module, AdaptedLayer) and module._parameters.get(bias_name(module)) is None:
            updates = cast("list[tuple[LayerUpdate, float]]", module.active_updates(selection))
            lacking += [path] if any(update.changes_bias for update, _ in updates) else []
    if lacking:
        raise AdapterError(
            "cannot be merged: the adapter gives these layers a bias (lora_bias), and they have none of their own to "
            f"take it:\n{bullet_list(lacking)}\nKeep the adapter unmerged, or, with the model in memory, give them one "
            "of zeros first: layer.bias = torch.nn.Parameter(torch.zeros(outputs))."
        )
