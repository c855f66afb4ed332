"""Losses as pure functions of logits and targets. Knows no optimiser and no loop."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch.autograd.function import once_differentiable

from lorakit.data.batches import Batch, collate, plan_evaluation
from lorakit.data.chat import Example
from lorakit.fusion import fused
from lorakit.packing import packed_attention, packed_logits

# How many logits the loss looks at together: it passes over them several times, so on a CPU few enough to stay in the
# cache (2 MiB in fp32), elsewhere enough to be worth a launch.
_CHUNK_ON_CPU = 1 << 19
_CHUNK = 1 << 22


def _chunk_rows(logits: torch.Tensor) -> int:
    """How many rows of `logits` (L, V) make a chunk."""
    return max(1, (_CHUNK_ON_CPU if logits.device.type == "cpu" else _CHUNK) // logits.shape[1])


class _CrossEntropySum(torch.autograd.Function):
    """Sum of token losses; the gradient is computed in the forward pass, chunk by chunk, in the dtype of the logits.

    Never holds an fp32 copy of all logits: per chunk of rows, loss = -log softmax(z)[target] and dloss/dz =
    softmax(z) - onehot(target).
    """

    @staticmethod
    def forward(ctx: Any, logits: torch.Tensor, targets: torch.Tensor, overwrite: bool) -> torch.Tensor:
        gradient = None  # (L, V)
        if ctx.needs_input_grad[0]:
            gradient = logits if overwrite else torch.empty_like(logits)
        total = logits.new_zeros((), dtype=torch.float32)
        step = _chunk_rows(logits)
        for start in range(0, len(logits), step):
            chunk = logits[start : start + step]  # (l, V)
            target = targets[start : start + step, None]  # (l, 1)
            own = None if gradient is None else gradient[start : start + step]
            in_place = own if own is not None and own.dtype == torch.float32 else None
            log_p = torch.log_softmax(chunk, dim=-1, dtype=torch.float32, out=in_place)
            total -= log_p.gather(1, target).sum()
            if own is not None:
                softmax = log_p.exp_()
                softmax.scatter_add_(1, target, softmax.new_full((1, 1), -1.0).expand_as(target))
                if softmax is not own:
                    own.copy_(softmax)
        if gradient is not None:
            ctx.gradient = gradient
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grad_outputs: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        gradient, ctx.gradient = ctx.gradient, None  # scaled in place, so it is there once
        if gradient is None:
            raise RuntimeError("cross_entropy_sum: its gradient can be taken once; compute the loss again")
        return gradient.mul_(grad_outputs[0]), None, None


def cross_entropy_sum(logits: torch.Tensor, targets: torch.Tensor, *, overwrite: bool = False) -> torch.Tensor:
    """Sum over tokens of -log softmax(logits)[target].

    Args:
        logits: (L, V), fp32, bf16 or fp16.
        targets: (L,) int64, each in [0, V).
        overwrite: keep the gradient where the logits were, if nothing in their graph needs them any more (see
            `read_by_nobody`): half the memory, and memory that is at hand.

    Returns:
        fp32 scalar; 0 with zero gradient for L = 0.
    """
    may = overwrite and read_by_nobody(logits)
    loss: torch.Tensor = _CrossEntropySum.apply(logits, targets, may)  # type: ignore[no-untyped-call]
    return loss


_VIEWS = re.compile(r"(Squeeze|Unsqueeze|UnsafeView|View|Reshape)Backward\d*")
_PRODUCTS = re.compile(r"(Mm|Addmm|_LoRALinears)Backward\d*")


def read_by_nobody(result: torch.Tensor) -> bool:
    """Whether a tensor comes out of a matrix product, looked at in another shape at most: its backward pass needs what
    went in, not what came out. (Where this were wrong autograd would raise: it sees that the tensor has changed.)
    """
    node = result.grad_fn
    while node is not None and _VIEWS.fullmatch(node.name()):
        node = node.next_functions[0][0]
    return node is not None and _PRODUCTS.fullmatch(node.name()) is not None


def cross_entropy_sum_reference(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """What `cross_entropy_sum` computes, by torch's own function on an fp32 copy; the fast one is tested against it."""
    return torch.nn.functional.cross_entropy(logits.float(), targets, reduction="sum")


def token_losses(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """-log softmax(logits)[target] of each token; never an fp32 copy of all logits. No gradient.

    Args:
        logits: (L, V), fp32, bf16 or fp16.
        targets: (L,) int64, each in [0, V).

    Returns:
        (L,) fp32.
    """
    step = _chunk_rows(logits)
    losses = [logits.new_zeros(0, dtype=torch.float32)]
    for z, target in zip(torch.split(logits, step), torch.split(targets, step), strict=True):
        losses.append(torch.nn.functional.cross_entropy(z.float(), target, reduction="none"))
    return torch.cat(losses)


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
    for batch, logits in _evaluated(model, examples, micro_batch_tokens):
        total += float(cross_entropy_sum(logits, batch.targets))
        tokens += len(batch.targets)
    if tokens == 0:
        raise ValueError("mean_loss: no labelled token in any example")
    return total / tokens, tokens


@torch.inference_mode()
def losses_by_example(
    model: torch.nn.Module, examples: Sequence[Example], *, micro_batch_tokens: int = 4096
) -> list[tuple[float, int]]:
    """For each example its sum of token losses and its labelled tokens; arguments as in `mean_loss`."""
    found = [(0.0, 0)] * len(examples)
    for batch, logits in _evaluated(model, examples, micro_batch_tokens):
        counts = [sum(examples[row].trained[1:]) for row in batch.rows]
        own = torch.split(token_losses(logits, batch.targets).double(), counts)
        for row, losses, count in zip(batch.rows, own, counts, strict=True):
            found[row] = float(losses.sum()), count
    return found


def _evaluated(
    model: torch.nn.Module, examples: Sequence[Example], micro_batch_tokens: int
) -> Iterator[tuple[Batch, torch.Tensor]]:
    """All examples in micro-batches, each with the logits (L, V) that predict its targets; the model in eval mode."""
    device = next(model.parameters()).device
    was_training = model.training
    model.eval()
    try:
        lengths = [len(example.ids) for example in examples]
        with fused(model), packed_attention(model, max(lengths)) as packs:
            for indices in plan_evaluation(lengths, micro_batch_tokens=micro_batch_tokens):
                batch = collate(examples, indices, share=packs).to(device)
                yield batch, packed_logits(model, batch)
    finally:
        model.train(was_training)
