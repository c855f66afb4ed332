"""How much memory a training step or an evaluation takes: its operations are run on the meta device, where tensors have
shapes and no numbers, and every allocation is counted while it lives.

Any architecture that transformers builds is traced as it is; there is no table of what layers keep. Rows run as they
would on a device: packed, or one by one where the model does not pack. Of a stack of equal layers two and three are
run, and the others counted like the third. What a single operation allocates for itself and gives back before it
returns is not seen: next to nothing, on a CPU (docs/log.md: what plans left out).
"""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from lorakit.data.batches import Batch
from lorakit.fusion import decoder_layers, fused
from lorakit.packing import packed_attention
from lorakit.training.objectives import Predictions


@dataclass(frozen=True)
class Traced:
    """Bytes beside weights and adapter.

    Attributes:
        peak: most that lives at once.
        kept: what the forward pass keeps for the backward pass, logits and their gradient excluded; 0 in evaluation.
        logits: the logits that are there at once, all of them or a chunk; their gradient takes their place.
        freed: what the model's forward pass allocated and gave back inside the autograd nodes of `core.kernels`,
            `packing` and the like, which record nothing there.
        freed_recorded: the same among operations that autograd records, each with a node that stays.
        products: matrix products of different shapes; no bytes, but kernels that a CPU makes and keeps for each.
    """

    peak: int
    kept: int
    logits: int
    freed: int
    freed_recorded: int
    products: int


_PRODUCTS = (torch.ops.aten.mm, torch.ops.aten.addmm, torch.ops.aten.addmm_)


class _Allocations(TorchDispatchMode):  # type: ignore[no-untyped-call]  # torch's __init_subclass__
    """Counts the bytes of every tensor storage that operations make, until it is freed: of those on one kind of device,
    beyond those that are `known`. And the shapes of products.
    """

    def __init__(self, known: Sequence[torch.Tensor], device: str = "meta") -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._device = device
        self.live = self.peak = self.late_peak = 0
        self.freed = dict.fromkeys((False, True), 0)  # outside and among what autograd records
        self.products: set[tuple[Any, ...]] = set()
        self._known = [tensor.untyped_storage() for tensor in known]  # held, so that they stay known
        # of each storage: its bytes, and whether it was made by an operation that autograd records
        self._sizes: dict[weakref.ref[Any], tuple[int, bool]] = {weakref.ref(s): (0, False) for s in self._known}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Mapping[str, Any] | None = None) -> Any:
        result = func(*args, **(kwargs or {}))
        given = [each for each in tree_leaves((args, kwargs)) if isinstance(each, torch.Tensor)]
        if func.overloadpacket in _PRODUCTS:
            self.products.add((func.overloadpacket, *(each.shape for each in given)))
        recorded = torch.is_grad_enabled() and any(each.requires_grad for each in given)
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor) and tensor.device.type == self._device:
                self._see(tensor.untyped_storage(), recorded)
        return result

    def _see(self, storage: torch.UntypedStorage, recorded: bool) -> None:
        reference = weakref.ref(storage, self._freed)
        if reference not in self._sizes:
            self._sizes[reference] = storage.nbytes(), recorded
            self.live += storage.nbytes()
            self.peak, self.late_peak = max(self.peak, self.live), max(self.late_peak, self.live)

    def begin_late(self) -> None:
        """Count `late_peak` from here on."""
        self.late_peak = self.live

    def _freed(self, reference: weakref.ref[Any]) -> None:
        size, recorded = self._sizes.pop(reference, (0, False))
        self.live -= size
        self.freed[recorded] += size


class AsOnDevices(TorchFunctionMode):
    """What the meta device does otherwise than devices with numbers. Autograd leaves such a mode before it begins, so
    layers that are computed again in the backward pass have to enter it anew (`recomputing.checkpoint_activations`).

    torch's attention is its fused call, which CPUs and GPUs take where it is possible; on the meta device torch would
    write all scores out. And transformers asks of the numbers whether all positions of a row follow one another: they
    do. It is the one question that models ask about all of something; others are left to raise.
    """

    def __init__(self) -> None:
        super().__init__()
        self._all: torch.Tensor | None = None

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is F.scaled_dot_product_attention and (fused := _fused_attention(*args, **kwargs)) is not None:
            return fused
        if func is torch.Tensor.__bool__ and args[0] is self._all:
            return True
        result = func(*args, **kwargs)
        if func is torch.Tensor.all and result.is_meta:
            self._all = result
        return result


