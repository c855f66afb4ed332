"""The adapted layer: one that adds, in its forward pass, what the active adapters hold for it.

Attaching changes a layer's class to a subclass made here and back on detaching: the layer stays the same object, its
weight stays where it is, and whoever asks `isinstance(layer, nn.Linear)` or reads `layer.weight` notices nothing.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, ClassVar, cast

import torch
from torch import nn

from lorakit.core import kernels, products
from lorakit.core.activated import of_rows
from lorakit.core.active import ActiveState, Route, Rows, Selection
from lorakit.core.deltas import LayerUpdate, Replacement, call_replaced
from lorakit.core.int8 import Int8Weight
from lorakit.core.routed import add_stacked, stackable
from lorakit.core.shared import SharedInput
from lorakit.core.sites import Site
from lorakit.errors import AdapterError


class AdaptedModule(nn.Module):
    """What adapted layers and replaced modules share. Never instantiated: a module is given a subclass of this as its
    class. `AdaptedAttention` and `AdaptedExperts` have files of their own.

    Attributes:
        lorakit_updates: slot -> what that adapter changes here.
        lorakit_state: the model's ActiveState.
        lorakit_batch_dim: the dimension along which the rows of a batch run in its input.
    """

    lorakit_updates: nn.ModuleDict
    lorakit_state: ActiveState
    lorakit_batch_dim: int = 0
    lorakit_verb = "Adapted"  # begins the name of the class made of this one

    def active_updates(self, selection: Selection) -> list[tuple[nn.Module, float]]:
        """What of a selection is here: (update, weight) in the order of activation."""
        updates = self.lorakit_updates
        return [(updates[slot], weight) for slot, weight in selection.weights if slot in updates]

    def routed_updates(self, route: Route, x: torch.Tensor) -> list[tuple[nn.Module, Rows]]:
        """What of a route is here, each with the places of its rows in this module's input."""
        updates = self.lorakit_updates
        return [(updates[slot], rows) for slot, rows in route.places(x, type(self).__name__).items() if slot in updates]

    def as_base(self, **replaced: torch.Tensor) -> nn.Module:
        """This module as if nothing were adapted: a module of its own class that shares its parameters, buffers and
        hooks; `replaced` parameters stand in place of its own.
        """
        base = type(self).__bases__[1]
        view = cast("nn.Module", object.__new__(base))
        view.__dict__.update({k: v for k, v in self.__dict__.items() if not k.startswith("lorakit_")})
        view.__dict__["_modules"] = {k: v for k, v in self._modules.items() if k != "lorakit_updates"}
        if replaced:
            view.__dict__["_parameters"] = {**self._parameters, **replaced}
        return view

    def __reduce_ex__(self, protocol: Any) -> Any:
        # The generated class has no importable name: copy and pickle remake it from its two parents.
        mixin, base = type(self).__bases__
        return _remake, (mixin, base), self.__dict__


