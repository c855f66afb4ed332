"""One adapter inside a model: what it becomes there, put into the modules, read as a value, taken out. Knows not which
adapters are active.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from torch import nn

from lorakit.adapter.began import BEGAN, alpha_for_twice_the_rank, at_twice_the_rank
from lorakit.adapter.config import LoRAConfig
from lorakit.adapter.fit import refuse_mismatch, refuse_overlap
from lorakit.adapter.prompt_config import PromptConfig
from lorakit.adapter.prompts import PromptPlace, fresh_prompt, loaded_prompt, place_of, saved_prompt
from lorakit.adapter.starts import Starts
from lorakit.adapter.targets import find_targets
from lorakit.adapter.updates import (
    by_module,
    fresh_replacement,
    fresh_updates,
    loaded_replacement,
    loaded_updates,
    seeded,
)
from lorakit.adapter.value import Adapter, BaseInfo, Factors
from lorakit.core.activated import ActivatedLoRA, Invocation
from lorakit.core.active import ActiveState
from lorakit.core.attention import AdaptedAttention
from lorakit.core.deltas import LayerUpdate, LoRA, Replacement, StackedUpdate, trainable
from lorakit.core.dora import DoRA
from lorakit.core.layer import AdaptedLayer, AdaptedModule, adapt, batch_dim_inside, restore
from lorakit.core.prompts import SoftPrompt
from lorakit.core.sites import site_of

Update = LayerUpdate | Replacement


@dataclass(frozen=True)
class Asked:
    """A soft prompt that is to come into a model, with an adapter or alone.

    Attributes:
        config: of the prompt.
        place: in the model.
        tokenizer: for a fresh one that begins as text.
    """

    config: PromptConfig
    place: PromptPlace
    tokenizer: Any = None

    @classmethod
    def of(
        cls, model: nn.Module, config: PromptConfig | None, modules: Mapping[str, nn.Module], tokenizer: Any
    ) -> Asked | None:
        """What a config asks for; None where that is nothing. Errors as in `place_of`."""
        if config is None or config.soft_prompt == "none":
            return None
        return cls(config, place_of(model, config, modules), tokenizer)


def updates_for(
    model: nn.Module,
    adapter: LoRAConfig | Starts | Adapter,
    modules: Mapping[str, nn.Module],
    *,
    seed: int,
    here: BaseInfo | None,
    asked: Asked | None = None,
) -> tuple[LoRAConfig, dict[str, str], dict[str, Update]]:
    """What an adapter becomes in a model that it fits; the model is not touched.

    Args:
        model: to be adapted.
        adapter: a config (fresh updates), one with starts, or a value.
        modules: all of the model's by path, without what adapters hold.
        seed: of fresh updates.
        here: the base, where a value made on another is to be refused.
        asked: its soft prompt, if it has one.

    Returns:
        (its config without presets, path of a low-rank update -> how its layer multiplies, path -> update)

    Raises:
        TargetError: the config names what is not in the model or cannot be adapted.
        AdapterMismatchError: the value does not fit.
    """
    config = adapter if isinstance(adapter, LoRAConfig) else adapter.config
    targets = find_targets(model, config)
    place = None if asked is None else asked.place
    refuse_overlap(targets, modules, place)
    if isinstance(adapter, Adapter):
        refuse_mismatch(adapter, targets, modules, type(model).__name__, here, place)
        updates: dict[str, Update] = dict(loaded_updates(adapter, targets))
        updates |= {path: loaded_replacement(adapter, path, modules[path]) for path in targets.replaced}
    else:
        inits = adapter.inits if isinstance(adapter, Starts) else None
        updates = dict(fresh_updates(config, targets, modules, seed, inits))
        updates |= {path: fresh_replacement(modules[path]) for path in targets.replaced}
    if asked is not None:
        holder = updates.setdefault(asked.place.path, LayerUpdate())
        assert isinstance(holder, LayerUpdate), "refuse_overlap refuses an embedding that is trained whole"
        if isinstance(adapter, Adapter) and adapter.prompt is not None:
            holder.prompt = loaded_prompt(adapter.prompt)
        else:
            generator = seeded(seed, "soft_prompt")
            holder.prompt = fresh_prompt(model, asked.config, asked.place, generator, asked.tokenizer)
    return targets.config, {target.path: target.site.kind for target in targets.layers}, updates


@dataclass
class Resident:
    """One adapter in the model: its configs, its slot, the kinds of its factors, and the modules it changes."""

    config: LoRAConfig
    slot: str
    kinds: dict[str, str]  # path of a low-rank update -> Site.kind
    prompt_config: PromptConfig | None = None
    modules: dict[str, AdaptedModule] = field(default_factory=dict)  # path -> module, in the model's order

    def put(
        self,
        updates: Mapping[str, Update],
        modules: Mapping[str, nn.Module],
        state: ActiveState,
        class_for: Callable[[nn.Module, Update | StackedUpdate], type[AdaptedModule]],
        *,
        trainable: bool,
    ) -> None:
        """Put updates into their modules, under the slot.

        Args:
            updates: path -> update, as `updates_for` has them.
            modules: all of the model's by path.
            state: what all adapted layers of the model share.
            class_for: the class that a module with this update is given.
            trainable: whether they require gradients.
        """
        held = by_module(updates, modules)
        for path, module in modules.items():
            if path not in held:
                continue
            update = held[path]
            site = site_of(module)
            device = next(module.parameters()).device
            adapted = adapt(module, class_for(module, update), state)
            if isinstance(adapted, AdaptedLayer | AdaptedAttention):
                adapted.lorakit_site = site
            adapted.lorakit_batch_dim = batch_dim_inside(modules.get(path.rpartition(".")[0]))
            update.requires_grad_(trainable).train(module.training)
            for lora in loras_of(update) if self.config.lora_fa else ():
                lora.A.requires_grad_(False)
            # a skeleton's weights are nowhere; what an adapter holds is somewhere all the same
            adapted.lorakit_updates[self.slot] = update if device.type == "meta" else update.to(device)
            self.modules[path] = adapted

    def take_out(self) -> None:
        """Take the updates out; a module without any is again what it was."""
        for module in self.modules.values():
            del module.lorakit_updates[self.slot]
            if not module.lorakit_updates:
                restore(module)

    def updates(self) -> Iterator[tuple[str, Update]]:
        """(path, update), those of a stack's parameters one by one."""
        for path, module in self.modules.items():
            update = module.lorakit_updates[self.slot]
            if isinstance(update, StackedUpdate):
                for name, one in update.updates.items():
                    yield f"{path}.{name}" if path else name, cast("LayerUpdate", one)
            else:
                yield path, cast("LayerUpdate | Replacement", update)

    def value(self, base: BaseInfo) -> Adapter:
        """A copy as a value, on the CPU, in the dtype it is held in. One whose update counts from its start is a plain
        one of twice the rank.
        """
        factors: dict[str, Factors] = {}
        biases: dict[str, torch.Tensor] = {}
        replaced: dict[str, torch.Tensor] = {}
        tokens: dict[str, torch.Tensor] = {}
        for path, update in self.updates():
            if isinstance(update, Replacement):
                replaced |= {f"{path}.{key}": _copied(tensor) for key, tensor in update.copy.state_dict().items()}
                continue
            if update.lora is not None:
                lora = update.lora
                A, B = lora.factors()
                factors[path] = Factors(
                    A=_copied(A),
                    B=_copied(B),
                    alpha=alpha_for_twice_the_rank(lora.alpha, self.config) if self.config.from_start else lora.alpha,
                    kind=self.kinds[path],  # type: ignore[arg-type]
                    bias=None if lora.bias is None else _copied(lora.bias),
                    magnitude=_copied(lora.magnitude) if isinstance(lora, DoRA) else None,
                )
            if update.bias is not None:
                biases[path] = _copied(update.bias)
            if update.tokens is not None and not update.lent:
                tokens[path] = _copied(update.tokens.rows)
        config, metadata, prompt = self.config, {}, self.prompt
        if config.from_start:
            metadata[BEGAN] = json.dumps({"init": config.init, "r": config.r})
            config = at_twice_the_rank(config)
        return Adapter(
            config=config,
            factors=factors,
            biases=biases,
            replaced=replaced,
            tokens=tokens,
            base=base,
            prompt=saved_prompt(prompt, self.prompt_config) if prompt is not None and self.prompt_config else None,
            metadata=metadata,
        )

    @property
    def prompt(self) -> SoftPrompt | None:
        """Its soft prompt, if it has one."""
        return self._held_prompt()[1]

    def _held_prompt(self) -> tuple[str, SoftPrompt | None]:
        """(path of what holds it, it)."""
        held = ((path, update.prompt) for path, update in self.updates() if isinstance(update, LayerUpdate))
        return next((each for each in held if each[1] is not None), ("", None))

    @property
    def invocation(self) -> Invocation | None:
        """That of an activated adapter."""
        found = (lora.invocation for _, lora in self._loras() if isinstance(lora, ActivatedLoRA))
        return next(found, None)

    def fixed_tensors(self) -> dict[str, torch.Tensor]:
        """What its update is computed from and is not trained, by stable names: where A and B began, if it counts from
        there, and A, if B alone is trained.
        """
        fixed: dict[str, torch.Tensor] = {}
        for path, lora in self._loras():
            fixed |= {f"{path}.A": lora.A.detach()} if self.config.lora_fa else {}
            fixed |= {f"{path}.{name}": tensor for name, tensor in lora.named_buffers()}
        return fixed

    def _loras(self) -> Iterator[tuple[str, LoRA]]:
        for path, update in self.updates():
            if isinstance(update, LayerUpdate) and update.lora is not None:
                yield path, update.lora

    def trainable_tensors(self) -> dict[str, nn.Parameter]:
        """All tensors it trains, by stable names."""
        return {
            f"{path}.{tensor}": parameter
            for path, update in self.updates()
            for tensor, parameter in trainable(update)
            if not (self.config.lora_fa and tensor == "A" and isinstance(update, LayerUpdate))
        }

    def output_side(self) -> frozenset[str]:
        """Names of the trained tensors that LoRA+ (arXiv 2402.12354) gives a higher rate: every B and every vector, as
        PEFT has it, but none of an embedding, where A is what begins as zero.
        """
        lookups = tuple(f"{path}." for path, kind in self.kinds.items() if kind == "embedding")
        return (
            frozenset(
                name
                for name, tensor in self.trainable_tensors().items()
                if (name.endswith(".B") or tensor.ndim == 1) and not name.startswith(lookups)
            )
            - self.prompt_side()
        )

    def prompt_side(self) -> frozenset[str]:
        """Names of the trained tensors of its soft prompt."""
        path, prompt = self._held_prompt()
        return frozenset() if prompt is None else frozenset(f"{path}.prompt.{n}" for n, _ in prompt.named_parameters())

    def summary(self) -> dict[str, Any]:
        """Counts for printing and JSON: layers, ranks, parameters, bytes."""
        tensors = self.trainable_tensors()
        loras = [lora for _, lora in self._loras()]
        prompt = self.prompt
        return {
            "layers": len(loras),
            "virtual_tokens": 0 if prompt is None else prompt.length,
            "ranks": sorted({lora.r for lora in loras}),
            "parameters": sum(p.numel() for p in tensors.values()),
            "bytes": sum(p.numel() * p.element_size() for p in tensors.values()),
        }


def loras_of(update: nn.Module) -> Iterator[LoRA]:
    """The low-rank updates in what a module holds."""
    return (module for module in update.modules() if isinstance(module, LoRA))


def _copied(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.detach().to("cpu", copy=True)
