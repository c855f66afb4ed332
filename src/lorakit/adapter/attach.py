"""The adapters of a model: `attach` gives it the first, the handle has more come and go, and says which are active."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import nn

from lorakit.adapter import fingerprint, folding
from lorakit.adapter.config import LoRAConfig
from lorakit.adapter.entering import Prompts
from lorakit.adapter.folding import FoldReport
from lorakit.adapter.invocations import Watch
from lorakit.adapter.prompt_config import PromptConfig
from lorakit.adapter.resident import Asked, Resident, Update, updates_for
from lorakit.adapter.starts import Starts
from lorakit.adapter.updates import mixin_for
from lorakit.adapter.value import NO_LAYERS, Adapter, BaseInfo
from lorakit.core.active import NOTHING, ActiveState, Route, Selection
from lorakit.core.deltas import StackedUpdate
from lorakit.core.foreign import Foreign
from lorakit.core.layer import AdaptedModule, base_modules, base_parameters, batch_dim, fuse_again, unfuse
from lorakit.errors import AdapterError, nearest

_HANDLE = "_lorakit"


def attach(
    model: nn.Module,
    adapter: LoRAConfig | PromptConfig | Starts | Adapter | str | Path,
    name: str = "default",
    *,
    prompt: PromptConfig | None = None,
    tokenizer: Any = None,
    trainable: bool | None = None,
    seed: int = 0,
    check_base: bool = True,
) -> AttachedAdapters:
    """Give `model` its first adapter, in place, and activate it. The base is frozen: only the adapter's tensors can be
    trained.

    Args:
        model: any `nn.Module` with layers that multiply.
        adapter: a config (a fresh adapter, whose update is zero), one with `Starts` from data, an `Adapter`, or the
        path of a saved one. A `PromptConfig` is a soft prompt alone.
        name: any non-empty string.
        prompt: a soft prompt beside a fresh adapter's low-rank updates. It changes the model before the first step.
        tokenizer: for a soft prompt that begins as text.
        trainable: whether its tensors require gradients; None: a fresh one yes, a loaded one no.
        seed: determines the initial values, together with each layer's path.
        check_base: refuse an adapter that was made on another base.

    Raises:
        AdapterError: the model has adapters already.
        TargetError: the config names what is not in the model or cannot be adapted; the model is untouched.
        ConfigError: a soft prompt that begins as text, and no tokenizer.
        AdapterMismatchError: the saved adapter does not fit; the model is untouched.
        AdapterFileError: the file is damaged or not an adapter.
    """
    if _HANDLE in model.__dict__:
        raise AdapterError("this model has adapters already; add more with lorakit.adapters(model).add(name, config)")
    foreign = Foreign(model)
    try:
        handle = AttachedAdapters(model, foreign)
        handle.add(
            name, adapter, prompt=prompt, tokenizer=tokenizer, trainable=trainable, seed=seed, check_base=check_base
        )
    except BaseException:
        foreign.back()
        raise
    handle._enter_model()
    handle.activate(name)
    return handle


def adapters(model: nn.Module) -> AttachedAdapters:
    """The handle of a model that `attach` was called on.

    Raises:
        AdapterError: it has no adapters.
    """
    handle = handle_of(model)
    if handle is None:
        raise AdapterError(f"this {type(model).__name__} has no adapters; lorakit.attach(model, config) gives it one")
    return handle


@contextlib.contextmanager
def base_only(model: nn.Module) -> Iterator[None]:
    """Within the block `model` is its base, whether it has adapters or not."""
    handle = handle_of(model)
    with contextlib.nullcontext() if handle is None else handle.disabled():
        yield


def handle_of(model: nn.Module) -> AttachedAdapters | None:
    """The same; None where there are none."""
    return model.__dict__.get(_HANDLE)


class AttachedAdapters:
    """All adapters of one model, by name. Made by `attach`; `adapters(model)` finds it again.

    Attributes:
        prompts: their soft prompts.
        watch: looks for the invocations of activated ones.
        state_class: of what all adapted layers share.
        dressed: class an adapted module is given -> a subclass of it to give instead, on which a facade shows its own
        names.
    """

    state_class: ClassVar[type[ActiveState]] = ActiveState
    dressed: ClassVar[Mapping[type[AdaptedModule], type[AdaptedModule]]] = {}

    def __init__(self, model: nn.Module, foreign: Foreign | None = None) -> None:
        self.model = model
        self._foreign = foreign
        self._state = self.state_class()
        self.prompts = Prompts(model, self._state)
        self._residents: dict[str, Resident] = {}
        self._slots = 0
        self._base_flags: list[tuple[nn.Parameter, bool]] = []
        self._unfused: list[tuple[nn.Module, str, Any]] = []
        self._base_info: BaseInfo | None = None
        self.watch = Watch()

    def __repr__(self) -> str:
        return f"AttachedAdapters({type(self.model).__name__}, names={list(self.names)}, active={self.active})"

    # ------------------------------------------------------------ which

    @property
    def names(self) -> tuple[str, ...]:
        """Names of resident adapters, oldest first."""
        return tuple(self._residents)

    @property
    def active(self) -> dict[str, float]:
        """Active adapters and their weights, for this thread.

        Raises:
            AdapterError: inside `route`, where each row has its own.
        """
        selection = self._state.current()
        if isinstance(selection, Route):
            raise AdapterError("inside route() each row has its own adapter: there is no one answer to what is active")
        by_slot = {resident.slot: name for name, resident in self._residents.items()}
        return {by_slot[slot]: weight for slot, weight in selection.weights if slot in by_slot}

    def activate(self, which: str | Mapping[str, float] | Sequence[str] | None) -> None:
        """Use one adapter, several added up (a mapping name -> weight, or a list: weight 1 each), or none.

        Holds for all threads; inside `disabled` or `route`, for the rest of the block.

        Raises:
            AdapterError: an unknown name (with the nearest), a weight that is not finite, two soft prompts, or one
            whose weight is not 1.
        """
        self._refuse_while_merged("activate")
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
        selection = Selection(tuple((self._resident(name).slot, float(weight)) for name, weight in weights.items()))
        self._refuse_sum_of_prompts(selection)
        self._state.choose(selection)

    @contextlib.contextmanager
    def disabled(self) -> Iterator[None]:
        """Within the block the model is the base, for the thread (or asyncio task) that runs it; what was active before
        is active again afterwards, whatever is raised.
        """
        self._refuse_while_merged("disabled")
        with self._state.block(NOTHING):
            yield

    @contextlib.contextmanager
    def route(self, names: Sequence[str | None]) -> Iterator[None]:
        """Within the block each row of a batch uses its own adapter, or none: row i `names[i]`.

        Holds for the thread (or asyncio task) that runs the block, so several threads can each have their own. A batch
        of another number of rows is an error: beams and guidance repeat rows, so repeat their names. Training works
        too, but with gradient checkpointing on a GPU, whose backward pass runs in a thread of its own, use `activate`.

        Raises:
            AdapterError: an unknown name (with the nearest), or no name at all.
        """
        self._refuse_while_merged("route")
        if isinstance(names, str) or not names:
            raise AdapterError(f"route needs a list with one name (or None) for each row of the batch, got {names!r}")
        dim = batch_dim(self.model)
        route = Route([None if name is None else self._resident(name).slot for name in names])

        def note(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            if self._state.current() is route:  # another thread may be in a route of its own
                gone = set(route.slots) - {None, *(resident.slot for resident in self._residents.values())}
                if gone:
                    raise AdapterError("an adapter of this route was removed or replaced; enter route() again")
                batch = next((v for v in (*args, *kwargs.values()) if isinstance(v, torch.Tensor) and v.ndim), None)
                if batch is not None:
                    # sequences first, tokens in one line would not lie row after row
                    one_line = dim == 0 and batch.ndim > 1
                    route.check_batch(batch.shape[dim], batch.shape[1] if one_line else None)

        hook = self.model.register_forward_pre_hook(note, with_kwargs=True)
        try:
            with self._state.block(route):
                yield
        finally:
            hook.remove()

    @contextlib.contextmanager
    def rows_only(self, rows: Sequence[int]) -> Iterator[None]:
        """Within the block a running route is of these of its rows alone, in this order; without a route, nothing
        changes.

        Raises:
            AdapterError: an adapter of the route is gone.
        """
        selection = self._state.current()
        if not isinstance(selection, Route):
            yield
            return
        by_slot = {resident.slot: name for name, resident in self._residents.items()}
        slots = [selection.slots[row] for row in rows]
        if set(slots) - {None, *by_slot}:
            raise AdapterError("an adapter of this route was removed or replaced; enter route() again")
        with self.route([None if slot is None else by_slot[slot] for slot in slots]):
            yield

    def prompted(self, input_ids: torch.Tensor, attention_mask: torch.Tensor | None = None) -> dict[str, torch.Tensor]:
        """A batch with the virtual tokens of the soft prompts in use before its rows: arguments for `model(...)` and
        `model.generate(...)` of transformers. (`lorakit.generate` and training put them there themselves.)

        Logits stand for as many more tokens as the rows have got, a prefix's excepted, and labels must too. On a model
        whose attention has a sliding window, rows with a prefix must be of equal length once a batch is longer than it.

        Args:
            input_ids: (rows, n), shorter rows filled up on either side.
            attention_mask: (rows, n) 1 where there is a token; None: everywhere.

        Returns:
            `input_ids` and `attention_mask`.

        Raises:
            AdapterError: inside a route of another number of rows.
        """
        mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        ids, mask = self.prompts.before(input_ids, mask)
        return {"input_ids": ids, "attention_mask": mask}

    # ------------------------------------------------------------ folded in

    @contextlib.contextmanager
    def merged(self) -> Iterator[None]:
        """Within the block the active adapters are part of the weights, and the model runs at the base's speed; then
        the base's own parameters are back, the same objects, whatever is raised.

        The folded weights stand beside the base's meanwhile. It holds for all threads. Nothing else can be done with
        the adapters inside. Folding is in fp32, rounded to each weight's dtype.

        Raises:
            AdapterError: nothing is active, or an update cannot be folded in; the model is as it was.
        """
        self._refuse_while_merged("merged")
        selection = self.active_selection()
        exchange = folding.Exchange()
        exchange.put(self.adapted_modules(), selection)
        self._state.folded = True
        try:
            yield
        finally:
            exchange.back()
            self._state.folded = False

    def merge_report(self, *, seed: int | None = None) -> FoldReport:
        """What `merge` would do: per parameter, how much of the update survives rounding. Changes nothing.

        Of a quantised weight: how much survives in its own format, in which `merge` does not write.

        Raises:
            AdapterError: as in `merge`, or a format that lorakit does not write (the K formats of GGUF files).
        """
        return folding.preview(self.model, self.adapted_modules(), self.active_selection(), seed)

    def merge(
        self, *, minimum_survival: float = folding.MINIMUM_SURVIVAL, rounding: str = "nearest", seed: int = 0
    ) -> nn.Module:
        """Fold the active adapters into the base for good and give back the plain model, adapted no more.

        Weights keep their dtype; a wider one is had by `model.float()` before. Every weight is computed twice, first to
        see that all of them can be folded in; at most one is held beside the model. A weight shared with another module
        (embeddings tied to the head) is untied first.

        Args:
            minimum_survival: share of the update that must survive rounding.
            rounding: "nearest", or "stochastic", which keeps small updates in the mean.
            seed: determines the draws of stochastic rounding.

        Raises:
            AdapterError: nothing is active, an update cannot be folded in, too little of it would survive, or the
            weights are quantised; the model is as it was.
        """
        self._refuse_while_merged("merge")
        if rounding not in ("nearest", "stochastic"):
            raise AdapterError(f"rounding is 'nearest' or 'stochastic' (got {rounding!r})")
        draws = seed if rounding == "stochastic" else None
        folding.require_dense(self.adapted_modules(), self.active_selection())
        self.merge_report(seed=draws).check(minimum_survival)
        folding.fold_in(self.model, self.adapted_modules(), self.active_selection(), draws)
        return self.detach()

    # ------------------------------------------------------------ in

    def add(
        self,
        name: str,
        adapter: LoRAConfig | PromptConfig | Starts | Adapter | str | Path,
        *,
        prompt: PromptConfig | None = None,
        tokenizer: Any = None,
        trainable: bool | None = None,
        seed: int = 0,
        check_base: bool = True,
        replace: bool = False,
    ) -> None:
        """Make another adapter resident; it is not activated. Arguments and errors as in `attach`.

        Args:
            name: any non-empty string.
            adapter: as in `attach`.
            prompt: as in `attach`.
            tokenizer: as in `attach`.
            trainable: as in `attach`.
            seed: as in `attach`.
            check_base: as in `attach`.
            replace: take the place of a resident adapter of that name, whatever its rank and targets. Where it was
            active the new one is, in one step once all its layers are in; where the new one does not fit, the old one
            stays. A route that another thread has open on the old one ends with an error at its next pass.

        Raises:
            AdapterError: the name is empty, or taken and not to be replaced.
        """
        self._refuse_while_merged("add")
        if not name:
            raise AdapterError("an adapter needs a name of at least one character")
        if name in self._residents and not replace:
            raise AdapterError(
                f"adapter {name!r} is already there; pass replace=True, remove it first, or choose another name"
            )
        if isinstance(adapter, str | Path):
            adapter = Adapter.load(adapter, model=self.model)
        if isinstance(adapter, PromptConfig | Adapter) and prompt is not None:
            raise AdapterError("prompt: is for a fresh adapter of low-rank updates; this one has its own, or none")
        if isinstance(adapter, PromptConfig):
            prompt, adapter = adapter, NO_LAYERS
        elif isinstance(adapter, Adapter):
            prompt = None if adapter.prompt is None else adapter.prompt.config
        if not isinstance(adapter, Adapter | LoRAConfig | Starts):
            raise AdapterError(
                f"an adapter is a LoRAConfig or PromptConfig (a fresh one), an Adapter or a path, not "
                f"{type(adapter).__name__}"
                + ("; LoRAConfig.from_dict makes a config of a dict" if isinstance(adapter, dict) else "")
            )
        modules = dict(base_modules(self.model))
        fresh = isinstance(adapter, LoRAConfig | Starts)
        here = None if fresh or not check_base else self.base_info()
        with self.disabled():  # a prefix begins as what the base keeps of tokens
            asked = Asked.of(self.model, prompt, modules, tokenizer)
            config, kinds, updates = updates_for(self.model, adapter, modules, seed=seed, here=here, asked=asked)
        if not updates:
            raise AdapterError(
                f"{name!r}: nothing is to be trained: target_modules is none, and there is no soft prompt"
            )
        if (asked or self.prompts) and (config.alora_invocation_tokens or self.watch.invocations):
            raise AdapterError(
                f"{name!r}: a soft prompt and an activated adapter (aLoRA) do not go into one model: its invocation is "
                "sought among the tokens of rows, and keys and values of a prefix are of none; remove the other one "
                "first"
            )
        before = self._residents.get(name)
        self._freeze_base()
        resident = Resident(config, str(self._slots), kinds, None if asked is None else asked.config)
        self._slots += 1
        self._put(resident, updates, modules, trainable=fresh if trainable is None else trainable)
        self._residents[name] = resident
        if (invocation := resident.invocation) is not None:
            self.watch.take(self.model, resident.slot, invocation)
        if asked is not None and resident.prompt is not None:
            self.prompts.add(resident.slot, resident.prompt, asked.place.vocabulary)
        if before is not None:
            self._take_place(before, resident, name)

    def _take_place(self, before: Resident, resident: Resident, name: str) -> None:
        """Let an adapter take another one's place, in what is active too.

        Raises:
            AdapterError: its soft prompt cannot be used there; the other one stays, and it is gone again.
        """
        chosen = self._state.everywhere.weights
        exchanged = Selection(
            tuple((resident.slot if slot == before.slot else slot, weight) for slot, weight in chosen)
        )
        try:
            self._refuse_sum_of_prompts(exchanged)
        except AdapterError:
            self._residents[name] = before
            self._take_out(resident)
            raise
        self._state.everywhere = exchanged
        self._take_out(before)

    def load(
        self,
        adapter: Adapter | str | Path,
        name: str,
        *,
        trainable: bool = False,
        check_base: bool = True,
        replace: bool = False,
    ) -> None:
        """Make a saved adapter resident under `name`; it is not activated. Arguments and errors as in `add`."""
        self.add(name, adapter, trainable=trainable, check_base=check_base, replace=replace)

    # ------------------------------------------------------------ out

    def remove(self, name: str) -> None:
        """Take an adapter out; if it was active, it is so no more.

        Raises:
            AdapterError: no such adapter.
        """
        self._refuse_while_merged("remove")
        resident = self._resident(name)
        chosen = self._state.everywhere.weights
        self._state.everywhere = Selection(tuple((slot, w) for slot, w in chosen if slot != resident.slot))
        del self._residents[name]
        self._take_out(resident)
        if not self._residents:
            fuse_again(self._unfused)

    def detach(self) -> nn.Module:
        """Take every adapter out and give back the plain base model: same objects, same bits, same `requires_grad`."""
        self._refuse_while_merged("detach")
        for name in self.names:
            self.remove(name)
        for parameter, flag in self._base_flags:
            parameter.requires_grad_(flag)
        self._base_flags = []
        if self._foreign is not None:
            self._foreign.back()
        self.model.__dict__.pop(_HANDLE, None)
        return self.model

    def extract(self, name: str = "default") -> Adapter:
        """A copy of an adapter as a value, on the CPU, in the dtype it is held in. One that began as a part of the
        base's weight (PiSSA, OLoRA, LoRA-GA) is a plain one of twice the rank, for the same base.

        Raises:
            AdapterError: no such adapter.
        """
        return self._resident(name).value(self.base_info())

    def save(self, name: str, path: str | Path, format: str = "peft") -> Path:
        """Write an adapter to the folder `path`: `extract(name).save(path)`."""
        return self.extract(name).save(path, format=format, model=self.model)

    # ------------------------------------------------------------ about

    def trainable_tensors(self, name: str = "default") -> dict[str, nn.Parameter]:
        """All tensors an adapter trains, by stable names: "<path>.A", "<path>.B", "<path>.B.bias", "<path>.magnitude",
        "<path>.bias" (the layer's own), or the parameter's own name.
        """
        return self._resident(name).trainable_tensors()

    def fixed_tensors(self, name: str = "default") -> dict[str, torch.Tensor]:
        """What an adapter's update is computed from besides and no step changes, by stable names: "<path>.A0",
        "<path>.B0", where A and B began; with `lora_fa`, "<path>.A". A checkpoint needs them; empty for most adapters.
        """
        return self._resident(name).fixed_tensors()

    def output_side(self, name: str = "default") -> frozenset[str]:
        """Which of `trainable_tensors` LoRA+ gives a higher rate: every B and every vector, none of an embedding's."""
        return self._resident(name).output_side()

    def trainable_parameters(self) -> list[nn.Parameter]:
        """Every parameter that requires a gradient, of the adapters and (if somebody unfroze it) of the base: what an
        optimiser is given.
        """
        own = [p for name in self.names for p in self.trainable_tensors(name).values()]
        base = base_parameters(self.model).values()
        return [p for p in (*own, *base) if p.requires_grad]

    def prompt_side(self, name: str = "default") -> frozenset[str]:
        """Which of `trainable_tensors` are a soft prompt's."""
        return self._resident(name).prompt_side()

    def summary(self) -> dict[str, Any]:
        """Counts for printing and JSON: base and trained parameters, and per adapter its layers, ranks and bytes."""
        trained = sum(p.numel() for p in self.trainable_parameters())
        base = sum(p.numel() for p in base_parameters(self.model).values())
        return {
            "base_parameters": base,
            "trained_parameters": trained,
            "trained_share": trained / base if base else 0.0,
            "active": self.active,
            "adapters": {name: resident.summary() for name, resident in self._residents.items()},
        }

    def base_info(self) -> BaseInfo:
        """The fingerprint of the base (computed once; the base is frozen)."""
        if self._base_info is None:
            self._base_info = fingerprint.of(self.model, list(base_parameters(self.model).items()))
        return self._base_info

    # ------------------------------------------------------------ inside

    def _take_out(self, resident: Resident) -> None:
        self.prompts.remove(resident.slot)
        self.watch.leave(resident.slot)
        resident.take_out()

    def _refuse_sum_of_prompts(self, selection: Selection) -> None:
        """Virtual tokens have no weight, and of two soft prompts neither comes first.

        Raises:
            AdapterError: the selection has several, or one with another weight than 1.
        """
        having = {slot: weight for slot, weight in selection.weights if slot in self.prompts}
        names = ", ".join(repr(name) for name, resident in self._residents.items() if resident.slot in having)
        if len(having) > 1:
            raise AdapterError(f"{names} have a soft prompt each, and rows can begin with one: activate one of them")
        if any(weight != 1.0 for weight in having.values()):
            raise AdapterError(
                f"{names} has a soft prompt, which has no weight but 1 (got {next(iter(having.values()))})"
            )

    def _resident(self, name: str) -> Resident:
        if name not in self._residents:
            guess = nearest(name, self.names)
            hint = f"did you mean {guess[0]!r}?" if guess else f"resident: {', '.join(map(repr, self.names)) or 'none'}"
            raise AdapterError(f"no adapter {name!r}; {hint}")
        return self._residents[name]

    def adapted_modules(self) -> dict[str, AdaptedModule]:
        """Every module some adapter changes, by path, in the model's order."""
        return {path: module for path, module in base_modules(self.model) if isinstance(module, AdaptedModule)}

    def active_selection(self) -> Selection:
        """What is active, to be folded in.

        Raises:
            AdapterError: nothing is, each row has its own, or a soft prompt is among it.
        """
        selection = self._state.current()
        if isinstance(selection, Route):
            raise AdapterError("inside route() each row has its own adapter, so none can be folded into the weights")
        folding.require_active(selection)
        if self.prompts.in_use:
            raise AdapterError(
                "a soft prompt is active, which is no part of the weights and cannot be folded into them: take the "
                "adapter apart (extract(name).without_prompt() and .prompt_alone()), merge the one and keep the other"
            )
        return selection

    def _refuse_while_merged(self, what: str) -> None:
        if self._state.folded:
            raise AdapterError(f"{what}: not inside merged(), where the adapters are part of the weights")

    def _enter_model(self) -> None:
        self.model.__dict__[_HANDLE] = self

    def _class_for(self, module: nn.Module, update: Update | StackedUpdate) -> type[AdaptedModule]:
        mixin = mixin_for(module, update)
        return self.dressed.get(mixin, mixin)

    def _put(
        self,
        resident: Resident,
        updates: Mapping[str, Update],
        modules: Mapping[str, nn.Module],
        *,
        trainable: bool,
    ) -> None:
        resident.put(updates, modules, self._state, self._class_for, trainable=trainable)

    def _freeze_base(self) -> None:
        """Before an adapter comes in: nothing of the base is trained, and nothing fused hides a layer."""
        if not self._residents and not self._base_flags:
            self._base_flags = [(p, p.requires_grad) for p in self.model.parameters()]
            for parameter, _ in self._base_flags:
                parameter.requires_grad_(False)
        if not self._residents:
            self._unfused = unfuse(self.model)
