"""What is adapted, as PEFT shows it: `LoraLayer` and `ModulesToSaveWrapper`, whose attributes are lorakit's own objects
under PEFT's names.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, ClassVar, cast

import torch
from torch import nn

from lorakit.compat.peft import views
from lorakit.compat.peft.errors import PeftValueError, UnsupportedError
from lorakit.compat.peft.layers import BaseTunerLayer
from lorakit.compat.peft.stacked import parameter_name
from lorakit.core import lowrank
from lorakit.core.attention import AdaptedAttention
from lorakit.core.deltas import LayerUpdate, LoRA, Replacement
from lorakit.core.dora import DoRA
from lorakit.core.layer import AdaptedLayer, ReplacedContainer, ReplacedModule, bias_name
from lorakit.core.sites import Site, TransposedLinearSite

FACTORS = ("lora_A", "lora_B", "lora_embedding_A", "lora_embedding_B", "lora_magnitude_vector")


def _refuse_sharded(shown: Any, own: nn.Parameter) -> None:
    """FSDP version 1 gives the views parameters that no layer computes with.

    Raises:
        UnsupportedError: it did, and the model is not the only one: its copies would go apart.
    """
    if shown is own or not hasattr(shown, "_fsdp_flattened"):
        return
    if torch.distributed.get_world_size() > 1:
        raise UnsupportedError(
            "FSDP version 1 does not reach the adapters' parameters; use fully_shard (FSDP2) or DistributedDataParallel"
        )


class LoraLayer(BaseTunerLayer):
    """What a layer with low-rank updates has of PEFT's attributes."""

    lorakit_site: Site | None

    in_features = views.Width(1)
    out_features = views.Width(0)
    adapter_layer_names = FACTORS
    other_param_names = ("r", "lora_alpha", "scaling", "lora_dropout")

    def loras(self) -> dict[str, LoRA]:
        """Adapter name -> its low-rank update of this layer."""
        found = {name: cast("LayerUpdate", update).lora for name, update in BaseTunerLayer.here(self).items()}
        return {name: lora for name, lora in found.items() if lora is not None}

    def parts(self) -> Iterator[tuple[str, nn.Module]]:
        """`base_layer`, then the factors; a layer of which only the bias is trained has no parts but itself."""
        if not self.loras():
            yield "", self._with_trained_bias()
            return
        yield "base_layer", self._with_trained_bias()
        for name in ("lora_dropout", *FACTORS):
            yield name, getattr(self, name)

    def key_map(self) -> Iterator[tuple[str, str]]:
        """(PEFT's, our) tensor names."""
        base = self.bias_key().removesuffix(bias_name(self))
        trained = self._trained_bias()
        for name in self._parameters:
            slot = trained[0] if name == bias_name(self) and trained else None
            yield base + name, name if slot is None else f"lorakit_updates.{slot}.bias"
        names = self.lorakit_state.names
        for slot, update in self.lorakit_updates.items():
            lora = cast("LayerUpdate", update).lora
            if lora is not None and slot in names:
                for theirs, ours in self._factor_keys(lora, names[slot]):
                    yield theirs, f"lorakit_updates.{slot}.lora.{ours}" if lora.origin is lora else ""

    def _is_lookup(self) -> bool:
        return self.lorakit_site is not None and self.lorakit_site.kind == "embedding"

    def _factor_keys(self, lora: LoRA, name: str) -> Iterator[tuple[str, str]]:
        """(PEFT's, our) name of each tensor of adapter `name`'s update here."""
        for letter in "AB":
            theirs = f"lora_embedding_{letter}.{name}" if self._is_lookup() else f"lora_{letter}.{name}.weight"
            yield theirs, parameter_name(lora, letter)
        if lora.bias is not None:
            yield f"lora_B.{name}.bias", "bias"
        if isinstance(lora, DoRA):
            yield f"lora_magnitude_vector.{name}.weight", "magnitude"

    def _trained_bias(self) -> tuple[str, nn.Parameter] | None:
        """(slot, the bias an adapter trains here); PEFT allows one such adapter a model."""
        for slot, update in self.lorakit_updates.items():
            bias = cast("LayerUpdate", update).bias
            if bias is not None:
                return slot, bias
        return None

    def bias_key(self) -> str:
        """Where PEFT has the bias that is trained here."""
        return ("base_layer." if self.loras() or isinstance(self, LoraAttention) else "") + bias_name(self)

    def _with_trained_bias(self) -> nn.Module:
        trained = self._trained_bias()
        return self.as_base() if trained is None else self.as_base(**{bias_name(self): trained[1]})

    def _factors(self, letter: str) -> views.ByName:
        """A or B by adapter name; each view is made once and follows its LoRA."""
        name = f"lora_{letter}"
        before = dict(self.__dict__.get("lorakit_views", {}).get(name, {}).items())
        found = {}
        for adapter, lora in ({} if self._is_lookup() else self.loras()).items():
            view = before.get(adapter)
            if view is None or view.source[0] is not lora:
                view = views.factor(lora, letter, self)
            if lora.origin is lora:
                own = getattr(lora, parameter_name(lora, letter))
                _refuse_sharded(view._parameters["weight"], own)
                view._parameters["weight"] = own
                view._parameters["bias"] = lora.bias if letter == "B" else None
            found[adapter] = view
        return self.view(name, found)

    def _embedding_factors(self, letter: str) -> views.ParametersByName:
        own = self.loras() if self._is_lookup() else {}
        found: views.ParametersByName = self._container(f"lora_embedding_{letter}", views.ParametersByName)
        # of one that is tied to another embedding, the other's: the same parameters
        found.show({name: getattr(lora.origin, letter) for name, lora in own.items()})
        return found

    @property
    def lora_A(self) -> views.ByName:
        """Adapter name -> A."""
        return self._factors("A")

    @property
    def lora_B(self) -> views.ByName:
        """Adapter name -> B."""
        return self._factors("B")

    @property
    def lora_embedding_A(self) -> views.ParametersByName:
        """Adapter name -> A of an embedding."""
        return self._embedding_factors("A")

    @property
    def lora_embedding_B(self) -> views.ParametersByName:
        """Adapter name -> B of an embedding."""
        return self._embedding_factors("B")

    @property
    def lora_magnitude_vector(self) -> views.ByName:
        """Adapter name -> a module whose weight are the magnitudes, of those that are DoRA's."""
        before = dict(self.__dict__.get("lorakit_views", {}).get("lora_magnitude_vector", {}).items())
        found = {}
        for adapter, lora in self.loras().items():
            if isinstance(lora, DoRA):
                view = before.get(adapter)
                if view is None or view.source[0] is not lora:
                    view = views.DoraLinearLayer(lora)
                _refuse_sharded(view._parameters["weight"], lora.magnitude)
                view._parameters["weight"] = lora.magnitude
                found[adapter] = view
        return self.view("lora_magnitude_vector", found)

    @property
    def lora_dropout(self) -> views.ByName:
        """Adapter name -> dropout before A."""
        return self.view("lora_dropout", {name: views.Dropout(lora) for name, lora in self.loras().items()})

    @property
    def scaling(self) -> views.PerAdapter:
        """Adapter name -> factor before B A; setting one sets it."""
        return views.PerAdapter(self.loras, lambda _, lora: lora.s, lambda lora, value: setattr(lora, "s", value))

    @property
    def r(self) -> views.PerAdapter:
        """Adapter name -> rank."""
        return views.PerAdapter(self.loras, lambda _, lora: lora.r)

    @property
    def lora_alpha(self) -> views.PerAdapter:
        """Adapter name -> numerator of the scale."""
        return views.PerAdapter(self.loras, lambda _, lora: int(lora.alpha) if lora.alpha % 1 == 0 else lora.alpha)

    @property
    def use_rslora(self) -> views.PerAdapter:
        """Adapter name -> whether its scale is alpha / sqrt(r)."""
        return views.PerAdapter(self.loras, lambda name, _: name in self.lorakit_state.rslora)

    @property
    def use_dora(self) -> views.PerAdapter:
        """Adapter name -> whether it is DoRA."""
        return views.PerAdapter(self.loras, lambda _, lora: isinstance(lora, DoRA))

    @property
    def lora_bias(self) -> views.PerAdapter:
        """Adapter name -> whether B has a bias."""
        return views.PerAdapter(self.loras, lambda _, lora: lora.bias is not None)

    @property
    def fan_in_fan_out(self) -> bool:
        """Whether the weight lies (in, out)."""
        return isinstance(self.lorakit_site, TransposedLinearSite)

    def __repr__(self) -> str:
        return self._repr("Linear" if self.fan_in_fan_out else type(self).__bases__[1].__name__)

    def _repr(self, name: str, *first: str) -> str:
        parts = [
            f"({name}): {part!r}"
            for name, part in self.parts()
            if not isinstance(part, views.ByName | views.ParametersByName) or len(part)
        ]
        lines = "\n".join([*first, *parts]).replace("\n", "\n  ")
        return f"lora.{name}(\n  {lines}\n)"

    def get_delta_weight(self, adapter: str) -> torch.Tensor:
        """The dense update of one adapter, scale included, in the layout and dtype of the layer's weight; of DoRA the
        change of direction, s B A, as PEFT has it.
        """
        lora = self.loras()[adapter]
        assert self.lorakit_site is not None, "a layer with a LoRA has a site"
        weight = self.get_parameter(self.lorakit_site.weight_name)
        return LoRA.dense(lora, self.lorakit_site, weight).to(weight)

    # ------------------------------------------------------------ scale

    def set_scale(self, adapter: str, scale: float) -> None:
        """Make the scale the config's times `scale`."""
        if adapter in self.loras():
            self.scaling[adapter] = scale * self._own_scale(adapter)

    def scale_layer(self, scale: float) -> None:
        """Multiply the scales of active adapters."""
        for name in self._active_here():
            self.scaling[name] *= scale

    def unscale_layer(self, scale: float | None = None) -> None:
        """Divide the scales of active adapters, or make them the config's again."""
        for name in self._active_here():
            self.scaling[name] = self._own_scale(name) if scale is None else self.scaling[name] / scale

    def _own_scale(self, name: str) -> float:
        scaling = "rslora" if self.use_rslora[name] else "lora"
        return lowrank.scale(self.lora_alpha[name], self.r[name], scaling)

    def _active_here(self) -> list[str]:
        return [name for name in self.active_adapters if name in self.loras()]

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Not layer by layer.

        Raises:
            PeftValueError: always; a model is merged as a whole.
        """
        raise PeftValueError("layers are merged together: model.merge_adapter() and model.unmerge_adapter()")

    def unmerge(self) -> None:
        """As `merge`."""
        self.merge()


class LoraAdapted(LoraLayer, AdaptedLayer):
    """An adapted layer with PEFT's attributes."""


