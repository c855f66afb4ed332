"""The doors between adapters and models: `attach` puts adapters into a model in place, `extract` takes them out as
values.
"""

from __future__ import annotations

import contextlib
import hashlib
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn

from lorakit.adapter import fingerprint
from lorakit.adapter.config import LoRAConfig
from lorakit.adapter.targets import Target, Targets, find_targets
from lorakit.adapter.value import Adapter, BaseInfo, Factors
from lorakit.core import initializers, lowrank
from lorakit.core.deltas import LayerUpdate, LoRA, Replacement, trainable
from lorakit.core.layer import (
    ActiveState,
    AdaptedLayer,
    AdaptedModule,
    ReplacedModule,
    adapt,
    fuse_again,
    restore,
    unfuse,
)
from lorakit.core.sites import CONVOLUTION, EMBEDDING, Site, site_of
from lorakit.core.weights import base_weight_of
from lorakit.errors import AdapterError, AdapterMismatchError, ConfigError, TargetError, bullet_list, nearest

_HANDLE = "_lorakit"


@dataclass
class _Resident:
    """One adapter in the model: its config, its slot, and the modules it changes."""

    config: LoRAConfig
    slot: str
    modules: dict[str, AdaptedModule] = field(default_factory=dict)  # path -> module, in the model's order

    def updates(self) -> Iterator[tuple[str, LayerUpdate | Replacement]]:
        for path, module in self.modules.items():
            yield path, cast("LayerUpdate | Replacement", module.lorakit_updates[self.slot])


def attach(
    model: nn.Module,
    adapter: LoRAConfig | Adapter | str | Path,
    name: str = "default",
    *,
    trainable: bool | None = None,
    seed: int = 0,
    check_base: bool = True,
) -> AttachedAdapters:
    """Give `model` its first adapter, in place, and activate it. The base is frozen: only the adapter's tensors can be
    trained.

    Args:
        model: any `nn.Module` with layers that multiply.
        adapter: a config (a fresh adapter, whose update is zero), an `Adapter`, or the path of a saved one.
        name: any non-empty string.
        trainable: whether its tensors require gradients; None: a fresh one yes, a loaded one no.
        seed: determines the initial values, together with each layer's path.
        check_base: refuse an adapter that was made on another base.

    Raises:
        AdapterError: the model has adapters already.
        TargetError: the config names what is not in the model or cannot be adapted; the model is untouched.
        AdapterMismatchError: the saved adapter does not fit; the model is untouched.
        AdapterFileError: the file is damaged or not an adapter.
    """
    if _HANDLE in model.__dict__:
        raise AdapterError("this model has adapters already; add more with lorakit.adapters(model).add(name, config)")
    handle = AttachedAdapters(model)
    handle.add(name, adapter, trainable=trainable, seed=seed, check_base=check_base)
    handle._enter_model()
    handle.activate(name)
    return handle


def adapters(model: nn.Module) -> AttachedAdapters:
    """The handle of a model that `attach` was called on.

    Raises:
        AdapterError: it has no adapters.
    """
    handle = model.__dict__.get(_HANDLE)
    if handle is None:
        raise AdapterError(f"this {type(model).__name__} has no adapters; lorakit.attach(model, config) gives it one")
    return cast("AttachedAdapters", handle)


@contextlib.contextmanager
def base_only(model: nn.Module) -> Iterator[None]:
    """Within the block `model` is its base, whether it has adapters or not."""
    handle = model.__dict__.get(_HANDLE)
    with contextlib.nullcontext() if handle is None else handle.disabled():
        yield


