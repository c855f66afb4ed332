"""Adapted layers as PEFT shows them: what all of them have in common, and PEFT's names in `named_parameters()` and
`state_dict()`.

lorakit's layer stays the object it was. These classes are what the facade gives it for its class, in place of
`AdaptedLayer`; they compute nothing, and every attribute is read from lorakit's own objects.
"""

from __future__ import annotations

import warnings
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, cast

from torch import nn

from lorakit.compat.peft import views
from lorakit.core.active import ActiveState, Route, Selection
from lorakit.core.deltas import LayerUpdate, Replacement
from lorakit.core.layer import AdaptedModule


class PeftState(ActiveState):
    """What all layers of a model share, and what PEFT's layers know besides.

    Attributes:
        names: slot -> adapter name.
        chosen: active adapters, whether they are switched off or not.
        off: all adapters are switched off (`disable_adapter_layers`).
        merged: adapters folded into the weights, in the order of merging.
        unfold: takes merged adapters out of the weights.
        rslora: names of adapters whose scale is alpha / sqrt(r).
    """

    def __init__(self) -> None:
        super().__init__()
        self.names: dict[str, str] = {}
        self.chosen: tuple[str, ...] = ()
        self.off = False
        self.merged: tuple[str, ...] = ()
        self.rslora: set[str] = set()
        self.unfold: Callable[[], None] = _nothing


def _nothing() -> None:
    """Until a handle has the state."""


