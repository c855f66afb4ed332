"""Modules of which parameters are targeted by name, as PEFT shows them: one `ParamWrapper` around another for each
parameter, the last one outermost.

In the model there is one module, the adapted one, which is the outermost wrapper; those inside are views of it.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, cast

from torch import nn

from lorakit.compat.peft.layers import BaseTunerLayer
from lorakit.compat.peft.lora_layers import FACTORS, LoraLayer
from lorakit.core.deltas import LayerUpdate, LoRA, Replacement, StackedUpdate
from lorakit.core.experts import AdaptedExperts, experts_site, weight_names
from lorakit.core.layer import adapted_class
from lorakit.core.sites import Site


class _StackWidth:
    """Width of one matrix's input or output, for modules that have no attribute of that name of their own."""

    def __init__(self, letter: str) -> None:
        self._letter = letter

    def __get__(self, layer: Any, owner: Any = None) -> int:
        if layer is None:
            raise AttributeError("in_features and out_features are a layer's")
        A, B = layer.lorakit_site.shapes(layer, 1, "")
        return int(A[-1] if self._letter == "A" else B[1])


class ParamWrapper(LoraLayer):
    """What is adapted of one parameter, with PEFT's attributes.

    Attributes:
        lorakit_depth: how many wrappers are around this one.
    """

    in_features = _StackWidth("A")
    out_features = _StackWidth("B")
    lorakit_depth = 0

    def targeted(self) -> list[str]:
        """The module's parameters that have updates, in its order."""
        updates = cast("list[StackedUpdate]", list(self.lorakit_updates.values()))
        return [name for name in weight_names(self) if any(name in update.updates for update in updates)]

    @property
    def parameter_name(self) -> str:
        """The parameter this wrapper is for."""
        return self.targeted()[-1 - self.lorakit_depth]

    @property
    def lorakit_site(self) -> Site | None:  # type: ignore[override]  # an attribute there
        """How the parameter multiplies."""
        return experts_site(self, self.parameter_name)

    def wrappers(self) -> list[ParamWrapper]:
        """This one and those inside, from the outermost."""
        return [self, *(self._inner(depth) for depth in range(self.lorakit_depth + 1, len(self.targeted())))]

    def _inner(self, depth: int) -> InnerParamWrapper:
        view = cast("InnerParamWrapper", object.__new__(adapted_class(InnerParamWrapper, type(self).__bases__[1])))
        own_views = self.__dict__.setdefault("lorakit_inner_views", {}).setdefault(depth, {})
        view.__dict__.update({**self.__dict__, "lorakit_depth": depth, "lorakit_views": own_views})
        return view

    def updates(self) -> dict[str, LayerUpdate | Replacement]:
        """Adapter name -> its update of the parameter."""
        name, here = self.parameter_name, BaseTunerLayer.here(self)
        stacked = {adapter: cast("StackedUpdate", update).updates for adapter, update in here.items()}
        return {adapter: cast("LayerUpdate", own[name]) for adapter, own in stacked.items() if name in own}

    def loras(self) -> dict[str, LoRA]:
        """Adapter name -> its low-rank update of the parameter."""
        if "lorakit_state" not in self.__dict__:  # the module is its old self again, and somebody kept a view
            return {}
        held = {adapter: cast("LayerUpdate", update).lora for adapter, update in self.updates().items()}
        return {adapter: lora for adapter, lora in held.items() if lora is not None}

    @property
    def base_layer(self) -> nn.Module:
        """The next wrapper, or the module without adapters."""
        inside = self.wrappers()[1:]
        return inside[0] if inside else self.as_base()

    def get_base_layer(self) -> nn.Module:
        """The module without adapters."""
        return self.as_base()

    def parts(self) -> Iterator[tuple[str, nn.Module]]:
        """`base_layer`, then the factors."""
        yield "base_layer", self.base_layer
        for name in ("lora_dropout", *FACTORS):
            yield name, getattr(self, name)

    def _trained_bias(self) -> None:
        return None

    def __repr__(self) -> str:
        return self._repr("ParamWrapper", f"parameter_name={self.parameter_name!r},")


class InnerParamWrapper(ParamWrapper):
    """A wrapper inside another; its forward is the module's own."""


class LoraExperts(ParamWrapper, AdaptedExperts):
    """A module with updated parameters, as the wrapper of the last of them."""

    def base_prefix(self) -> str:
        """Where the module's own tensors are."""
        return "base_layer." * len(self.targeted())

    def key_map(self) -> Iterator[tuple[str, str]]:
        """(PEFT's, our) tensor names."""
        for name in self._parameters:
            yield self.base_prefix() + name, name
        slots = {name: slot for slot, name in self.lorakit_state.names.items()}
        for depth, wrapper in enumerate(self.wrappers()):
            for adapter, lora in wrapper.loras().items():
                ours = f"lorakit_updates.{slots[adapter]}.updates.{wrapper.parameter_name}.lora"
                for theirs, name in self._factor_keys(lora, adapter):
                    yield "base_layer." * depth + theirs, f"{ours}.{name}"

    def forget(self, adapter: str) -> None:
        """Take an adapter out of containers that somebody may hold."""
        super().forget(adapter)
        for wrapper in self.wrappers()[1:]:
            wrapper.forget(adapter)
