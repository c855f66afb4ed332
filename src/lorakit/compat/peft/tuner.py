"""`LoraModel`: PEFT's tuner, that is a model with its adapters and their configs, over lorakit's handle."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any, Self

import torch
from torch import nn

from lorakit.adapter.targets import module_at
from lorakit.adapter.value import Adapter
from lorakit.compat.peft.combining import Request
from lorakit.compat.peft.config import LoraConfig, PeftConfig
from lorakit.compat.peft.draws import draw
from lorakit.compat.peft.errors import NoMatchingPeftModuleError, PeftValueError, PeftWarning, UnsupportedError
from lorakit.compat.peft.handle import PeftAdapters
from lorakit.compat.peft.lora_layers import LoraAttention, LoraLayer, ModulesToSaveWrapper, NamedAsInPeft
from lorakit.compat.peft.parameters import LoraExperts
from lorakit.compat.peft.stacked import StackedLoRA
from lorakit.compat.peft.tying import tied_group
from lorakit.core.active import NOTHING
from lorakit.core.deltas import LayerUpdate, LoRA
from lorakit.core.layer import base_parameters
from lorakit.core.sites import site_of
from lorakit.errors import AdapterError, TargetError


class LoraModel(NamedAsInPeft):
    """A model with adapters, as PEFT's tuner shows it: `tuner.model` is the model itself, changed in place.

    Attributes:
        model: the model.
        peft_config: adapter name -> its config.
    """

    wrapped = "model"
    prefix = "lora_"

    def __init__(
        self,
        model: nn.Module,
        config: LoraConfig | Mapping[str, LoraConfig],
        adapter_name: str = "default",
        low_cpu_mem_usage: bool = False,
    ) -> None:
        self._surround(model)
        configs = config if isinstance(config, Mapping) else {adapter_name: config}
        with self.or_nothing():
            for name, value in configs.items():
                self.add_adapter(name, value, low_cpu_mem_usage)
            self.set_adapter(adapter_name, inference_mode=self.peft_config[adapter_name].inference_mode)

    @classmethod
    def around(cls, model: nn.Module) -> Self:
        """The tuner of a model, with the adapters it has already, if any."""
        made = cls.__new__(cls)
        made._surround(model)
        return made

    def _surround(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        handle = model.__dict__.get("_lorakit")
        if handle is not None and not isinstance(handle, PeftAdapters):
            raise PeftValueError("this model has adapters of lorakit.attach; use that handle, or detach() it first")
        self.handle: PeftAdapters = PeftAdapters(model) if handle is None else handle
        self.peft_config: dict[str, LoraConfig] = model.__dict__.get("peft_config") or {}
        model.__dict__["peft_config"] = self.peft_config  # where PEFT leaves it too

    @contextlib.contextmanager
    def or_nothing(self) -> Iterator[None]:
        """If the block fails to add the first adapter, the model is as it was."""
        try:
            yield
        except BaseException:
            if not self.peft_config:
                self.unload()
            raise

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The model's, with the active adapters."""
        return self.model(*args, **kwargs)

    # ------------------------------------------------------------ in and out

    def add_adapter(
        self,
        adapter_name: str,
        peft_config: PeftConfig,
        low_cpu_mem_usage: bool = False,
        autocast_adapter_dtype: bool = True,
    ) -> None:
        """Add a fresh adapter, inactive and frozen. What is drawn for it follows torch's global seed; with
        `low_cpu_mem_usage` it waits on the meta device for the tensors of a file.
        """
        config = self._checked(adapter_name, peft_config)
        with self._saying_what_matches(config):
            resolved = config.resolved(self.model)
            self.handle.add(adapter_name, resolved, trainable=False, tied=self._tied(config))
        self._draw(adapter_name, config.init_lora_weights)
        self._enter(adapter_name, config, autocast=autocast_adapter_dtype)
        if low_cpu_mem_usage:
            for _, update in self.handle._residents[adapter_name].updates():
                update.to("meta")

    def _draw(self, name: str, init: bool | str) -> None:
        modules = self.handle._residents[name].modules
        updates = dict(self.handle._residents[name].updates())
        for path, module in modules.items():
            if isinstance(module, LoraExperts):
                continue
            paths = [path]
            if isinstance(module, LoraAttention) and len(module.here()) == 1:
                paths.insert(0, f"{path}.out_proj")  # PEFT draws for it when it wraps the attention, and then again
            for drawn in paths:
                lora, site = getattr(updates.get(drawn), "lora", None), site_of(modules[drawn])
                if isinstance(lora, LoRA) and lora.origin is lora:
                    draw(lora, init, lookup=site is not None and site.kind == "embedding")
        for update in updates.values():  # PEFT comes to parameters after it is done with modules
            if isinstance(update, LayerUpdate) and isinstance(update.lora, StackedLoRA):
                draw(update.lora, init, lookup=False)

    def add_value(
        self, adapter_name: str, adapter: Adapter, peft_config: LoraConfig, autocast_adapter_dtype: bool = True
    ) -> None:
        """Add an adapter that exists, inactive and frozen."""
        config = self._checked(adapter_name, peft_config)
        adapter = replace(adapter, config=config.resolved(self.model, fresh=False))
        self.handle.add(adapter_name, adapter, trainable=False, check_base=False, tied=self._tied(config))
        self._enter(adapter_name, config, autocast=autocast_adapter_dtype)

    @contextlib.contextmanager
    def _saying_what_matches(self, config: LoraConfig) -> Iterator[None]:
        try:
            yield
        except TargetError as error:
            preface = config.nothing_left(self.model)
            raise NoMatchingPeftModuleError(f"{preface} {error}" if preface else str(error)) from error

    def supports_lora_conversion(self, adapter_name: str = "default") -> bool:
        """False: it is LoRA already."""
        return False

    def _tied(self, config: LoraConfig) -> list[str]:
        return tied_group(self.model) if config.ensure_weight_tying else []

    def _get_module_names_tied_with_embedding(self) -> list[str]:
        """Paths of the layers that have the weight of the input embedding."""
        return sorted(tied_group(self.model)[1:])

    def _checked(self, name: str, config: PeftConfig) -> LoraConfig:
        if name in self.peft_config:
            raise PeftValueError(f"Adapter with name '{name}' already exists.")
        if not isinstance(config, LoraConfig):
            raise UnsupportedError(f"{type(config).__name__}: this version has LoRA")
        others = {key: set(c.target_parameters) for key, c in self.peft_config.items() if c.target_parameters}
        for other, parameters in others.items():
            if config.target_parameters and set(config.target_parameters) != parameters:
                raise PeftValueError(
                    "When using multiple adapters with `target_parameters`, all adapters must target the same set of "
                    f"parameters, but got {sorted(config.target_parameters)} for the new adapter and "
                    f"{sorted(parameters)} for adapter {other!r}."
                )
        if config.bias != "none" and any(c.bias != "none" for c in self.peft_config.values()):
            raise PeftValueError(
                f"{type(self).__name__} supports only 1 adapter with bias. When using multiple adapters, "
                "set bias to 'none' for all adapters."
            )
        return config

    def _enter(self, name: str, config: LoraConfig, *, autocast: bool) -> None:
        self.peft_config[name] = config
        if not autocast:
            for path, update in self.handle._residents[name].updates():
                module = module_at(path, self.handle._residents[name].modules)
                dtype = next(iter(base_parameters(module).values())).dtype
                update.to(dtype)
        for kind in self._without_bias(name) if config.lora_bias else ():
            warnings.warn(
                f"`lora_bias=True` was passed but the targeted layer of type {kind} has no bias. This means that "
                "merging LoRA weights won't be possible.",
                PeftWarning,
                stacklevel=3,
            )

    def _without_bias(self, name: str) -> list[str]:
        """Kinds of layers that an adapter updates and that have no bias."""
        layers = [m for m in self.handle._residents[name].modules.values() if isinstance(m, LoraLayer)]
        return sorted({type(m).__bases__[1].__name__ for m in layers if m._parameters.get("bias") is None})

    def delete_adapter(self, adapter_name: str) -> None:
        """Take an adapter out. If it was the only active one, the oldest that is left is active next."""
        self._require(adapter_name)
        if adapter_name in self.handle.state.merged:
            raise PeftValueError(
                f"Cannot delete adapter(s) ['{adapter_name}'] while they are merged. Please unmerge them first."
            )
        left = [name for name in self.active_adapters if name != adapter_name]
        self.handle.remove(adapter_name)
        del self.peft_config[adapter_name]
        if not left and self.peft_config:
            left = [next(iter(self.peft_config))]
            warnings.warn(
                f"Adapter {adapter_name} was active which is now deleted. Setting active adapter to {left[0]}.",
                stacklevel=2,
            )
        self.handle.choose(left)
        for name in left:
            self.handle.train_only(name, not self.peft_config[name].inference_mode)

    # ------------------------------------------------------------ active

    @property
    def active_adapters(self) -> list[str]:
        """Active adapters."""
        return list(self.handle.state.chosen)

    @property
    def active_adapter(self) -> str | list[str]:
        """The active adapter, or their list."""
        names = self.active_adapters
        return names[0] if len(names) == 1 else names

    @property
    def targeted_module_names(self) -> list[str]:
        """Paths of layers with low-rank updates, as they came."""
        return list(dict.fromkeys(path for path, lora in self._updates() if not isinstance(lora, StackedLoRA)))

    @property
    def targeted_parameter_names(self) -> list[str]:
        """Full names of parameters that were targeted by name, as they came."""
        return list(dict.fromkeys(path for path, lora in self._updates() if isinstance(lora, StackedLoRA)))

    def _updates(self) -> Iterator[tuple[str, LoRA]]:
        for resident in self.handle._residents.values():
            for path, update in resident.updates():
                if isinstance(update, LayerUpdate) and update.lora is not None:
                    yield path, update.lora

    @property
    def has_active_enabled_adapter(self) -> bool:
        """Whether a forward pass uses any adapter."""
        state = self.handle.state
        return state.folded or state.current() != NOTHING

    def set_adapter(self, adapter_name: str | Sequence[str], inference_mode: bool = False) -> None:
        """Use one adapter, or several added up; their tensors can be trained (unless `inference_mode`), the others'
        cannot. Merged adapters are unmerged first.
        """
        for name in [adapter_name] if isinstance(adapter_name, str) else adapter_name:
            self._require(name, "not found.")
        self.handle.use(adapter_name, inference_mode=inference_mode)

    def set_requires_grad(self, adapter_names: str | Sequence[str], requires_grad: bool = True) -> None:
        """Whether adapters can be trained."""
        for name in [adapter_names] if isinstance(adapter_names, str) else adapter_names:
            self.handle.train_only(self._require(name), requires_grad)

    def disable_adapter_layers(self) -> None:
        """Switch all adapters off."""
        self.handle.switch(off=True)

    def enable_adapter_layers(self) -> None:
        """Switch the active adapters on again."""
        self.handle.switch(off=False)

    # ------------------------------------------------------------ merged

    def merge_adapter(self, adapter_names: list[str] | None = None, safe_merge: bool = False) -> None:
        """Fold adapters into the weights, on top of those that are. What is folded replaces the forward pass's updates
        until `unmerge_adapter`, which puts the base's own tensors back.

        Args:
            adapter_names: which; None: the active ones.
            safe_merge: nothing more to be had: nothing is ever folded in that is not finite.
        """
        self.handle.agree()
        wanted = [self._require(name) for name in adapter_names or self.active_adapters]
        merged = self.handle.state.merged
        fresh = [name for name in wanted if name not in merged]
        if not fresh:
            warnings.warn("All adapters are already merged, nothing to do.", stacklevel=2)
            return
        self.handle.refuse_same_copies([*merged, *fresh])
        self.handle.refuse_missing_biases(fresh)
        with self._telling_which([*merged, *fresh]):
            try:
                self.handle.fold([*merged, *fresh])
            except BaseException:
                self.handle.fold(merged)
                raise

    def unmerge_adapter(self) -> None:
        """Put the base's own tensors back, bit for bit."""
        if not self.handle.state.merged:
            warnings.warn("Already unmerged. Nothing to do.", stacklevel=2)
        self.handle.unfold()

    def merge_and_unload(
        self, progressbar: bool = False, safe_merge: bool = False, adapter_names: list[str] | None = None
    ) -> nn.Module:
        """Fold adapters into the model for good and give the plain model back.

        Args:
            progressbar: none is shown.
            safe_merge: as in `merge_adapter`.
            adapter_names: which; None: the merged and the active ones.

        Raises:
            PeftValueError: an update is not finite, or too little of it would survive rounding to the dtype of the
            weights; the model is as it was.
        """
        self.handle.agree()
        merged = self.handle.state.merged
        wanted = [self._require(name) for name in adapter_names or self.active_adapters]
        names = list(dict.fromkeys([*merged, *wanted]))
        if not names:
            return self.unload()
        self.handle.refuse_same_copies(names)
        self.handle.refuse_missing_biases(names)
        state, before = self.handle.state, self.handle.state.everywhere
        tied = getattr(getattr(self.model, "config", None), "tie_word_embeddings", False)
        self.handle.unfold()
        state.everywhere = self.handle.selection(names)
        try:
            with self._telling_which(names):
                self.handle.merge()
        except BaseException:
            state.everywhere = before
            self.handle.fold(merged)
            raise
        if tied and not self.model.config.tie_word_embeddings:  # type: ignore[union-attr]
            warnings.warn(
                "Setting config.tie_word_embeddings=False: the adapter changed one of two tied weights, so each "
                "has its own now",
                stacklevel=2,
            )
        return self._leave()

    def unload(self) -> nn.Module:
        """Give the plain model back, as it was before."""
        self.handle.unfold()
        self.handle.detach()
        return self._leave()

    def _leave(self) -> nn.Module:
        self.model.__dict__.pop("peft_config", None)
        return self.model

    @contextlib.contextmanager
    def _telling_which(self, names: Sequence[str]) -> Iterator[None]:
        try:
            yield
        except AdapterError as error:
            broken = [
                name
                for name in names
                if not all(torch.isfinite(t).all() for t in self.handle.trainable_tensors(name).values())
            ]
            if not broken:
                raise PeftValueError(str(error)) from error
            raise PeftValueError(
                f"NaNs detected in the merged weights. The adapter {' and '.join(broken)} seems to be broken: {error}"
            ) from error

    # ------------------------------------------------------------ combined

    def add_weighted_adapter(
        self,
        adapters: list[str],
        weights: list[float],
        adapter_name: str,
        combination_type: str = "svd",
        svd_rank: int | None = None,
        svd_clamp: float | None = None,
        svd_full_matrices: bool = True,
        svd_driver: str | None = None,
        density: float | None = None,
        majority_sign_method: str = "total",
    ) -> None:
        """Add the weighted sum of adapters as a new one, inactive.

        Everything is computed on the updates themselves, never on the factors: "cat" is exact, every other type the
        closest update of the rank PEFT gives it.

        Args:
            adapters: names.
            weights: a weight for each.
            adapter_name: the new one's; where it is taken, nothing is done.
            combination_type: one of PEFT's.
            svd_rank: rank of the types that end in "svd"; None: the largest of the adapters.
            svd_clamp: not supported.
            svd_full_matrices: without effect.
            svd_driver: without effect.
            density: share of elements kept, for ties, dare and magnitude_prune.
            majority_sign_method: "total".
        """
        if adapter_name in self.peft_config:
            return
        if svd_clamp is not None or majority_sign_method != "total":
            raise UnsupportedError("svd_clamp and majority_sign_method='frequency' are not in this version")
        configs = [self.peft_config[self._require(name)] for name in adapters]
        for name, config in zip(adapters, configs, strict=True):
            if config.target_parameters:
                raise PeftValueError(
                    f"add_weighted_adapter does not support targeting nn.Parameter (problematic adapter {name!r}); "
                    "lorakit.combine does, on saved adapters"
                )
        self._refuse_whole_copies(adapters)
        request = Request.of(adapters, configs, combination_type, svd_rank, density)
        with self.handle.unfolded():
            combined = request.combined([self.handle.extract(name) for name in adapters], weights)
        config = LoraConfig.of(combined.config, task_type=configs[0].task_type)
        config.base_model_name_or_path = configs[0].base_model_name_or_path
        self.add_value(adapter_name, combined, config)

    def _refuse_whole_copies(self, adapters: Sequence[str]) -> None:
        modules = self.handle.adapted_modules().values()
        held = [module.copies() for module in modules if isinstance(module, ModulesToSaveWrapper)]
        twice = sum(sum(name in copies for name in adapters) > 1 for copies in held)
        if twice:
            raise PeftValueError(
                "Cannot add weighted adapters if they target the same module with modules_to_save, but found "
                f"{twice} such instance(s)."
            )

    # ------------------------------------------------------------

    def _require(self, name: str, what: str = "does not exist") -> str:
        if name not in self.peft_config:
            raise PeftValueError(f"Adapter {name} {what} There are: {', '.join(self.peft_config) or 'none'}")
        return name
