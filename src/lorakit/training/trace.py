"""How much memory a training step or an evaluation takes: its operations are run on the meta device, where tensors have
shapes and no numbers, and every allocation is counted while it lives.

Any architecture that transformers builds is traced as it is; there is no table of what layers keep. Of a stack of equal
layers one and two are run, and the others counted like the second. What a single operation allocates for itself and
gives back before it returns is not seen.
"""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from lorakit.data.batches import Batch
from lorakit.fusion import decoder_layers, fused
from lorakit.packing import unprobed_attention
from lorakit.training.objectives import Predictions


@dataclass(frozen=True)
class Traced:
    """Bytes beside weights and adapter.

    Attributes:
        peak: most that lives at once.
        kept: what the forward pass keeps for the backward pass, logits and their gradient excluded; 0 in evaluation.
        logits: the logits that are there at once, all of them or a chunk; their gradient takes their place.
    """

    peak: int
    kept: int
    logits: int


class _Allocations(TorchDispatchMode):  # type: ignore[no-untyped-call]  # torch's __init_subclass__
    """Counts the bytes of every tensor storage that operations make, until it is freed: of those on one kind of device,
    beyond those that are `known`.
    """

    def __init__(self, known: Sequence[torch.Tensor], device: str = "meta") -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._device = device
        self.live = self.peak = 0
        self._known = [tensor.untyped_storage() for tensor in known]  # held, so that they stay known
        self._sizes: dict[weakref.ref[Any], int] = {weakref.ref(storage): 0 for storage in self._known}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Mapping[str, Any] | None = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor) and tensor.device.type == self._device:
                self._see(tensor.untyped_storage())
        return result

    def _see(self, storage: torch.UntypedStorage) -> None:
        reference = weakref.ref(storage, self._freed)
        if reference not in self._sizes:
            self._sizes[reference] = storage.nbytes()
            self.live += storage.nbytes()
            self.peak = max(self.peak, self.live)

    def _freed(self, reference: weakref.ref[Any]) -> None:
        self.live -= self._sizes.pop(reference, 0)


def trace_step(model: Any, batch: Batch) -> Traced:
    """A micro-batch forwards and backwards.

    Args:
        model: a causal language model on the meta device, an adapter attached and active, all of it there. It is taken
            to pack rows: a probe would need numbers.
        batch: a micro-batch.
    """
    model.train()
    layers = equal_layers(model)
    if layers is None or len(layers) <= 2:
        return _step(model, batch)
    with _shortened(layers, 1):
        one = _step(model, batch)
    with _shortened(layers, 2):
        two = _step(model, batch)
    more = (len(layers) - 1) * (two.kept - one.kept)
    return Traced(one.peak + more, one.kept + more, one.logits)


@torch.no_grad()
def trace_evaluation(model: Any, batch: Batch) -> Traced:
    """A micro-batch forwards only, of which nothing is kept; arguments as `trace_step`."""
    model.eval()
    layers = equal_layers(model)
    with contextlib.nullcontext() if layers is None else _shortened(layers, 2):
        return _run(model, batch, backward=False)


def _step(model: Any, batch: Batch) -> Traced:
    traced = _run(model, batch, backward=True)
    model.zero_grad(set_to_none=True)
    return traced


def _run(model: Any, batch: Batch, *, backward: bool) -> Traced:
    """As training and evaluation run a model, every allocation counted."""
    batch, known = batch.to("meta"), [*model.parameters(), *model.buffers()]
    with fused(model), unprobed_attention(model), _Allocations(known) as allocations:
        predictions = Predictions.of(model, batch)
        logits, stay = predictions.logits_nbytes, predictions.head is None
        loss = predictions.loss_sum()
        del predictions
        kept = 0
        if backward:
            kept = allocations.live - (logits if stay else 0)
            loss.backward()  # type: ignore[no-untyped-call]
    return Traced(allocations.peak, kept, logits)


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