class AttachedAdapters:
    """All adapters of one model, by name. Made by `attach`; `adapters(model)` finds it again."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self._state = ActiveState()
        self._residents: dict[str, _Resident] = {}
        self._slots = 0
        self._base_flags: list[tuple[nn.Parameter, bool]] = []
        self._unfused: list[tuple[nn.Module, str, Any]] = []
        self._base_info: BaseInfo | None = None

    def __repr__(self) -> str:
        return f"AttachedAdapters({type(self.model).__name__}, names={list(self.names)}, active={self.active})"

    # ------------------------------------------------------------ which

    @property
    def names(self) -> tuple[str, ...]:
        """Names of resident adapters, oldest first."""
        return tuple(self._residents)

    @property
    def active(self) -> dict[str, float]:
        """Active adapters and their weights."""
        by_slot = {resident.slot: name for name, resident in self._residents.items()}
        return {by_slot[slot]: weight for slot, weight in self._state.active}

    def activate(self, which: str | Mapping[str, float] | Sequence[str] | None) -> None:
        """Use one adapter, several added up (a mapping name -> weight, or a list: weight 1 each), or none.

        Raises:
            AdapterError: an unknown name (with the nearest), or a weight that is not finite.
        """
        if which is None:
            weights: dict[str, float] = {}
        elif isinstance(which, str):
            weights = {which: 1.0}
        elif isinstance(which, Mapping):
            weights = dict(which)
        else:
            weights = dict.fromkeys(which, 1.0)
        bad = [f"{name}: {weight}" for name, weight in weights.items() if not math.isfinite(weight)]
        if bad:
            raise AdapterError(f"weights must be finite numbers: {', '.join(bad)}")
        self._state.active = tuple((self._resident(name).slot, float(weight)) for name, weight in weights.items())

    @contextlib.contextmanager
    def disabled(self) -> Iterator[None]:
        """Within the block the model is the base; what was active before is active again afterwards, whatever is
        raised.
        """
        before = self._state.active
        self._state.active = ()
        try:
            yield
        finally:
            resident = {each.slot for each in self._residents.values()}  # one may have been removed meanwhile
            self._state.active = tuple((slot, weight) for slot, weight in before if slot in resident)

    # ------------------------------------------------------------ in

    def add(
        self,
        name: str,
        adapter: LoRAConfig | Adapter | str | Path,
        *,
        trainable: bool | None = None,
        seed: int = 0,
        check_base: bool = True,
    ) -> None:
        """Make another adapter resident; it is not activated. Arguments and errors as in `attach`.

        Raises:
            AdapterError: the name is empty or taken.
        """
        if not name:
            raise AdapterError("an adapter needs a name of at least one character")
        if name in self._residents:
            raise AdapterError(f"adapter {name!r} is already there; remove it first, or choose another name")
        if isinstance(adapter, str | Path):
            adapter = Adapter.load(adapter)
        config = adapter.config if isinstance(adapter, Adapter) else adapter
        trainable = isinstance(adapter, LoRAConfig) if trainable is None else trainable
        targets = find_targets(self.model, config)
        modules = dict(self.model.named_modules())
        self._refuse_overlap(targets, modules)
        if isinstance(adapter, Adapter):
            self._refuse_mismatch(adapter, targets, modules, check_base=check_base)
            updates: dict[str, LayerUpdate | Replacement] = dict(_loaded_updates(adapter, targets))
            updates |= {path: _loaded_replacement(adapter, path, modules[path]) for path in targets.replaced}
        else:
            updates = dict(_fresh_updates(config, targets, modules, seed))
            updates |= {path: Replacement(modules[path]) for path in targets.replaced}
        self._insert(name, config, updates, modules, trainable=trainable)

    def load(
        self, adapter: Adapter | str | Path, name: str, *, trainable: bool = False, check_base: bool = True
    ) -> None:
        """Make a saved adapter resident under `name`; it is not activated. Errors as in `attach`."""
        self.add(
            name,
            Adapter.load(adapter) if isinstance(adapter, str | Path) else adapter,
            trainable=trainable,
            check_base=check_base,
        )

    # ------------------------------------------------------------ out

    def remove(self, name: str) -> None:
        """Take an adapter out; if it was active, it is so no more.

        Raises:
            AdapterError: no such adapter.
        """
        resident = self._resident(name)
        self._state.active = tuple((slot, weight) for slot, weight in self._state.active if slot != resident.slot)
        for module in resident.modules.values():
            del module.lorakit_updates[resident.slot]
            if not module.lorakit_updates:
                restore(module)
        del self._residents[name]
        if not self._residents:
            fuse_again(self._unfused)

    def detach(self) -> nn.Module:
        """Take every adapter out and give back the plain base model: same objects, same bits, same `requires_grad`."""
        for name in self.names:
            self.remove(name)
        for parameter, flag in self._base_flags:
            parameter.requires_grad_(flag)
        self._base_flags = []
        self.model.__dict__.pop(_HANDLE, None)
        return self.model

    def extract(self, name: str = "default") -> Adapter:
        """A copy of an adapter as a value, on the CPU, in the dtype it is held in.

        Raises:
            AdapterError: no such adapter.
        """
        resident = self._resident(name)
        factors: dict[str, Factors] = {}
        biases: dict[str, torch.Tensor] = {}
        replaced: dict[str, torch.Tensor] = {}
        for path, update in resident.updates():
            if isinstance(update, Replacement):
                replaced |= {f"{path}.{key}": _copied(tensor) for key, tensor in update.copy.state_dict().items()}
                continue
            if update.lora is not None:
                site = cast("Site", site_of(resident.modules[path]))
                factors[path] = Factors(
                    A=_copied(update.lora.A),
                    B=_copied(update.lora.B),
                    alpha=update.lora.alpha,
                    kind=site.kind,  # type: ignore[arg-type]
                )
            if update.bias is not None:
                biases[path] = _copied(update.bias)
        return Adapter(config=resident.config, factors=factors, biases=biases, replaced=replaced, base=self.base_info())

    def save(self, name: str, path: str | Path, format: str = "peft") -> Path:
        """Write an adapter to the folder `path`: `extract(name).save(path)`."""
        return self.extract(name).save(path, format=format)

    # ------------------------------------------------------------ about

    def trainable_tensors(self, name: str = "default") -> dict[str, nn.Parameter]:
        """All tensors an adapter trains, by stable names: "<path>.A", "<path>.B", "<path>.bias", or the parameter's
        own name.
        """
        return {
            f"{path}.{tensor}": parameter
            for path, update in self._resident(name).updates()
            for tensor, parameter in trainable(update)
        }

    def trainable_parameters(self) -> list[nn.Parameter]:
        """Every parameter of the model that requires a gradient: what an optimiser is given."""
        return [p for p in self.model.parameters() if p.requires_grad]

    def summary(self) -> dict[str, Any]:
        """Counts for printing and JSON: base and trained parameters, and per adapter its layers, ranks and bytes."""
        trained = sum(p.numel() for p in self.trainable_parameters())
        base = sum(p.numel() for _, p in self._base_parameters())
        return {
            "base_parameters": base,
            "trained_parameters": trained,
            "trained_share": trained / base if base else 0.0,
            "active": self.active,
            "adapters": {name: self._summary_of(name) for name in self.names},
        }

    def base_info(self) -> BaseInfo:
        """The fingerprint of the base (computed once; the base is frozen)."""
        if self._base_info is None:
            self._base_info = fingerprint.of(self.model, self._base_parameters())
        return self._base_info

    # ------------------------------------------------------------ inside

    def _summary_of(self, name: str) -> dict[str, Any]:
        tensors = self.trainable_tensors(name)
        loras = [update.lora for _, update in self._resident(name).updates() if isinstance(update, LayerUpdate)]
        return {
            "layers": sum(lora is not None for lora in loras),
            "ranks": sorted({lora.r for lora in loras if lora is not None}),
            "parameters": sum(p.numel() for p in tensors.values()),
            "bytes": sum(p.numel() * p.element_size() for p in tensors.values()),
        }

    def _resident(self, name: str) -> _Resident:
        if name not in self._residents:
            guess = nearest(name, self.names)
            hint = f"did you mean {guess[0]!r}?" if guess else f"resident: {', '.join(map(repr, self.names)) or 'none'}"
            raise AdapterError(f"no adapter {name!r}; {hint}")
        return self._residents[name]

    def _base_parameters(self) -> list[tuple[str, nn.Parameter]]:
        return [(name, p) for name, p in self.model.named_parameters() if "lorakit_updates." not in name]

    def _enter_model(self) -> None:
        self.model.__dict__[_HANDLE] = self

    def _refuse_overlap(self, targets: Targets, modules: Mapping[str, nn.Module]) -> None:
        """A module cannot be trained whole by one adapter and by a low-rank update of another."""
        low_rank = [*(t.path for t in targets.layers), *targets.biases]
        clash = [path for path in low_rank if isinstance(modules[path], ReplacedModule)]
        clash += [path for path in targets.replaced if isinstance(modules[path], AdaptedLayer)]
        if clash:
            raise TargetError(
                "trained whole (modules_to_save) by one adapter and by low-rank update or bias by another, "
                f"which cannot share a model:\n{bullet_list(clash)}"
            )

    def _refuse_mismatch(
        self, adapter: Adapter, targets: Targets, modules: Mapping[str, nn.Module], *, check_base: bool
    ) -> None:
        """Every tensor of the value must have its place in the model, and every place its tensor."""
        expected = _expected_shapes(adapter, targets, modules)
        found = {name: tuple(tensor.shape) for name, tensor in adapter.tensors().items()}
        problems = fingerprint.differences(adapter.base, self.base_info()) if check_base and adapter.base else []
        problems += [f"missing: {name} {shape}" for name, shape in expected.items() if name not in found]
        problems += [f"unexpected: {name} {shape}" for name, shape in found.items() if name not in expected]
        problems += [
            f"shape: {name} is {found[name]} in the adapter, {shape} in the model"
            for name, shape in expected.items()
            if name in found and found[name] != shape
        ]
        if problems:
            raise AdapterMismatchError(
                f"the adapter does not fit this {type(self.model).__name__}; nothing was loaded:\n"
                f"{bullet_list(problems)}\n"
                "Load the base it was trained on"
                + (f" ({adapter.base.name})" if adapter.base and adapter.base.name else "")
                + ", or pass check_base=False if only the base's values are known to differ."
            )

    def _insert(
        self,
        name: str,
        config: LoRAConfig,
        updates: Mapping[str, LayerUpdate | Replacement],
        modules: Mapping[str, nn.Module],
        *,
        trainable: bool,
    ) -> None:
        if not self._residents and not self._base_flags:
            self._base_flags = [(p, p.requires_grad) for p in self.model.parameters()]
            for parameter, _ in self._base_flags:
                parameter.requires_grad_(False)
        if not self._residents:
            self._unfused = unfuse(self.model)
        resident = _Resident(config, slot=str(self._slots))
        self._slots += 1
        for path, module in modules.items():
            if path not in updates:
                continue
            update = updates[path]
            site = site_of(module)
            weight = next(module.parameters())
            adapted = adapt(module, ReplacedModule if isinstance(update, Replacement) else AdaptedLayer, self._state)
            if isinstance(adapted, AdaptedLayer):
                adapted.lorakit_site = site
            update.requires_grad_(trainable).train(module.training)
            adapted.lorakit_updates[resident.slot] = update.to(weight.device)
            resident.modules[path] = adapted
        self._residents[name] = resident


def _expected_shapes(
    adapter: Adapter, targets: Targets, modules: Mapping[str, nn.Module]
) -> dict[str, tuple[int, ...]]:
    """Names (as `Adapter.tensors`) and shapes of every tensor an adapter with these targets must have."""
    shapes: dict[str, tuple[int, ...]] = {}
    for target in targets.layers:
        shape_A, shape_B = target.site.shapes(target.module, target.r, target.path)
        factors, channels = adapter.factors.get(target.path), getattr(target.module, "in_channels", None)
        if target.site is CONVOLUTION and factors is not None and factors.A.shape[1] == channels:
            shape_A = (shape_A[0], channels, *shape_A[2:])  # PEFT's A reads all channels of a grouped convolution
        shapes |= {f"{target.path}.A": shape_A, f"{target.path}.B": shape_B}
    shapes |= {f"{path}.bias": tuple(modules[path].get_parameter("bias").shape) for path in targets.biases}
    for path in targets.replaced:
        own = modules[path].state_dict()
        shapes |= {f"{path}.{key}": tuple(t.shape) for key, t in own.items() if "lorakit_updates." not in key}
    return shapes


def _copied(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.detach().to("cpu", copy=True)


def _seeded(seed: int, path: str) -> torch.Generator:
    """A generator that depends on the seed and the layer's path only: not on the order of layers, nor on what was
    drawn before.
    """
    digest = hashlib.sha256(f"{seed}|{path}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)


def _fresh_updates(
    config: LoRAConfig, targets: Targets, modules: Mapping[str, nn.Module], seed: int
) -> Iterator[tuple[str, LayerUpdate]]:
    loras = {target.path: _fresh_lora(config, target, seed) for target in targets.layers}
    for path in dict.fromkeys([*loras, *targets.biases]):
        bias = modules[path].get_parameter("bias").detach().float().clone() if path in targets.biases else None
        yield path, LayerUpdate(loras.get(path), bias)


def _fresh_lora(config: LoRAConfig, target: Target, seed: int) -> LoRA:
    base_weight_of(target.module, target.path)  # refuses a storage that cannot be read
    shape_A, shape_B = target.site.shapes(target.module, target.r, target.path)
    # an embedding looks up columns of A: its default starts with A zero, so that no rare token begins with a random row
    by_default = initializers.zero_A if target.site is EMBEDDING else initializers.default
    initializer = by_default if config.init == "default" else initializers.INITIALIZERS[config.init]
    if len(shape_A) > 2 and config.init == "orthogonal":
        raise ConfigError(f"{target.path}: init 'orthogonal' is defined for matrices, not for convolutions")
    start = initializer(shape_A, shape_B, _seeded(seed, target.path))
    return _lora(config, start.A, start.B, target.alpha)


def _lora(config: LoRAConfig, A: torch.Tensor, B: torch.Tensor, alpha: float) -> LoRA:
    return LoRA(A, B, alpha=alpha, s=lowrank.scale(alpha, A.shape[0], config.scaling), dropout=config.dropout)


def _loaded_updates(adapter: Adapter, targets: Targets) -> Iterator[tuple[str, LayerUpdate]]:
    """Updates from a value that was checked against the targets; copies, so that the value stays one."""
    loras = {
        path: _lora(adapter.config, f.A.detach().clone(), f.B.detach().clone(), f.alpha)
        for path, f in adapter.factors.items()
    }
    for path in dict.fromkeys([*loras, *targets.biases]):
        yield path, LayerUpdate(loras.get(path), adapter.biases[path].clone() if path in targets.biases else None)


def _loaded_replacement(adapter: Adapter, path: str, module: nn.Module) -> Replacement:
    replacement = Replacement(module)
    own = {name.removeprefix(f"{path}."): t for name, t in adapter.replaced.items() if name.startswith(f"{path}.")}
    replacement.copy.load_state_dict(own)
    return replacement
