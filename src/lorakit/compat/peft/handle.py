"""lorakit's handle as the facade needs it: layers with PEFT's names, PEFT's view of what is active, off and merged."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, cast

import torch
from torch import nn

from lorakit.adapter.attach import AttachedAdapters
from lorakit.adapter.config import LoRAConfig
from lorakit.adapter.folding import Exchange, require_biases
from lorakit.adapter.prompt_config import PromptConfig
from lorakit.adapter.resident import Resident, Update
from lorakit.adapter.starts import Starts
from lorakit.adapter.value import Adapter
from lorakit.compat.peft.errors import NoBiasError, PeftValueError
from lorakit.compat.peft.layers import BaseTunerLayer, PeftState
from lorakit.compat.peft.lora_layers import LoraAdapted, LoraAttention, ModulesToSaveWrapper
from lorakit.compat.peft.parameters import LoraExperts
from lorakit.compat.peft.stacked import StackedLoRA
from lorakit.compat.peft.tokens import TrainableTokensWrapper
from lorakit.compat.peft.tying import share
from lorakit.core.active import NOTHING, Selection
from lorakit.core.attention import AdaptedAttention
from lorakit.core.deltas import LayerUpdate, StackedUpdate
from lorakit.core.embedding import AdaptedEmbedding
from lorakit.core.experts import AdaptedExperts
from lorakit.core.layer import AdaptedLayer, AdaptedModule, ReplacedModule
from lorakit.errors import AdapterError


class PeftAdapters(AttachedAdapters):
    """lorakit's handle, whose layers show PEFT's names."""

    state_class = PeftState
    dressed: ClassVar[Mapping[type[AdaptedModule], type[AdaptedModule]]] = {
        AdaptedLayer: LoraAdapted,
        AdaptedEmbedding: LoraAdapted,
        AdaptedAttention: LoraAttention,
        AdaptedExperts: LoraExperts,
        ReplacedModule: ModulesToSaveWrapper,
    }

    def __init__(self, model: nn.Module) -> None:
        super().__init__(model)
        self._exchange = Exchange()
        self._flags: list[tuple[nn.Parameter, bool]] = []
        self._tied: tuple[str, ...] = ()
        self._fresh = True
        self.state.unfold = self.unfold
        self._enter_model()

    @property
    def state(self) -> PeftState:
        """What the layers share."""
        return cast("PeftState", self._state)

    def add(
        self,
        name: str,
        adapter: LoRAConfig | PromptConfig | Starts | Adapter | str | Path,
        *,
        tied: Sequence[str] = (),
        **options: Any,
    ) -> None:
        """As the parent's; may be called while adapters are merged.

        Args:
            name: as the parent's.
            adapter: as the parent's.
            tied: paths of layers with one weight that are to have one update.
            **options: as the parent's.
        """
        with self.unfolded():
            self._tied, self._fresh = tuple(tied), isinstance(adapter, LoRAConfig | Starts)
            super().add(name, adapter, **options)
            self._renew_names()

    def remove(self, name: str) -> None:
        """As the parent's; may be called while other adapters are merged."""
        with self.unfolded():
            for module in self._resident(name).modules.values():
                cast("BaseTunerLayer", module).forget(name)
            super().remove(name)
            self._renew_names()

    def _class_for(self, module: nn.Module, update: Update | StackedUpdate) -> type[AdaptedModule]:
        if isinstance(update, LayerUpdate) and update.tokens is not None:
            return TrainableTokensWrapper
        return super()._class_for(module, update)

    def _put(
        self,
        resident: Resident,
        updates: Mapping[str, Update],
        modules: Mapping[str, nn.Module],
        *,
        trainable: bool,
    ) -> None:
        tokens = [path for path, update in updates.items() if getattr(update, "tokens", None) is not None]
        for path, update in updates.items():
            module = modules.get(path)
            clash = LoraAdapted if path in tokens else TrainableTokensWrapper
            if isinstance(module, clash) or (path in tokens and getattr(update, "bias", None) is not None):
                raise PeftValueError(
                    f"trainable_token_indices: {path} has a low-rank update or a trained bias as well, which cannot be"
                )
            if path not in modules and isinstance(update, LayerUpdate) and update.lora is not None:
                update.lora = StackedLoRA(update.lora)
        share(updates, self._tied, modules, fresh=self._fresh)
        super()._put(resident, updates, modules, trainable=trainable)
        for path in tokens[1:]:  # the embedding is first
            modules[path].__dict__["lorakit_tied"] = (modules[tokens[0]],)

    def _renew_names(self) -> None:
        residents, state = self._residents, self.state
        state.names = {resident.slot: name for name, resident in residents.items()}
        state.rslora = {name for name, resident in residents.items() if resident.config.scaling == "rslora"}

    def choose(self, names: Sequence[str]) -> None:
        """Make `names` the active adapters of all layers, whether or not adapters are switched off for now."""
        for layer in self.differing():
            layer.__dict__.pop("lorakit_chosen", None)
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
        """Two whole copies of a module, or of a row of an embedding, cannot be used at once.

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
            if isinstance(module, TrainableTokensWrapper):
                taken: set[int] = set()
                for name in both:
                    own = set(module.rows()[name].indices.tolist())
                    if taken & own:
                        raise PeftValueError(
                            f"Token indices of adapter {name} are already defined and would result in undefined "
                            "merging behavior. Only one adapter can be set at a time for TrainableTokensWrapper "
                            f"{path}, unless their tokens differ; {sorted(taken & own)} are in two."
                        )
                    taken |= own

    def differing(self) -> list[BaseTunerLayer]:
        """The layers with a choice of their own."""
        layers = (cast("BaseTunerLayer", module) for module in self.adapted_modules().values())
        return [layer for layer in layers if {"lorakit_chosen", "lorakit_off"} & layer.__dict__.keys()]

    def agree(self) -> None:
        """What is done to the whole model needs layers that agree: what all of them chose is the model's choice.

        Raises:
            PeftValueError: names those that do not.
        """
        layers = {path: cast("BaseTunerLayer", module) for path, module in self.adapted_modules().items()}
        chosen = {tuple(layer.__dict__.get("lorakit_chosen", self.state.chosen)) for layer in layers.values()}
        if len(chosen) == 1 and not any("lorakit_off" in layer.__dict__ for layer in layers.values()):
            if self.differing():
                self.choose(chosen.pop())
            return
        paths = [path for path, layer in layers.items() if layer in self.differing()]
        if paths:
            raise PeftValueError(
                f"adapters were set or switched for some layers alone ({', '.join(paths[:3])}); call set_adapter and "
                "enable_adapter_layers on the model first"
            )

    def refuse_missing_biases(self, names: Sequence[str]) -> None:
        """A bias of B can be merged into a bias only.

        Raises:
            NoBiasError: a layer has none; with every such layer.
        """
        try:
            require_biases(self.adapted_modules(), self.selection(names))
        except AdapterError as error:
            raise NoBiasError(
                f"Impossible to merge LoRA with `lora_bias=True` because the base layer has no bias: {error}"
            ) from error

    def switch(self, *, off: bool) -> None:
        """Switch all adapters off or on."""
        for layer in self.differing():
            layer.__dict__.pop("lorakit_off", None)
        self.state.off = off
        self.state.everywhere = NOTHING if off else self.selection(self.state.chosen)
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
