"""Cross-entropy over a large vocabulary, its gradient computed in the forward pass, beside the plain forms it must
equal: of logits, or of what enters a frozen output head. Knows no model.

Of logits, no fp32 copy of all of them is ever there: softmax and gradient are made a few rows at a time. Of what enters
the head there are not even the logits: a chunk of them is computed, made into its gradient and multiplied back by the
head before the next one takes its place.
"""

from __future__ import annotations

import math
import re
from typing import Any

import torch
import torch.nn.functional as F
from torch.autograd.function import once_differentiable

# How many logits the loss looks at together: it passes over them several times, so on a CPU few enough to stay in the
# cache (2 MiB in fp32), elsewhere enough to be worth a launch.
_CHUNK_ON_CPU = 1 << 19
_CHUNK = 1 << 22

# Bytes of logits that a head makes at once. Each chunk reads the head's whole weight twice, which some hundred rows
# make up for: 340 of 49k logits in fp32, 220 of 150k in bf16.
_AT_ONCE = 128 << 20


def _wide(dtype: torch.dtype) -> torch.dtype:
    """What is computed in: fp32, or fp64 for fp64."""
    return torch.promote_types(dtype, torch.float32)


def _fill(
    losses: torch.Tensor,
    logits: torch.Tensor,
    targets: torch.Tensor,
    *,
    source: torch.Tensor | None = None,
    first: int = 0,
    gradient: torch.Tensor | None = None,
) -> None:
    """Loss = -log softmax(z)[target] of each target that some places predict, and dloss/dz, the sum over the targets
    of softmax(z) - onehot(target).

    Shapes depend on no numbers: it waits for no device, and runs where there are none (training.trace).

    Args:
        losses: (L,), wide; those of these places' targets are written.
        logits: (l, V), of the places `first`, `first + 1`, ...
        targets: (L,), those of all places.
        source: (L,), the place that predicts each target; None: each place its own.
        first: place of the first row of `logits`.
        gradient: (l, V), to be written, in the logits' dtype; may be `logits` itself. None: not wanted.
    """
    vocabulary = logits.shape[1]
    rows = max(1, (_CHUNK_ON_CPU if logits.device.type == "cpu" else _CHUNK) // vocabulary)
    for start in range(0, len(logits), rows):
        z = logits[start : start + rows]  # (n, V)
        place, n = first + start, len(z)
        own = None if gradient is None else gradient[start : start + rows]
        in_place = own if own is not None and own.dtype == losses.dtype else None
        log_p = torch.log_softmax(z, dim=-1, dtype=losses.dtype, out=in_place)
        if source is None:
            target = targets[place : place + n, None]  # (n, 1)
            losses[place : place + n] = log_p.gather(1, target).squeeze(1).neg_()
        else:
            row = source - place
            here = (row >= 0) & (row < n)  # (L,)
            row.clamp_(0, n - 1)
            torch.where(here, log_p[row, targets].neg_(), losses, out=losses)
        if own is None:
            continue
        slope = log_p.exp_()
        if source is None:
            slope.scatter_add_(1, target, slope.new_full((1, 1), -1.0).expand_as(target))
        else:
            one = here.to(slope.dtype)
            slope.mul_(slope.new_zeros(n).index_add_(0, row, one)[:, None])  # by how many targets a place predicts
            slope.index_put_((row, targets), one.neg_(), accumulate=True)
        if slope is not own:
            own.copy_(slope)


def token_losses(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """-log softmax(logits)[target] of each token. No gradient.

    Args:
        logits: (L, V), any floating dtype.
        targets: (L,) int64, each in [0, V).

    Returns:
        (L,) fp32; fp64 of fp64.
    """
    losses = torch.empty(len(targets), dtype=_wide(logits.dtype), device=logits.device)
    _fill(losses, logits.detach(), targets)
    return losses


class _CrossEntropySum(torch.autograd.Function):
    """Sum of token losses of logits; their gradient, in their dtype, may take their place."""

    @staticmethod
    def forward(ctx: Any, logits: torch.Tensor, targets: torch.Tensor, overwrite: bool) -> torch.Tensor:
        gradient = None  # (L, V)
        if ctx.needs_input_grad[0]:
            gradient = logits if overwrite else torch.empty_like(logits)
        losses = torch.empty(len(targets), dtype=_wide(logits.dtype), device=logits.device)
        _fill(losses, logits, targets, gradient=gradient)
        if gradient is not None:
            ctx.gradient = gradient
        return losses.sum()

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
        logits: (L, V), any floating dtype.
        targets: (L,) int64, each in [0, V).
        overwrite: keep the gradient where the logits were, if nothing in their graph needs them any more (see
            `read_by_nobody`): half the memory, and memory that is at hand.

    Returns:
        fp32 scalar (fp64 of fp64); 0 with zero gradient for L = 0.
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
    """What `cross_entropy_sum` computes, by torch's own function on a wide copy."""
    return F.cross_entropy(logits.to(_wide(logits.dtype)), targets, reduction="sum")


def rows_at_once(places: int, W: torch.Tensor) -> int:
    """Of how many places a head makes logits at once: all, or chunks of equal size within 128 MiB.

    Args:
        places: how many there are.
        W: (V, d), the head's weight.
    """
    most = max(1, _AT_ONCE // (W.shape[0] * W.element_size()))
    return math.ceil(places / max(1, math.ceil(places / most)))


def _fill_through_head(
    losses: torch.Tensor,
    hidden: torch.Tensor,
    W: torch.Tensor,
    b: torch.Tensor | None,
    targets: torch.Tensor,
    source: torch.Tensor | None,
    gradient: torch.Tensor | None,
) -> None:
    """`_fill` from what enters the head, chunk by chunk; `gradient` (P, d) is that of `hidden`."""
    rows = max(1, rows_at_once(len(hidden), W))
    buffer = hidden.new_empty(rows, W.shape[0])  # one for all chunks: memory that is at hand
    for start in range(0, len(hidden), rows):
        h = hidden[start : start + rows]  # (l, d)
        logits = buffer[: len(h)]  # (l, V), then their gradient
        if b is None:
            torch.mm(h, W.T, out=logits)
        else:
            torch.addmm(b, h, W.T, out=logits)
        slope = None if gradient is None else logits
        _fill(losses, logits, targets, source=source, first=start, gradient=slope)
        if gradient is not None:
            torch.mm(logits, W, out=gradient[start : start + rows])


@torch.no_grad()
def linear_token_losses(
    hidden: torch.Tensor,
    W: torch.Tensor,
    b: torch.Tensor | None,
    targets: torch.Tensor,
    source: torch.Tensor | None = None,
) -> torch.Tensor:
    """-log softmax(hidden W^T + b)[target] of each token, a chunk of logits at a time. No gradient.

    Args:
        hidden: as in `linear_cross_entropy_sum`, as the four after it.
        W: weight.
        b: bias.
        targets: tokens.
        source: which place predicts them.

    Returns:
        (L,) fp32; fp64 of fp64.
    """
    losses = torch.empty(len(targets), dtype=_wide(hidden.dtype), device=hidden.device)
    _fill_through_head(losses, hidden, W, b, targets, source, None)
    return losses


class _LinearCrossEntropySum(torch.autograd.Function):
    """Sum of token losses of hidden W^T + b, W and b frozen. Keeps the gradient of `hidden`, nothing of the logits'
    size; the gradient that comes in is multiplied in at the end.
    """

    @staticmethod
    def forward(
        ctx: Any,
        hidden: torch.Tensor,
        W: torch.Tensor,
        b: torch.Tensor | None,
        targets: torch.Tensor,
        source: torch.Tensor | None,
    ) -> torch.Tensor:
        gradient = torch.empty_like(hidden) if ctx.needs_input_grad[0] else None
        losses = torch.empty(len(targets), dtype=_wide(hidden.dtype), device=hidden.device)
        _fill_through_head(losses, hidden, W, b, targets, source, gradient)
        if gradient is not None:
            ctx.save_for_backward(gradient)
        return losses.sum()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grad_outputs: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        (gradient,) = ctx.saved_tensors
        return gradient * grad_outputs[0], None, None, None, None


def linear_cross_entropy_sum(
    hidden: torch.Tensor,
    W: torch.Tensor,
    b: torch.Tensor | None,
    targets: torch.Tensor,
    source: torch.Tensor | None = None,
) -> torch.Tensor:
    """Sum over tokens of -log softmax(hidden W^T + b)[target]; no more than a chunk of the logits is there at once.

    Args:
        hidden: (P, d), what enters the head at the places that predict; any floating dtype, in which the logits are
            computed; what comes after is fp32 (fp64 of fp64).
        W: (V, d), the head's weight, of hidden's dtype, frozen.
        b: (V,), its bias, as `W`, or None.
        targets: (L,) int64, each in [0, V).
        source: (L,) int64 in [0, P), which place predicts each target; None: each its own, L = P.

    Returns:
        fp32 scalar (fp64 of fp64); 0 with zero gradient for L = 0.

    Raises:
        ValueError: W or b is trained: it would get no gradient.
    """
    if torch.is_grad_enabled() and (W.requires_grad or (b is not None and b.requires_grad)):
        raise ValueError(
            "linear_cross_entropy_sum: the head is trained and would get no gradient; use cross_entropy_sum of its "
            "logits, or freeze it"
        )
    loss: torch.Tensor = _LinearCrossEntropySum.apply(hidden, W, b, targets, source)  # type: ignore[no-untyped-call]
    return loss


def linear_cross_entropy_sum_reference(
    hidden: torch.Tensor,
    W: torch.Tensor,
    b: torch.Tensor | None,
    targets: torch.Tensor,
    source: torch.Tensor | None = None,
) -> torch.Tensor:
    """What `linear_cross_entropy_sum` computes, from logits of all targets by autograd."""
    logits = F.linear(hidden, W, b)
    return cross_entropy_sum_reference(logits if source is None else F.embedding(source, logits), targets)
