"""`LoraModel`: PEFT's tuner, that is a model with its adapters, over lorakit's handle.

PEFT's view of which adapters are active, switched off or merged is kept here; what that means for a forward pass is
lorakit's.
"""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar, Self, cast

import torch
from torch import nn

from lorakit.adapter.attach import AttachedAdapters
from lorakit.adapter.config import LoRAConfig
from lorakit.adapter.folding import Exchange
from lorakit.adapter.value import Adapter
from lorakit.compat.peft.config import LoraConfig, PeftConfig
from lorakit.compat.peft.draws import draw
from lorakit.compat.peft.errors import PeftValueError, UnsupportedError
from lorakit.compat.peft.layers import (
    BaseTunerLayer,
    LoraAdapted,
    LoraAttention,
    LoraLayer,
    ModulesToSaveWrapper,
    PeftState,
)
from lorakit.core.active import NOTHING, Selection
from lorakit.core.attention import AdaptedAttention
from lorakit.core.deltas import LoRA
from lorakit.core.layer import AdaptedLayer, AdaptedModule, ReplacedModule, base_parameters
from lorakit.core.sites import site_of
from lorakit.errors import AdapterError

# PEFT's combination_type -> lorakit's method; see docs/compat.md for what PEFT computes instead
_COMBINATIONS = {
    "cat": "cat",
    **dict.fromkeys(("svd", "linear"), "svd"),
    **{
        f"{name}{end}": name for name in ("ties", "dare_linear", "dare_ties", "magnitude_prune") for end in ("", "_svd")
    },
}


class PeftAdapters(AttachedAdapters):
    """lorakit's handle, whose layers show PEFT's names."""

    state_class = PeftState
    dressed: ClassVar[Mapping[type[AdaptedModule], type[AdaptedModule]]] = {
        AdaptedLayer: LoraAdapted,
        AdaptedAttention: LoraAttention,
        ReplacedModule: ModulesToSaveWrapper,
    }

    def __init__(self, model: nn.Module) -> None:
        super().__init__(model)
        self._exchange = Exchange()
        self._flags: list[tuple[nn.Parameter, bool]] = []
        self.state.use = self.use
        self._enter_model()

    @property
    def state(self) -> PeftState:
        """What the layers share."""
        return cast("PeftState", self._state)

    def add(self, name: str, adapter: LoRAConfig | Adapter | str | Path, **options: Any) -> None:
        """As the parent's; may be called while adapters are merged."""
        with self.unfolded():
            super().add(name, adapter, **options)
            self._renew_names()

    def remove(self, name: str) -> None:
        """As the parent's; may be called while other adapters are merged."""
        with self.unfolded():
            for module in self._resident(name).modules.values():
                cast("BaseTunerLayer", module).forget(name)
            super().remove(name)
            self._renew_names()

    def _renew_names(self) -> None:
        residents, state = self._residents, self.state
        state.names = {resident.slot: name for name, resident in residents.items()}
        state.rslora = {name for name, resident in residents.items() if resident.config.scaling == "rslora"}

    def choose(self, names: Sequence[str]) -> None:
        """Make `names` the active adapters, whether or not adapters are switched off for now."""
        self.state.chosen = tuple(names)
        self.state.everywhere = NOTHING if self.state.off else self.selection(names)

    def use(self, names: str | Sequence[str], *, inference_mode: bool = False) -> None:
        """`choose`, and let these adapters' tensors be trained (unless `inference_mode`), and no others'. Merged
        adapters are unmerged first.
        """
        names = [names] if isinstance(names, str) else list(names)
        self.refuse_same_copies(names)
        if self.state.merged:
            warnings.warn("Adapter cannot be set when the model is merged. Unmerging the model first.", stacklevel=3)
            self.unfold()
        self.choose(names)
        for name in self.names:
            self.train_only(name, name in names and not inference_mode)

    def train_only(self, name: str, requires_grad: bool) -> None:
        """Whether an adapter's tensors can be trained."""
        for parameter in self.trainable_tensors(name).values():
            parameter.requires_grad_(requires_grad)

    def refuse_same_copies(self, names: Sequence[str]) -> None:
        """Two whole copies of a module cannot be used at once.

        Raises:
            PeftValueError: names the module.
        """
        for path, module in self.adapted_modules().items() if len(names) > 1 else ():
            both = [name for name in names if path in self._residents[name].modules]
            if isinstance(module, ReplacedModule) and len(both) > 1:
                raise PeftValueError(
                    f"Only one adapter can be set at a time for {type(module).__mro__[1].__name__} {path}, of which "
                    f"{' and '.join(both)} hold a copy each (modules_to_save)"
                )

    def switch(self, *, off: bool) -> None:
        """Switch all adapters off or on."""
        self.state.off = off
        self.choose(self.state.chosen)
        if off:
            self._flags = self._flags or self.freeze()
        else:
            self.thaw(self._flags)
            self._flags = []

    def freeze(self) -> list[tuple[nn.Parameter, bool]]:
        """Let no adapter be trained; what `thaw` needs to undo it."""
        flags = [(p, True) for name in self.names for p in self.trainable_tensors(name).values() if p.requires_grad]
        self.thaw([(parameter, False) for parameter, _ in flags])
        return flags

    def thaw(self, flags: list[tuple[nn.Parameter, bool]]) -> None:
        """Give parameters their flags back."""
        for parameter, flag in flags:
            parameter.requires_grad_(flag)

    @contextlib.contextmanager
    def base_alone(self) -> Iterator[None]:
        """Within the block the model is its base, for this thread. Where gradients are recorded, no adapter asks for
        one meanwhile.
        """
        with self.unfolded(), self.disabled():
            flags = self.freeze() if torch.is_grad_enabled() else []
            try:
                yield
            finally:
                self.thaw(flags)

    def selection(self, names: Sequence[str]) -> Selection:
        """`names`, each with weight 1."""
        return Selection(tuple((self._resident(name).slot, 1.0) for name in names))

    def fold(self, names: Sequence[str]) -> None:
        """Fold `names`, and nothing else, into the weights; the base's own parameters are kept aside."""
        self.unfold()
        if names:
            self._exchange.put(self.adapted_modules(), self.selection(names))
            self.state.merged, self.state.folded = tuple(names), True

    def unfold(self) -> None:
        """Put the base's own parameters back."""
        self._exchange.back()
        self.state.merged, self.state.folded = (), False

    @contextlib.contextmanager
    def unfolded(self) -> Iterator[None]:
        """Within the block nothing is folded into the weights."""
        merged = self.state.merged
        if merged:
            self.unfold()
        try:
            yield
        finally:
            if merged:
                self.fold([name for name in merged if name in self.names])