def _fused_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    attn_mask: torch.Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> torch.Tensor | None:
    """What the fused call gives; None where a CPU has none for these: values of another width than keys, dropout."""
    if not (q.is_meta and q.ndim == 4 and q.shape[-1] == v.shape[-1] and dropout_p == 0):
        return None
    if attn_mask is not None and attn_mask.dtype == torch.bool:  # as torch does: it is kept for the backward pass
        attn_mask = torch.zeros_like(attn_mask, dtype=q.dtype)
    attend = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    out: torch.Tensor = attend(q, k, v, dropout_p, is_causal, attn_mask=attn_mask, scale=scale)[0]
    return out


def trace_step(model: Any, batch: Batch, longest: int) -> Traced:
    """A micro-batch forwards and backwards.

    Args:
        model: a causal language model on the meta device, an adapter attached and active, all of it there; if it keeps
            no activations, its layers enter `AsOnDevices` when they are computed again.
        batch: a micro-batch; its rows share what they begin with only if the model packs.
        longest: tokens of the longest row of the run.
    """
    model.train()
    layers = equal_layers(model)
    if layers is None or len(layers) <= 3:
        return _run(model, batch, longest, backward=True).traced
    with _shortened(layers, 2):
        two = _run(model, batch, longest, backward=True).traced
    with _shortened(layers, 3):
        of_three = _run(model, batch, longest, backward=True, late=layers[1])
    three, more = of_three.traced, len(layers) - 3
    kept = more * (three.kept - two.kept)
    # What the first layer makes for all (masks, say) may take most while little is kept: it does not grow with layers.
    peak = max(three.peak, of_three.late_peak + kept)
    return replace(
        three,
        peak=peak,
        kept=three.kept + kept,
        freed=three.freed + more * (three.freed - two.freed),
        freed_recorded=three.freed_recorded + more * (three.freed_recorded - two.freed_recorded),
    )


@torch.no_grad()
def trace_evaluation(model: Any, batch: Batch, longest: int) -> Traced:
    """A micro-batch forwards only, of which nothing is kept; arguments as `trace_step`."""
    model.eval()
    layers = equal_layers(model)
    with contextlib.nullcontext() if layers is None else _shortened(layers, 2):
        return _run(model, batch, longest, backward=False).traced


class _Ran(NamedTuple):
    traced: Traced
    late_peak: int  # since the module `late` was first run


def _run(model: Any, batch: Batch, longest: int, *, backward: bool, late: nn.Module | None = None) -> _Ran:
    """As training and evaluation run a model, every allocation counted. Gradients have their memory beforehand, as in
    `training.gradients`.
    """
    trained = [p for p in model.parameters() if p.requires_grad]
    for parameter in trained:
        parameter.grad = torch.zeros_like(parameter)
    known = [*model.parameters(), *model.buffers(), *(p.grad for p in trained if p.grad is not None)]
    with fused(model), packed_attention(model, longest) as packs, AsOnDevices():
        here = batch.to("meta")
        if not packs:  # a row alone asks which of the places are its own
            here = replace(here, predict=batch.predict)
        with _Allocations(known) as allocations, _on_first_call(late, allocations.begin_late):
            predictions = Predictions.of(model, here)
            logits, stay, freed = predictions.logits_nbytes, predictions.head is None, dict(allocations.freed)
            loss = predictions.loss_sum()
            del predictions
            kept = 0
            if backward:
                kept = allocations.live - (logits if stay else 0)
                torch.autograd.backward(loss)
    model.zero_grad(set_to_none=True)
    traced = Traced(
        peak=allocations.peak,
        kept=kept,
        logits=logits,
        freed=freed[False],
        freed_recorded=freed[True],
        products=len(allocations.products),
    )
    return _Ran(traced, allocations.late_peak)


@contextlib.contextmanager
def _on_first_call(module: nn.Module | None, tell: Callable[[], None]) -> Iterator[None]:
    """Within the block `tell` is called when the module is first run."""
    if module is None:
        yield
        return

    def told(*_: Any) -> None:
        hook.remove()
        tell()

    hook = module.register_forward_pre_hook(told)
    try:
        yield
    finally:
        hook.remove()


def equal_layers(model: Any) -> nn.ModuleList | None:
    """The model's decoder layers, if all of them have the same parts of the same shapes; else None."""
    layers = decoder_layers(model)
    if layers is None:
        return None
    shapes = [(type(layer), [(name, p.shape) for name, p in layer.named_parameters()]) for layer in layers]
    return layers if all(shape == shapes[0] for shape in shapes) else None


@contextlib.contextmanager
def _shortened(layers: nn.ModuleList, count: int) -> Iterator[None]:
    """Within the block only the first `count` of the layers are there."""
    rest = list(layers)[count:]
    del layers[count:]
    try:
        yield
    finally:
        layers.extend(rest)