class BaseTunerLayer(AdaptedModule):
    """What PEFT's layers have in common: which adapters are here, active, merged, switched off."""

    lorakit_state: PeftState
    adapter_layer_names: tuple[str, ...] = ()
    other_param_names: tuple[str, ...] = ()

    def parts(self) -> Iterator[tuple[str, nn.Module]]:
        """What PEFT has as submodules here, by PEFT's names."""
        raise NotImplementedError

    def key_map(self) -> Iterator[tuple[str, str]]:
        """(PEFT's, our) name of every tensor in this module, relative to it; ours is empty where another holds it."""
        raise NotImplementedError

    def base_prefix(self) -> str:
        """Where PEFT has the module's own tensors, relative to it."""
        return "base_layer."

    def here(self) -> dict[str, nn.Module]:
        """Adapter name -> what it changes here, oldest first."""
        if "lorakit_state" not in self.__dict__:  # the layer is its old self again, and somebody kept a view
            return {}
        names = self.lorakit_state.names
        return {names[slot]: update for slot, update in self.lorakit_updates.items() if slot in names}

    def updates(self) -> dict[str, LayerUpdate | Replacement]:
        """Adapter name -> what it changes here and can train."""
        return cast("dict[str, LayerUpdate | Replacement]", BaseTunerLayer.here(self))

    def _all_available_adapter_names(self) -> list[str]:
        return sorted(self.here())

    def view(self, name: str, content: Mapping[str, nn.Module]) -> views.ByName:
        """The container called `name`, one object as long as the layer is adapted, with what is here now."""
        found: views.ByName = self._container(name, views.ByName)
        found.show(content)
        return found

    def _container(self, name: str, kind: type[Any]) -> Any:
        containers = self.__dict__.setdefault("lorakit_views", {})
        if name not in containers:
            containers[name] = kind()
        return containers[name]

    def forget(self, adapter: str) -> None:
        """Take an adapter out of containers that somebody may hold."""
        for container in self.__dict__.get("lorakit_views", {}).values():
            container.show({name: part for name, part in container.items() if name != adapter})

    # ------------------------------------------------------------ which are active

    def active_updates(self, selection: Selection) -> list[tuple[nn.Module, float]]:
        """As the parent's; where this layer has a choice of its own, that counts in place of the model's."""
        differs = "lorakit_chosen" in self.__dict__ or "lorakit_off" in self.__dict__
        if differs and selection is self.lorakit_state.everywhere:
            names = () if self.disable_adapters else self.active_adapters
            return [(update, 1.0) for name, update in BaseTunerLayer.here(self).items() if name in names]
        return super().active_updates(selection)

    @property
    def active_adapters(self) -> list[str]:
        """Active adapters: this layer's own choice, or the model's (of those here too)."""
        return list(self.__dict__.get("lorakit_chosen", self.lorakit_state.chosen))

    @property
    def active_adapter(self) -> str | list[str]:
        """The active adapter, or their list."""
        names = self.active_adapters
        return names[0] if len(names) == 1 else names

    @property
    def _active_adapter(self) -> str | list[str]:
        return self.active_adapter

    @_active_adapter.setter
    def _active_adapter(self, names: str | Sequence[str]) -> None:
        self.__dict__["lorakit_chosen"] = (names,) if isinstance(names, str) else tuple(names)

    def set_adapter(self, adapter_names: str | Sequence[str], inference_mode: bool = False) -> None:
        """Use these adapters in this layer, until the model's are set; here they can be trained (unless
        `inference_mode`), and no others. Merged adapters are unmerged first.
        """
        if self.merged:
            warnings.warn("Adapter cannot be set when the model is merged. Unmerging the model first.", stacklevel=2)
            self.lorakit_state.unfold()
        self._active_adapter = adapter_names
        self._train_active(inference_mode=inference_mode)

    def enable_adapters(self, enabled: bool) -> None:
        """Switch the adapters of this layer on or off, until the model's are switched."""
        self.__dict__["lorakit_off"] = not enabled
        self._train_active(inference_mode=not enabled)

    def _train_active(self, *, inference_mode: bool) -> None:
        for name, update in BaseTunerLayer.here(self).items():
            update.requires_grad_(not inference_mode and name in self.active_adapters)

    @property
    def disable_adapters(self) -> bool:
        """Whether adapters are switched off, in this layer, for all or for this thread."""
        state = self.lorakit_state
        off = self.__dict__.get("lorakit_off", state.off)
        return off or (state.in_block and not state.folded and not _routed(state))

    @property
    def merged_adapters(self) -> list[str]:
        """Adapters folded into this layer's weight."""
        here = self.here()
        return [name for name in self.lorakit_state.merged if name in here]

    @property
    def merged(self) -> bool:
        """Whether any adapter is folded into this layer's weight."""
        return bool(self.merged_adapters)

    @property
    def base_layer(self) -> nn.Module:
        """The layer without adapters: its own class, sharing parameters, buffers and hooks with it."""
        return self.as_base()

    def get_base_layer(self) -> nn.Module:
        """`base_layer`."""
        return self.base_layer

    # ------------------------------------------------------------ PEFT's names wherever torch asks for names

    def named_modules(
        self, memo: set[nn.Module] | None = None, prefix: str = "", remove_duplicate: bool = True
    ) -> Iterator[tuple[str, nn.Module]]:
        """As torch's, with PEFT's submodules in place of ours."""
        memo = set() if memo is None else memo
        if self in memo:
            return
        memo.add(self)
        yielded = False
        for name, part in self.parts():
            path = f"{prefix}.{name}" if prefix and name else prefix or name
            if name and not yielded and name not in ("base_layer", "original_module", "token_adapter"):
                yielded = True
                yield prefix, self
            # the base comes before the layer itself: the name under which a parameter is met first is the one it has
            yield from part.named_modules(memo, path, remove_duplicate)
        if not yielded:
            yield prefix, self

    def named_parameters(
        self, prefix: str = "", recurse: bool = True, remove_duplicate: bool = True
    ) -> Iterator[tuple[str, nn.Parameter]]:
        """As torch's. Where all names of parameters are asked for, module by module (FSDP does), a wrapped layer has
        none of its own: they are in what it wraps.
        """
        if recurse or remove_duplicate or any(not name for name, _ in self.parts()):
            yield from super().named_parameters(prefix, recurse, remove_duplicate)

    def state_dict(self, *args: Any, destination: Any = None, prefix: str = "", keep_vars: bool = False) -> Any:
        """As torch's, under PEFT's names."""
        if destination is None:
            destination = OrderedDict()
            destination._metadata = OrderedDict()
        for name, part in self.parts():
            part.state_dict(destination=destination, prefix=f"{prefix}{name}." if name else prefix, keep_vars=keep_vars)
        return destination

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        for theirs, ours in list(self.key_map()):
            if prefix + theirs in state_dict:
                tensor = state_dict.pop(prefix + theirs)
                if ours:
                    state_dict[prefix + ours] = tensor
        for child in self._modules:
            inside = f"{prefix}{self.base_prefix()}{child}."
            for key in [key for key in state_dict if key.startswith(inside)]:
                state_dict[f"{prefix}{child}.{key.removeprefix(inside)}"] = state_dict.pop(key)
        super()._load_from_state_dict(state_dict, prefix, *args)


def _routed(state: PeftState) -> bool:
    return isinstance(state.current(), Route)