class LoraAttention(LoraLayer, AdaptedAttention):
    """An adapted MultiheadAttention with PEFT's attributes: they are of the input projection, and `out_proj`, adapted
    itself, is found in `base_layer`.
    """

    def parts(self) -> Iterator[tuple[str, nn.Module]]:
        """As a layer's, whether or not the input projection has an update."""
        yield "base_layer", self._with_trained_bias()
        for name in ("lora_dropout", *FACTORS):
            yield name, getattr(self, name)


class AuxiliaryTrainingWrapper(BaseTunerLayer):
    """PEFT's parent of what is trained whole."""

    @property
    def active_adapters(self) -> list[str]:
        """Active adapters that are here."""
        here = self.here()
        return [name for name in super().active_adapters if name in here]


class ModulesToSaveWrapper(AuxiliaryTrainingWrapper, ReplacedModule):
    """A module of which adapters hold whole trained copies, with PEFT's attributes."""

    def set_adapter(self, adapter_names: str | Sequence[str], inference_mode: bool = False) -> None:
        """As a layer's.

        Raises:
            PeftValueError: more than one of them holds a copy.
        """
        names = [adapter_names] if isinstance(adapter_names, str) else list(adapter_names)
        if len({*names} & {*self.copies()}) > 1:
            raise PeftValueError(f"Only one adapter can be set at a time for ModulesToSaveWrapper (got {names})")
        super().set_adapter(names, inference_mode)

    @property
    def _adapters(self) -> set[str]:
        return set(self.copies())

    def copies(self) -> dict[str, nn.Module]:
        """Adapter name -> its copy."""
        return {name: cast("Replacement", update).copy for name, update in BaseTunerLayer.here(self).items()}

    def parts(self) -> Iterator[tuple[str, nn.Module]]:
        """`original_module` and `modules_to_save`."""
        yield "original_module", self.original_module
        yield "modules_to_save", self.modules_to_save

    def key_map(self) -> Iterator[tuple[str, str]]:
        """(PEFT's, our) tensor names."""
        for name in self.as_base().state_dict():
            yield f"original_module.{name}", name
        for slot, update in self.lorakit_updates.items():
            for name in cast("Replacement", update).copy.state_dict():
                adapter = self.lorakit_state.names[slot]
                yield f"modules_to_save.{adapter}.{name}", f"lorakit_updates.{slot}.copy.{name}"

    @property
    def original_module(self) -> nn.Module:
        """The base's module."""
        return self.as_base()

    @property
    def modules_to_save(self) -> views.ByName:
        """Adapter name -> its trained copy."""
        return self.view("modules_to_save", self.copies())


class _WrappedContainer(ModulesToSaveWrapper, ReplacedContainer):
    """One around an `nn.Sequential` or the like."""


ModulesToSaveWrapper.container = _WrappedContainer


class NamedAsInPeft(nn.Module):
    """A wrapper around a model, which has what the wrapper has not. Its `named_parameters` leaves out the frozen biases
    in whose place adapters train others: PEFT trains the bias itself.
    """

    wrapped: ClassVar[str]
    """The attribute that is the model."""

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            # not there yet, or a question of copy and pickle, which is about the wrapper
            if name == self.wrapped or name.startswith("__"):
                raise
            return getattr(getattr(self, self.wrapped), name)

    def named_parameters(
        self, prefix: str = "", recurse: bool = True, remove_duplicate: bool = True
    ) -> Iterator[tuple[str, nn.Parameter]]:
        """As torch's."""
        hidden = {
            id(module._parameters[bias_name(module)])
            for module in self.modules()
            if isinstance(module, LoraLayer) and module._trained_bias() is not None
        }
        for name, parameter in super().named_parameters(prefix, recurse, remove_duplicate):
            if id(parameter) not in hidden:
                yield name, parameter