class AdaptedLayer(AdaptedModule):
    """A layer that multiplies, with the low-rank updates and biases of any number of adapters.

    Attributes:
        lorakit_site: how the layer multiplies; None where only its bias is trained.
        lorakit_shared: the layers that are given the same input, while they compute together.
        lorakit_int8: its weight in integers, by which it multiplies while it trains (`core.products`).
    """

    lorakit_site: Site | None
    lorakit_shared: SharedInput | None = None
    lorakit_int8: Int8Weight | None = None

    def forward(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        """The base's output plus, for each active adapter with weight w: w s (B A x + c), c the bias of B if it
        has one, and w (bias - base bias).
        """
        selection = self.lorakit_state.current()
        if isinstance(selection, Route):
            return self._routed(selection, x, *args, **kwargs)
        active = cast("list[tuple[LayerUpdate, float]]", self.active_updates(selection))
        if not active:
            return super().forward(x, *args, **kwargs)  # type: ignore[no-any-return]
        if not args and not kwargs:
            if self.lorakit_shared is not None and torch.is_grad_enabled():
                shared = self.lorakit_shared.output(self, x, selection)
                if shared is not None:
                    return shared
            fused = self._fused(active, x)
            if fused is not None:
                return kernels.lora_linear(x, fused)
        base = self._own(x, *args, **kwargs)
        y = base
        for update, weight in active:
            for change in self._changes(update, x, base):
                y = y + (change if weight == 1.0 else change * weight)
        return y

    def fusable(self, selection: Selection, x: torch.Tensor) -> kernels.LoRAOperands | None:
        """What the layer's whole forward for `x` is, if that is base and one low-rank update in one node; else None."""
        return self._fused(cast("list[tuple[LayerUpdate, float]]", self.active_updates(selection)), x)

    def _fused(self, active: Sequence[tuple[LayerUpdate, float]], x: torch.Tensor) -> kernels.LoRAOperands | None:
        if len(active) != 1 or self.lorakit_site is None:
            return None
        ((update, weight),) = active
        lora = update.low_rank_alone
        operands = None if lora is None else lora.fused(self.lorakit_site, self, x, weight)
        return operands if operands is None or not self.training else operands._replace(copy=self.lorakit_int8)

    def _own(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        """The base's output, where updates are added to it."""
        if self.lorakit_int8 is None or not self.training:
            return super().forward(x, *args, **kwargs)  # type: ignore[no-any-return]
        assert self.lorakit_site is not None
        assert not args, "layers that multiply by a matrix take nothing more"
        assert not kwargs
        weight = self.lorakit_site.rows(self.get_parameter(self.lorakit_site.weight_name))
        return products.frozen_linear(x, weight, self._parameters["bias"], self.lorakit_int8)

    def _routed(self, route: Route, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        """The base's output plus, at the rows of each adapter, what that adapter adds for them."""
        if self.lorakit_batch_dim == 1:
            with_rows_first = x.transpose(0, 1).contiguous()
            return self._rows_first(route, with_rows_first, *args, **kwargs).transpose(0, 1)
        return self._rows_first(route, x, *args, **kwargs)

    def _rows_first(self, route: Route, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        routed = cast("list[tuple[LayerUpdate, Rows]]", self.routed_updates(route, x))
        y: torch.Tensor = super().forward(x, *args, **kwargs)
        if stackable(self.lorakit_site, routed, route, x):
            add_stacked(route, self, routed, x, y)
            return y
        for update, rows in routed:
            # added to in place below, where a gradient may need what it was
            own = y[rows].clone() if torch.is_grad_enabled() else y[rows]
            with of_rows(update.lora, rows, len(x)):
                changes = list(self._changes(update, x[rows], own))
            for change in changes:
                if isinstance(rows, slice):
                    y.narrow(0, rows.start, rows.stop - rows.start).add_(change)
                else:
                    y.index_add_(0, rows, change.expand(len(rows), *y.shape[1:]))
        return y

    def _changes(self, update: LayerUpdate, x: torch.Tensor, y: torch.Tensor) -> Iterator[torch.Tensor]:
        """What one adapter adds to `y`, the base's output for input `x`, in its dtype."""
        if update.lora is not None and self.lorakit_site is not None:
            yield update.lora(self.lorakit_site, self, x, y)
        if update.bias is not None:
            own: torch.Tensor = self.get_parameter("bias")
            yield self._along_output(update.bias - own.float(), y)
        if update.tokens is not None and self.lorakit_site is not None:
            yield update.tokens(self.lorakit_site, self, x, y)

    def _along_output(self, bias: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        """A (out,) bias shaped and typed to be added to `y`."""
        dim = bias_dim(self, self.lorakit_site)
        assert dim is not None, "find_targets refuses a layer whose bias has no known dimension"
        shape = [1] * y.ndim
        shape[dim] = -1
        return bias.view(shape).to(y.dtype)


class ReplacedModule(AdaptedModule):
    """A module of which adapters hold whole trained copies (`modules_to_save`).

    Attributes:
        container: the class for modules whose forward runs over their children.
    """

    container: ClassVar[type[ReplacedModule]]

    lorakit_verb = "Replaced"

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The base, or the module with the parameters that the active copies make; on a route, each row by its own."""
        selection = self.lorakit_state.current()
        if isinstance(selection, Route):
            return self._routed(selection, *args, **kwargs)
        active = cast("list[tuple[Replacement, float]]", self.active_updates(selection))
        if not active:
            return super().forward(*args, **kwargs)
        return call_replaced(base_parameters(self), active, *args, **kwargs)

    def _routed(self, route: Route, *args: Any, **kwargs: Any) -> Any:
        if self.lorakit_batch_dim != 0:
            raise AdapterError(f"{type(self).__name__} is given sequences first, so it cannot be routed row by row")
        y = super().forward(*args, **kwargs)
        inputs = [value for value in (*args, *kwargs.values()) if isinstance(value, torch.Tensor) and value.ndim]
        routed = cast("list[tuple[Replacement, Rows]]", self.routed_updates(route, inputs[0]))
        if routed and not isinstance(y, torch.Tensor):
            raise AdapterError(f"{type(self).__name__} returns {type(y).__name__}, which cannot be routed row by row")
        size = inputs[0].shape[0]
        for replacement, rows in routed:

            def own(value: Any, rows: Rows = rows) -> Any:
                in_rows = isinstance(value, torch.Tensor) and value.ndim and value.shape[0] == size
                return value[rows] if in_rows else value

            part = call_replaced(
                base_parameters(self), [(replacement, 1.0)], *map(own, args), **{k: own(v) for k, v in kwargs.items()}
            )
            y = y.clone()  # the module may have returned its input
            y[rows] = part
        return y


class ReplacedContainer(ReplacedModule):
    """A replaced `nn.Sequential` or the like: its forward runs over its children, and what adapters hold is none."""

    def __iter__(self) -> Iterator[nn.Module]:
        return iter([child for name, child in self._modules.items() if name != "lorakit_updates" and child is not None])

    def __len__(self) -> int:
        return len(self._modules) - 1


ReplacedModule.container = ReplacedContainer


def base_modules(model: nn.Module, path: str = "") -> Iterator[tuple[str, nn.Module]]:
    """A model's own modules by path, each once, as `named_modules` gives them, without what adapters hold.

    Walks past adapters instead of leaving them out afterwards: with hundreds resident they outnumber the model.
    """
    seen: set[int] = set()

    def walk(module: nn.Module, path: str) -> Iterator[tuple[str, nn.Module]]:
        if id(module) in seen:
            return
        seen.add(id(module))
        yield path, module
        for name, child in module._modules.items():
            if child is not None and name != "lorakit_updates":
                yield from walk(child, f"{path}.{name}" if path else name)

    return walk(model, path)


def base_parameters(module: nn.Module) -> dict[str, nn.Parameter]:
    """A module's parameters by name, each once, without what adapters hold in it or below it."""
    seen: set[int] = set()
    found = {}
    for path, inner in base_modules(module):
        for name, parameter in inner._parameters.items():
            if parameter is not None and id(parameter) not in seen:
                seen.add(id(parameter))
                found[f"{path}.{name}" if path else name] = parameter
    return found


_CHANNELS_FIRST = (nn.modules.conv._ConvNd, nn.modules.batchnorm._BatchNorm, nn.GroupNorm)
_LAST_DIM = (nn.Linear, nn.LayerNorm, nn.MultiheadAttention)


def bias_dim(layer: nn.Module, site: Site | None) -> int | None:
    """The dimension of the output along which the layer adds its bias; None where that is unknown."""
    if site is not None:
        return site.bias_dim
    if isinstance(layer, _CHANNELS_FIRST):
        return 1
    return -1 if isinstance(layer, _LAST_DIM) else None


def bias_name(layer: nn.Module) -> str:
    """What the layer calls its bias."""
    return "in_proj_bias" if isinstance(layer, nn.MultiheadAttention) else "bias"


_TORCH_TRANSFORMERS = (nn.Transformer, nn.TransformerEncoder, nn.TransformerDecoder)
_TORCH_BLOCKS = (nn.TransformerEncoderLayer, nn.TransformerDecoderLayer)


def batch_dim(module: nn.Module) -> int:
    """The dimension along which the rows of a batch run in what a module is given: 1 for torch's transformers and their
    layers unless they are `batch_first`.
    """
    if not isinstance(module, (*_TORCH_TRANSFORMERS, *_TORCH_BLOCKS, nn.MultiheadAttention)):
        return 0
    attention = next(inner for inner in module.modules() if isinstance(inner, nn.MultiheadAttention))
    return 0 if attention.batch_first else 1


def batch_dim_inside(parent: nn.Module | None) -> int:
    """The same for the layers right inside a module: torch's blocks hand on what they are given."""
    return batch_dim(parent) if isinstance(parent, _TORCH_BLOCKS) else 0


_subclasses: dict[tuple[type, type], type[AdaptedModule]] = {}


def adapted_class(mixin: type[AdaptedModule], base: type[nn.Module]) -> type[AdaptedModule]:
    """The one subclass of both."""
    if (mixin, base) in _subclasses:
        return _subclasses[mixin, base]
    name = f"{mixin.lorakit_verb}{base.__name__}"
    made = type(name, (mixin, base), {"__module__": base.__module__, "__doc__": base.__doc__})
    return _subclasses.setdefault((mixin, base), made)


def _remake(mixin: type[AdaptedModule], base: type[nn.Module]) -> AdaptedModule:
    cls = adapted_class(mixin, base)
    return cls.__new__(cls)


def adapt(module: nn.Module, mixin: type[AdaptedModule], state: ActiveState) -> AdaptedModule:
    """Give `module` the class that reads updates (if it has it not yet) and return it, the same object."""
    if isinstance(module, AdaptedModule):
        assert isinstance(module, mixin), "a module is adapted or replaced, never both"
        return module
    if issubclass(mixin, ReplacedModule) and hasattr(module, "__iter__"):
        mixin = mixin.container
    module.__class__ = adapted_class(mixin, type(module))
    adapted = cast("AdaptedModule", module)
    adapted.lorakit_updates = nn.ModuleDict()
    adapted.lorakit_state = state
    return adapted


def restore(module: AdaptedModule) -> nn.Module:
    """Give a module its own class back; nothing of lorakit stays in it."""
    del module.lorakit_updates
    for name in [name for name in module.__dict__ if name.startswith("lorakit_")]:
        del module.__dict__[name]
    module.__class__ = type(module).__bases__[1]
    return module


# torch's encoder computes in eval mode from its layers' weights, past their forward(); with these set it calls them.
_UNFUSED = {
    nn.TransformerEncoder: ("use_nested_tensor", False),
    nn.TransformerEncoderLayer: ("activation_relu_or_gelu", 0),
}


def unfuse(model: nn.Module) -> list[tuple[nn.Module, str, Any]]:
    """Make modules that would read an adapted layer's weight without calling the layer call it.

    Returns:
        What `fuse_again` needs.
    """
    found = []
    for module in model.modules():
        for kind, (attribute, value) in _UNFUSED.items():
            if isinstance(module, kind):
                found.append((module, attribute, getattr(module, attribute)))
                setattr(module, attribute, value)
    return found


def fuse_again(changed: list[tuple[nn.Module, str, Any]]) -> None:
    """Undo `unfuse`."""
    for module, attribute, value in changed:
        setattr(module, attribute, value)
