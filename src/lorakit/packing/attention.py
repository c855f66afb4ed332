"""Attention over packed rows: each token sees those before it in its own row, wherever they lie. Knows no model.

`packed_attention_forward` has the signature that transformers calls and is registered there as `ATTENTION_NAME`; the
layout of the rows comes through the model's forward() as a keyword.
"""

from __future__ import annotations

import itertools
import math
from typing import Any

import torch
import torch.nn.functional as F
from transformers import AttentionInterface

from lorakit.adapter.entering import OWN_PREFIX
from lorakit.packing.layout import Group, Layout, Row, ShortRows

ATTENTION_NAME = "lorakit_packed"
LAYOUT = OWN_PREFIX  # keyword under which a Layout travels through the model's forward() to its attention


def _gathered(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, group: Group) -> tuple[torch.Tensor, ...]:
    """A group's vectors by head: q (R * H_kv, queries that read one key head, D), k (R * H_kv, m, D), v (.., m, D_v).

    By the lookup of an embedding, since its gradient sums what several rows read in a fixed order and fast.
    """

    def take(x: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
        return F.embedding(index, x.reshape(-1, x.shape[-1])).view(group.count * k.shape[1], -1, x.shape[-1])

    return take(q, group.queries), take(k, group.keys), take(v, group.keys)


class _AttendShort(torch.autograd.Function):
    """Attention of short rows by plain batched products, which beat the fused calls on many short rows.

    Against autograd's own graph of the same: nothing padded is kept but the probabilities, scale and mask cost no pass
    of their own, and gradients come back by gathers. `_attend_short_plain` is what it must equal.
    """

    @staticmethod
    def forward(
        ctx: Any, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, rows: ShortRows, scale: float
    ) -> torch.Tensor:
        results, kept = [], []
        for group in rows.groups:
            group_q, group_k, group_v = _gathered(q, k, v, group)
            probabilities = torch.softmax(group.scores(group_q, group_k, scale), dim=-1)
            results.append(torch.bmm(probabilities, group_v).view(-1, v.shape[-1]))
            kept.append(probabilities)
        ctx.save_for_backward(q, k, v, *kept)
        ctx.rows, ctx.scale = rows, scale
        return _cat(results).index_select(0, rows.back).view(-1, q.shape[1], v.shape[-1])

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *grad_outputs: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        q, k, v, *kept = ctx.saved_tensors
        rows, scale, total = ctx.rows, ctx.scale, len(q)
        grad = rows.spread(grad_outputs[0], total).view(-1, v.shape[-1])
        grads_q, grads_k, grads_v = [], [], []
        for group, probabilities in zip(rows.groups, kept, strict=True):
            group_q, group_k, group_v = _gathered(q, k, v, group)
            g = grad.index_select(0, group.queries).index_fill_(0, group.padding, 0)
            g = g.view(len(group_q), -1, v.shape[-1])  # of the result
            grads_v.append(torch.bmm(probabilities.transpose(1, 2), g).view(-1, v.shape[-1]))
            g = torch.bmm(g, group_v.transpose(1, 2))  # of the probabilities
            g = torch._softmax_backward_data(g, probabilities, -1, g.dtype).mul_(scale)  # of the scores
            grads_q.append(torch.bmm(g, group_k).view(-1, q.shape[-1]))
            grads_k.append(torch.bmm(g.transpose(1, 2), group_q).view(-1, q.shape[-1]))
        grad_q = rows.spread(_cat(grads_q).index_select(0, rows.back).view(-1, *q.shape[1:]), total)
        keys = _cat([group.keys for group in rows.groups])
        return grad_q, _summed(grads_k, keys, k), _summed(grads_v, keys, v), None, None


def _cat(pieces: list[torch.Tensor]) -> torch.Tensor:
    return pieces[0] if len(pieces) == 1 else torch.cat(pieces)


def _summed(gradients: list[torch.Tensor], index: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """Gradient of a gather: for each vector of `like` (T, H, D), the sum of those of the places that read it, in fp32.

    The kernel is the one behind the gradient of an embedding: unlike index_add_, it is fast on CPUs and gives the same
    bits each time on GPUs.
    """
    wide = _cat(gradients).float() if like.dtype != torch.float64 else _cat(gradients)
    total: torch.Tensor = torch.ops.aten.embedding_dense_backward(wide, index, like.shape[0] * like.shape[1], -1, False)
    return total.to(like.dtype).view_as(like)


def _attend_short_plain(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    rows: ShortRows,
    scale: float,
    dropout: float = 0.0,
    softcap: float | None = None,
) -> torch.Tensor:
    """The same by autograd, and with what only some models have.

    Args:
        q: (T, H, D).
        k: (T, H_kv, D).
        v: as `k`.
        rows: the short rows.
        scale: of the scores.
        dropout: on the probabilities.
        softcap: scores become softcap * tanh(scores / softcap), or None.

    Returns:
        (tokens, H, D) for the short rows' own tokens.
    """
    results = []
    for group in rows.groups:
        group_q, group_k, group_v = _gathered(q, k, v, group)
        scores = torch.bmm(group_q * scale, group_k.transpose(1, 2))
        if softcap is not None:
            scores = softcap * torch.tanh(scores / softcap)
        by_row = scores.view(group.count, -1, *group.blocked.shape[2:])
        by_row = by_row.masked_fill(group.blocked, -math.inf)
        probabilities = torch.softmax(by_row, dim=-1).view_as(scores)  # torch sums the softmax of bf16 in fp32
        if dropout > 0:
            probabilities = F.dropout(probabilities, dropout)
        results.append(torch.bmm(probabilities, group_v).view(-1, v.shape[-1]))
    return _cat(results).index_select(0, rows.back).view(-1, q.shape[1], v.shape[-1])


def _attend_long(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    row: Row,
    visible: torch.Tensor | None,
    scale: float,
    dropout: float,
) -> torch.Tensor:
    """One row by torch's fused attention. q (T, H, D), k (T, H_kv, D), v (T, H_kv, D_v) -> (n, H, D_v)."""
    own_q, own_k, own_v = (
        _take(x, places).transpose(0, 1)[None] for x, places in ((q, row.own), (k, row.places), (v, row.places))
    )
    out = F.scaled_dot_product_attention(
        own_q,
        own_k,
        own_v,
        attn_mask=visible,
        is_causal=visible is None,
        scale=scale,
        dropout_p=dropout,
        enable_gqa=q.shape[1] != k.shape[1],
    )
    return out[0].transpose(0, 1)


def _take(x: torch.Tensor, places: torch.Tensor) -> torch.Tensor:
    """x[places] for rising places that are mostly neighbours, by slices, whose gradient costs no sum over indices."""
    ends = [0, *((places[1:] - places[:-1]) != 1).nonzero().flatten().add(1).tolist(), len(places)]
    return _cat([x[int(places[a]) : int(places[b - 1]) + 1] for a, b in itertools.pairwise(ends)])


def packed_attention_forward(
    module: Any,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """The attention given to transformers. query (1, H, T, D), key and value (1, H_kv, T, D) -> (1, T, H, D)."""
    unknown = [name for name in ("s_aux", "position_bias", "cache") if kwargs.get(name) is not None]
    if unknown or attention_mask is not None or query.shape[0] != 1:
        raise NotImplementedError(f"packed attention knows no {', '.join(unknown) or 'mask'}")
    layout: Layout = kwargs[LAYOUT]
    layout.windows.add(sliding_window)
    q, k, v = (x.squeeze(0).transpose(0, 1) for x in (query, key, value))  # (T, H, D), (T, H_kv, D) twice
    k, v = layout.with_prefix(k, v, module.layer_idx) if layout.has_prefix else (k, v)
    scale = q.shape[-1] ** -0.5 if scaling is None else scaling
    short = layout.short(q.device, sliding_window, q.shape[1], k.shape[1])
    pieces = []
    if short is not None:
        if softcap is None and dropout == 0:
            pieces.append(_AttendShort.apply(q, k, v, short, scale))  # type: ignore[no-untyped-call]
        else:
            pieces.append(_attend_short_plain(q, k, v, short, scale, dropout, softcap))
    for number, row in enumerate(layout.long):
        if softcap is None:
            visible = layout.visible(number, q.device, sliding_window)
            pieces.append(_attend_long(q, k, v, row, visible, scale, dropout))
        else:  # which torch's fused attention does not know
            alone = layout.alone(number, q.device, sliding_window, q.shape[1], k.shape[1])
            pieces.append(_attend_short_plain(q, k, v, alone, scale, dropout, softcap))
    if len(pieces) == 1:  # then its tokens are all, in their order
        return pieces[0][None], None
    return torch.cat(pieces).index_select(0, layout.order(q.device))[None], None


AttentionInterface.register(ATTENTION_NAME, packed_attention_forward)
