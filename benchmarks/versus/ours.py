"""Our side: steps as `lorakit train` takes them, the frozen products alone beside them, an evaluation."""

from __future__ import annotations

import contextlib
import statistics
import time
from collections.abc import Iterator
from typing import Any

import torch

import lorakit
from lorakit import LoRAConfig, TrainConfig, machine
from lorakit.core.layer import AdaptedLayer
from lorakit.data.chat import Example
from lorakit.data.sources import Origin
from lorakit.models import load_model
from lorakit.training.loop import accumulate, ready
from lorakit.training.objectives import mean_loss
from lorakit.training.optim import clip_gradients, make_optimizer, make_scaler
from lorakit.training.recomputing import checkpoint_activations
from versus.measure import peak_gb, timed
from versus.prepare import ADAM_BETAS, ADAM_EPSILON, CLIP, LEARNING_RATE, RANK, Steps

Result = dict[str, object]
Products = list[tuple[torch.Tensor, int, bool]]  # weight (out, in), rows that it meets, whether they get a gradient


class Side:
    """A model with a fresh adapter and an optimiser.

    Args:
        source: what `load_model` takes.
        dtype: of the base.
        dropout: of what enters the adapter.
        checkpointing: keep only what enters a layer.
    """

    def __init__(self, source: str, dtype: str, dropout: float = 0.0, checkpointing: bool = False) -> None:
        machine.keep_freed_memory()  # as `train` does, before the weights are there
        self.model, _ = load_model(source, dtype, "cpu")
        checkpoint_activations(self.model, on=checkpointing)
        self.tensors = lorakit.attach(self.model, LoRAConfig(r=RANK, dropout=dropout)).trainable_tensors()
        beta1, beta2 = ADAM_BETAS
        rates = {"learning_rate": LEARNING_RATE, "schedule": "constant", "warmup": 0.0}
        moments = {"adam_beta1": beta1, "adam_beta2": beta2, "adam_epsilon": ADAM_EPSILON}
        self.optimizer = make_optimizer(TrainConfig(model=source, data="-", **rates, **moments), self.tensors)
        self.scaler = make_scaler(self.model.dtype, torch.device("cpu"))

    def step(self, rows: list[Example], number: int, *, share: bool) -> tuple[float, float]:
        """One optimiser step over all rows: (loss, seconds)."""
        start = time.perf_counter()
        loss = accumulate(self.model, rows, [range(len(rows))], self.scaler, 0, number, share=share)
        clip_gradients(self.tensors, CLIP)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return loss, time.perf_counter() - start

    @contextlib.contextmanager
    def products(self) -> Iterator[Products]:
        """While entered, collects the products with frozen weights that forward passes make, as they are made."""
        made: Products = []

        def note(layer: Any, inputs: tuple[torch.Tensor, ...]) -> None:
            made.append((layer.weight, inputs[0].numel() // layer.weight.shape[1], inputs[0].requires_grad))

        layers = [layer for layer in self.model.modules() if isinstance(layer, AdaptedLayer)]
        handles = [layer.register_forward_pre_hook(note) for layer in (*layers, self.model.get_output_embeddings())]
        try:
            yield made
        finally:
            for handle in handles:
                handle.remove()


@torch.no_grad()
def floor_seconds(products: Products) -> float:
    """Time of the products alone: x W^T of each, then g W of those whose input gets a gradient; nothing else, into
    memory that is there.
    """
    shapes = {(rows, width) for weight, rows, _ in products for width in weight.shape}
    dtype = products[0][0].dtype
    x, y = ({shape: torch.randn(shape, dtype=dtype) for shape in shapes} for _ in range(2))
    start = time.perf_counter()
    for weight, rows, _ in products:
        torch.mm(x[rows, weight.shape[1]], weight.T, out=y[rows, weight.shape[0]])
    for weight, rows, has_gradient in reversed(products):
        if has_gradient:
            torch.mm(x[rows, weight.shape[0]], weight, out=y[rows, weight.shape[1]])
    return time.perf_counter() - start


def train(steps: Steps, source: str, dtype: str, dropout: float = 0.0, checkpointing: bool = False) -> Result:
    """The steps as `lorakit train` takes them."""
    side = Side(source, dtype, dropout, checkpointing)
    examples = _examples(steps)
    with ready(side.model, _longest(steps)) as share:
        taken = [side.step(rows, number, share=share) for number, rows in enumerate(examples)]
    losses, seconds = zip(*taken, strict=True)
    return timed(_tokens(steps), seconds, losses)


def floor(steps: Steps, source: str, dtype: str) -> Result:
    """The steps with nothing shared between rows, and after each its frozen products alone."""
    side = Side(source, dtype)
    losses, seconds, floors = [], [], []
    with ready(side.model, _longest(steps)):
        for number, rows in enumerate(_examples(steps)):
            with side.products() as products:
                loss, taken = side.step(rows, number, share=False)
            losses.append(loss)
            seconds.append(taken)
            floors.append(min(floor_seconds(products) for _ in range(2)))
    ratios = [step / alone for step, alone in zip(seconds[1:], floors[1:], strict=True)]
    work = sum(2 * weight.numel() * rows * (1 + has_gradient) for weight, rows, has_gradient in products)
    return {
        **timed(_tokens(steps), seconds, losses),
        "floor_seconds": [round(each, 3) for each in floors],
        "floor_gflops": round(work / floors[-1] / 1e9, 1),
        "floor_ratio": round(statistics.median(ratios), 3),
    }


def evaluate(steps: Steps, source: str, dtype: str) -> Result:
    """The rows of all steps once, as `lorakit train` evaluates."""
    side = Side(source, dtype)
    start = time.perf_counter()
    loss, labelled = mean_loss(side.model, [row for rows in _examples(steps) for row in rows])
    rate = sum(_tokens(steps)) / (time.perf_counter() - start)
    return {"tokens_per_second": round(rate, 1), "peak_gb": peak_gb(), "loss": loss, "labelled": labelled}


def _examples(steps: Steps) -> list[list[Example]]:
    return [[Example(ids, trained, Origin("rows", i + 1)) for i, (ids, trained) in enumerate(rows)] for rows in steps]


def _tokens(steps: Steps) -> list[int]:
    return [sum(len(ids) for ids, _ in rows) for rows in steps]


def _longest(steps: Steps) -> int:
    return max(len(ids) for rows in steps for ids, _ in rows)