class LoraModel(nn.Module):
    """A model with adapters, as PEFT's tuner shows it: `tuner.model` is the model itself, changed in place.

    Attributes:
        model: the model.
        peft_config: adapter name -> its config.
    """

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

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name == "model":
                raise
            return getattr(self.model, name)

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
        self.handle.add(adapter_name, config.resolved(self.model), trainable=False)
        for path, update in self.handle._residents[adapter_name].updates():
            lora = getattr(update, "lora", None)
            if isinstance(lora, LoRA):
                site = site_of(self.handle._residents[adapter_name].modules[path])
                draw(lora, config.init_lora_weights, lookup=site is not None and site.kind == "embedding")
        self._enter(adapter_name, config, autocast=autocast_adapter_dtype)
        if low_cpu_mem_usage:
            for _, update in self.handle._residents[adapter_name].updates():
                update.to("meta")

    def add_value(
        self, adapter_name: str, adapter: Adapter, peft_config: LoraConfig, autocast_adapter_dtype: bool = True
    ) -> None:
        """Add an adapter that exists, inactive and frozen."""
        config = self._checked(adapter_name, peft_config)
        adapter = replace(adapter, config=config.resolved(self.model, fresh=False))
        self.handle.add(adapter_name, adapter, trainable=False, check_base=False)
        self._enter(adapter_name, config, autocast=autocast_adapter_dtype)

    def _checked(self, name: str, config: PeftConfig) -> LoraConfig:
        if name in self.peft_config:
            raise PeftValueError(f"Adapter with name '{name}' already exists.")
        if not isinstance(config, LoraConfig):
            raise UnsupportedError(f"{type(config).__name__}: this version has LoRA")
        if self.peft_config and any(c.bias != "none" for c in (config, *self.peft_config.values())):
            raise PeftValueError(
                f"{type(self).__name__} supports only 1 adapter with bias. When using multiple adapters, "
                "set bias to 'none' for all adapters."
            )
        return config

    def _enter(self, name: str, config: LoraConfig, *, autocast: bool) -> None:
        self.peft_config[name] = config
        if not autocast:
            for path, update in self.handle._residents[name].updates():
                dtype = next(iter(base_parameters(self.handle._residents[name].modules[path]).values())).dtype
                update.to(dtype)

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
        """Paths of layers with low-rank updates."""
        return [
            path
            for path, module in self.handle.adapted_modules().items()
            if isinstance(module, LoraLayer) and module.loras()
        ]

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
        wanted = [self._require(name) for name in adapter_names or self.active_adapters]
        merged = self.handle.state.merged
        fresh = [name for name in wanted if name not in merged]
        if not fresh:
            warnings.warn("All adapters are already merged, nothing to do.", stacklevel=2)
            return
        self.handle.refuse_same_copies([*merged, *fresh])
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
        merged = self.handle.state.merged
        wanted = [self._require(name) for name in adapter_names or self.active_adapters]
        names = list(dict.fromkeys([*merged, *wanted]))
        if not names:
            return self.unload()
        self.handle.refuse_same_copies(names)
        state, before = self.handle.state, self.handle.state.everywhere
        self.handle.unfold()
        state.everywhere = self.handle.selection(names)
        try:
            with self._telling_which(names):
                self.handle.merge()
        except BaseException:
            state.everywhere = before
            self.handle.fold(merged)
            raise
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
        from lorakit.adapter.combine import combine

        if adapter_name in self.peft_config:
            return
        if svd_clamp is not None or majority_sign_method != "total":
            raise UnsupportedError("svd_clamp and majority_sign_method='frequency' are not in this version")
        for name in adapters:
            self._require(name)
        if not adapters:
            raise PeftValueError(f"Found no adapter matching the names in {adapters}")
        if combination_type not in _COMBINATIONS:
            raise PeftValueError(f"Invalid combination_type: {combination_type}; there are {', '.join(_COMBINATIONS)}")
        held = [
            module.here()
            for module in self.handle.adapted_modules().values()
            if isinstance(module, ModulesToSaveWrapper)
        ]
        twice = sum(sum(name in copies for name in adapters) > 1 for copies in held)
        if twice:
            raise PeftValueError(
                "Cannot add weighted adapters if they target the same module with modules_to_save, but found "
                f"{twice} such instance(s)."
            )
        configs = [self.peft_config[name] for name in adapters]
        ranks = [max(config.r, *config.rank_pattern.values(), 0) for config in configs]
        if len(adapters) > 1 and combination_type != "cat" and not combination_type.endswith("svd"):
            if len(set(ranks)) > 1:
                raise PeftValueError(
                    f"All adapters must have the same r value for combination_type {combination_type!r} (got {ranks}); "
                    "'cat' and the types that end in 'svd' take any"
                )
        rank = svd_rank or max(ranks)
        options: dict[str, Any] = {} if combination_type == "cat" or len(adapters) == 1 else {"rank": rank}
        if density is not None and _COMBINATIONS[combination_type] not in ("cat", "svd"):
            options["density"] = density
        method = "cat" if len(adapters) == 1 else _COMBINATIONS[combination_type]
        with self.handle.unfolded():
            values = [self.handle.extract(name) for name in adapters]
        combined = combine(values, weights, method=method, **({} if method == "cat" else options))
        if "rank" in options:
            combined = _padded(combined, rank)  # where a layer is too small for it; PEFT has the same r in all
        config = LoraConfig.of(combined.config, task_type=configs[0].task_type)
        config.base_model_name_or_path = configs[0].base_model_name_or_path
        self.add_value(adapter_name, combined, config)

    # ------------------------------------------------------------

    def _require(self, name: str, what: str = "does not exist") -> str:
        if name not in self.peft_config:
            raise PeftValueError(f"Adapter {name} {what} There are: {', '.join(self.peft_config) or 'none'}")
        return name


def _padded(adapter: Adapter, rank: int) -> Adapter:
    """The same updates at rank `rank` in every layer, by rows and columns of zeros; scale 1."""
    factors = {}
    for path, f in adapter.folded().factors.items():
        more = rank - f.r
        if more > 0 and f.B.shape[1] == f.r:
            A = torch.cat([f.A, f.A.new_zeros(more, *f.A.shape[1:])])
            B = torch.cat([f.B, f.B.new_zeros(f.B.shape[0], more, *f.B.shape[2:])], dim=1)
            f = replace(f, A=A, B=B, alpha=float(rank))
        factors[path] = f
    config = replace(adapter.config, r=rank, alpha=float(rank), scaling="lora", rank_pattern={}, alpha_pattern={})
    return replace(adapter, config=config, factors=factors)
