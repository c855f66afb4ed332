"""The loss of a model on micro-batches, for training and for evaluation. Knows no optimiser and no loop."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from lorakit.adapter.in_use import first_tokens, virtual_tokens
from lorakit.core import cross_entropy
from lorakit.data.batches import Batch, plan_evaluation
from lorakit.data.chat import Example
from lorakit.fusion import fused
from lorakit.packing import collated, packed_attention, packed_hidden, packed_logits, separable_head


@dataclass(frozen=True)
class Predictions:
    """What a model says of the targets of a micro-batch, by what its output head is.

    Attributes:
        values: with `head`, what enters it where targets are predicted, (P, d); else the logits, (L, V).
        head: the output head, where logits can be computed from what enters it, a chunk at a time.
        targets: (L,) tokens.
        source: (L,) which of the P places predicts each target; None: each its own, or there is no head.
    """

    values: torch.Tensor
    head: nn.Linear | None
    targets: torch.Tensor
    source: torch.Tensor | None

    @classmethod
    def of(cls, model: nn.Module, batch: Batch) -> Predictions:
        """Run a micro-batch through a causal language model, which packs only inside `packed_attention(model)`."""
        head = separable_head(model)
        if head is None:
            return cls(packed_logits(model, batch), None, batch.targets, None)
        return cls(packed_hidden(model, batch, head), head, batch.targets, batch.source)

    def loss_sum(self) -> torch.Tensor:
        """Sum of token losses, fp32 (fp64 of fp64), with gradient; once, as logits may become workspace."""
        if self.head is None:
            return cross_entropy.cross_entropy_sum(self.values, self.targets, overwrite=True)
        weight, bias = self.head.weight, self.head.bias
        return cross_entropy.linear_cross_entropy_sum(self.values, weight, bias, self.targets, self.source)

    def token_losses(self) -> torch.Tensor:
        """(L,) the loss of each target, without gradient."""
        if self.head is None:
            return cross_entropy.token_losses(self.values, self.targets)
        weight, bias = self.head.weight, self.head.bias
        return cross_entropy.linear_token_losses(self.values, weight, bias, self.targets, self.source)

    @property
    def logits_nbytes(self) -> int:
        """Bytes of the logits that are there at once."""
        if self.head is None:
            return self.values.untyped_storage().nbytes()
        weight = self.head.weight
        return cross_entropy.rows_at_once(len(self.values), weight) * len(weight) * self.values.element_size()


@torch.inference_mode()
def mean_loss(
    model: torch.nn.Module, examples: Sequence[Example], *, micro_batch_tokens: int = 4096
) -> tuple[float, int]:
    """Mean loss per labelled token, in no more memory than a training micro-batch takes.

    Args:
        model: a causal language model; its mode (train/eval) is set to eval and restored.
        examples: at least one labelled token in all.
        micro_batch_tokens: most tokens that go through the model at once (a longer row goes alone).

    Returns:
        (loss, labelled tokens)
    """
    total, tokens = 0.0, 0
    for _, losses in _evaluated(model, examples, micro_batch_tokens):
        total += float(losses.sum())
        tokens += len(losses)
    if tokens == 0:
        raise ValueError("mean_loss: no labelled token in any example")
    return total / tokens, tokens


@torch.inference_mode()
def losses_by_example(
    model: torch.nn.Module, examples: Sequence[Example], *, micro_batch_tokens: int = 4096
) -> list[tuple[float, int]]:
    """For each example its sum of token losses and its labelled tokens; arguments as in `mean_loss`."""
    found = [(0.0, 0)] * len(examples)
    for batch, losses in _evaluated(model, examples, micro_batch_tokens):
        counts = [sum(examples[row].trained[1:]) for row in batch.rows]
        own = torch.split(losses.double(), counts)
        for row, of_row, count in zip(batch.rows, own, counts, strict=True):
            found[row] = float(of_row.sum()), count
    return found


def _evaluated(
    model: torch.nn.Module, examples: Sequence[Example], micro_batch_tokens: int
) -> Iterator[tuple[Batch, torch.Tensor]]:
    """All examples in micro-batches, each with the losses (L,) of its targets; the model in eval mode."""
    device = next(model.parameters()).device
    was_training = model.training
    model.eval()
    try:
        first = len(first_tokens(model))
        lengths = [first + len(example.ids) for example in examples]
        longest = virtual_tokens(model) + max(len(example.ids) for example in examples)
        with fused(model), packed_attention(model, longest) as packs:
            for indices in plan_evaluation(lengths, micro_batch_tokens=micro_batch_tokens):
                batch = collated(model, examples, indices, share=packs).to(device)
                yield batch, Predictions.of(model, batch).token_losses()
    finally:
        model.train(was_training)
