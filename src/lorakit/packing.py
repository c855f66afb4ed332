"""Rows of different length through a causal language model as one sequence: no padding, no leak. Knows no loss.

All rows of a micro-batch are laid end to end as (1, T) tokens with positions that restart at each row; what rows have
in common at their beginning (a system prompt, a template, a question) stands once (`data.batches`). Everything in a
transformer but attention works on single tokens, so only attention must know the rows: while `packed_attention` is
entered, the model uses the attention function below, which lets each token see the tokens before it in its own row,
wherever they lie. A model without exchangeable attention, or one that lets rows touch in another way (a state space, a
convolution over time), is found by a probe on the model itself and then gets its rows one by one: slower, and as right.
"""

from __future__ import annotations

import contextlib
import inspect
import itertools
import math
import weakref
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch.nn.modules.dropout import _DropoutNd
from transformers import AttentionInterface, PreTrainedConfig, PreTrainedModel

from lorakit.core.deltas import LoRA
from lorakit.data.batches import Batch, row_places

ATTENTION_NAME = "lorakit_packed"
_LAYOUT = "lorakit_layout"  # keyword under which a _Layout travels through the model's forward() to its attention
_LONG_ROW = 256 * 256  # scores of a head; from here on keeping them outweighs the cost of one fused call a row
_SMALL = 64 * 64  # scores of a head that cost no more than another group would


@dataclass(frozen=True)
class _Row:
    """A row: its own tokens are queries, its whole self are keys.

    Attributes:
        own: (n,) where its own tokens lie among the T.
        places: (m,) where all its tokens lie; the last n are its own.
    """

    own: torch.Tensor
    places: torch.Tensor

    @property
    def scores(self) -> int:
        return len(self.own) * len(self.places)


@dataclass(frozen=True)
class _Group:
    """R short rows that attend together, padded to n queries and m keys; padding reaches no result.

    Attributes:
        queries: (R * H * n,) index into (T * H,) query vectors; padding points anywhere.
        padding: which of them are padding.
        keys: (R * H_kv * m,) index into (T * H_kv,) key vectors; padding points anywhere.
        blocked: (R, 1, n, m) True where a query must not see a key.
        count: R.
        bias: made by `scores`: the same for every layer.
    """

    queries: torch.Tensor
    padding: torch.Tensor
    keys: torch.Tensor
    blocked: torch.Tensor
    count: int
    bias: dict[torch.dtype, torch.Tensor] = field(default_factory=dict)

    def scores(self, q: torch.Tensor, k: torch.Tensor, scale: float) -> torch.Tensor:
        """scale q k^T, minus infinity where blocked.

        Args:
            q: (R * H_kv, H / H_kv * n, D): queries that read one key head lie below each other.
            k: (R * H_kv, m, D).
            scale: of the product.

        Returns:
            (R * H_kv, H / H_kv * n, m).
        """
        if q.dtype not in self.bias:
            n, m = self.blocked.shape[2:]
            heads = q.shape[0] * q.shape[1] // (self.count * n)
            bias = torch.zeros(self.count, heads, n, m, dtype=q.dtype, device=q.device)
            bias.masked_fill_(self.blocked, -math.inf)
            self.bias[q.dtype] = bias.view(q.shape[0], q.shape[1], m)
        return torch.baddbmm(self.bias[q.dtype], q, k.transpose(1, 2), alpha=scale)


@dataclass(frozen=True)
class _ShortRows:
    """All short rows of a layout, for one device, sliding window and number of heads.

    Attributes:
        groups: all of them; each short row is in one.
        back: (tokens * H,) where the result of each own token and head lies among the groups' results, laid end to end;
            tokens in the order of `own`.
        own: (tokens,) where the short rows' own tokens lie among the T, rising.
    """

    groups: tuple[_Group, ...]
    back: torch.Tensor
    own: torch.Tensor

    def spread(self, x: torch.Tensor, total: int) -> torch.Tensor:
        """Own tokens (tokens, H, D) at their places among all, (T, H, D) for `total` = T; zero where long rows lie."""
        if len(x) == total:
            return x.contiguous()
        return x.new_zeros(total, *x.shape[1:]).index_copy_(0, self.own, x)


class _Layout:
    """How the rows of a micro-batch lie in the packed sequence. Handed down to every attention layer."""

    def __init__(self, lengths: Sequence[int], forks: Sequence[int]) -> None:
        places = row_places(lengths, forks)
        rows = [_Row(place[fork:], place) for place, fork in zip(places, forks, strict=True)]
        self.windows: set[int | None] = set()  # that attention layers have asked for
        self.long = [row for row in rows if row.scores >= _LONG_ROW]
        self._short = [row for row in rows if row.scores < _LONG_ROW]
        self._made: dict[tuple[torch.device, int | None, int, int], _ShortRows] = {}
        self._visible: dict[tuple[int, torch.device, int | None], torch.Tensor | None] = {}

    def short(self, device: torch.device, window: int | None, heads: int, kv_heads: int) -> _ShortRows | None:
        """The short rows in groups (None: there are none). Made once for each device, window and number of heads."""
        if not self._short:
            return None
        if window is not None and window >= max(len(row.places) for row in self._short):
            window = None  # it hides nothing, so the groups of other layers will do
        key = (device, window, heads, kv_heads)
        if key not in self._made:
            self._made[key] = _make_groups(self._short, *key)
        return self._made[key]

    def visible(self, number: int, device: torch.device, window: int | None) -> torch.Tensor | None:
        """Which keys (m) each query (n) of a long row sees, (n, m); None: plain causality of a row all its own."""
        key = (number, device, window)
        if key not in self._visible:
            n, m = len(self.long[number].own), len(self.long[number].places)
            visible = None
            if n < m or (window is not None and window < m):
                distance = torch.arange(m - n, m, device=device)[:, None] - torch.arange(m, device=device)
                visible = (distance >= 0) & (distance < (m if window is None else window))
            self._visible[key] = visible
        return self._visible[key]


def _similar(rows: Sequence[_Row]) -> Iterator[list[_Row]]:
    """Rows of similar size together, so that padding costs less than another group would."""
    group: list[_Row] = []
    work = longest_own = 0
    for row in sorted(rows, key=lambda row: len(row.places)):
        longest_own = max(longest_own, len(row.own))
        padded = (len(group) + 1) * longest_own * len(row.places)
        if group and padded > 1.5 * (work + row.scores) + _SMALL:
            yield group
            group, work, longest_own = [], 0, len(row.own)
        group.append(row)
        work += row.scores
    yield group


def _make_groups(
    rows: Sequence[_Row], device: torch.device, window: int | None, heads: int, kv_heads: int
) -> _ShortRows:
    groups, backs, owns = [], [], []
    results = 0  # of the groups so far
    for members in _similar(rows):
        count, n, m = len(members), max(len(r.own) for r in members), max(len(r.places) for r in members)
        queries, keys = torch.zeros(count, n, dtype=torch.long), torch.zeros(count, m, dtype=torch.long)
        depth = torch.full((count, n), -1)  # of each query in its row; padding: -1
        for i, row in enumerate(members):
            queries[i, : len(row.own)], keys[i, : len(row.places)] = row.own, row.places
            depth[i, : len(row.own)] = torch.arange(len(row.places) - len(row.own), len(row.places))
        distance = depth[:, :, None] - torch.arange(m)  # (R, n, m) query - key; causality hides the padded keys too
        blocked = distance < 0
        if window is not None:
            blocked |= distance >= window
        blocked[:, :, 0] &= depth >= 0  # padding sees one key, so that its softmax is no NaN
        real = (depth >= 0)[:, None, :].expand(-1, heads, -1)  # (R, H, n)
        by_head = queries[:, None, :] * heads + torch.arange(heads)[:, None]  # (R, H, n)
        key_by_head = keys[:, None, :] * kv_heads + torch.arange(kv_heads)[:, None]  # (R, H_kv, m)
        padding = (~real).flatten().nonzero().flatten()
        groups.append(
            _Group(
                by_head.flatten().to(device),
                padding.to(device),
                key_by_head.flatten().to(device),
                blocked[:, None].to(device),
                count,
            )
        )
        owns.append(by_head[real])
        backs.append(results + real.flatten().nonzero().flatten())
        results += by_head.numel()
    own = torch.cat(owns)  # (tokens * H,) of query vectors, in the groups' order
    order = own.argsort()
    return _ShortRows(
        groups=tuple(groups),
        back=torch.cat(backs)[order].to(device),
        own=(own[order][::heads] // heads).to(device),
    )


def _gathered(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, group: _Group) -> tuple[torch.Tensor, ...]:
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
        ctx: Any, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, rows: _ShortRows, scale: float
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
    rows: _ShortRows,
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
    row: _Row,
    visible: torch.Tensor | None,
    scale: float,
    dropout: float,
) -> torch.Tensor:
    """One row by torch's fused attention. q (T, H, D), k (T, H_kv, D), v (T, H_kv, D_v) -> (n, H, D_v)."""
    out = F.scaled_dot_product_attention(
        _take(q, row.own).transpose(0, 1)[None],
        _take(k, row.places).transpose(0, 1)[None],
        _take(v, row.places).transpose(0, 1)[None],
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


def _packed_attention_forward(
    module: torch.nn.Module,
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
    layout: _Layout = kwargs[_LAYOUT]
    layout.windows.add(sliding_window)
    q, k, v = (x.squeeze(0).transpose(0, 1) for x in (query, key, value))  # (T, H, D), (T, H_kv, D) twice
    scale = q.shape[-1] ** -0.5 if scaling is None else scaling
    short = layout.short(q.device, sliding_window, q.shape[1], k.shape[1])
    pieces, places = [], []
    if short is not None:
        if softcap is None and dropout == 0:
            pieces.append(_AttendShort.apply(q, k, v, short, scale))  # type: ignore[no-untyped-call]
        else:
            pieces.append(_attend_short_plain(q, k, v, short, scale, dropout, softcap))
        places.append(short.own)
    for number, row in enumerate(layout.long):
        if softcap is None:
            visible = layout.visible(number, q.device, sliding_window)
            pieces.append(_attend_long(q, k, v, row, visible, scale, dropout))
        else:  # which torch's fused attention does not know
            alone = _make_groups([row], q.device, sliding_window, q.shape[1], k.shape[1])
            pieces.append(_attend_short_plain(q, k, v, alone, scale, dropout, softcap))
        places.append(row.own.to(q.device))
    if len(pieces) == 1:  # then its tokens are all, in their order
        return pieces[0][None], None
    order = torch.empty(q.shape[0], dtype=torch.long, device=q.device)
    order[torch.cat(places)] = torch.arange(q.shape[0], device=q.device)
    return torch.cat(pieces).index_select(0, order)[None], None


AttentionInterface.register(ATTENTION_NAME, _packed_attention_forward)


# ---------------------------------------------------------------- entering a model

_packable: weakref.WeakKeyDictionary[torch.nn.Module, float] = weakref.WeakKeyDictionary()


@contextlib.contextmanager
def packed_attention(model: torch.nn.Module, longest: int) -> Iterator[bool]:
    """Let `packed_logits` run rows of `model` end to end. The model's own attention is back afterwards, whatever is
    raised.

    The first time a model is entered, a probe runs four short rows through it, packed and alone (see `_probe`).

    Args:
        model: any causal language model.
        longest: tokens of the longest row that will come. Some models treat rows beyond a length in a way that packing
            cannot give them (see `_longest_packable`).

    Yields:
        Whether the model packs; if not, `packed_logits` runs its rows one by one.
    """
    if not _attention_is_exchangeable(model):
        yield False
        return
    if model not in _packable:
        _packable[model] = _probe(model)
    if _packable[model] < longest:
        yield False
        return
    with _exchanged_attention(model):
        yield True


def packed_logits(model: torch.nn.Module, batch: Batch) -> torch.Tensor:
    """Logits that predict the targets of a micro-batch: (L, V), in the model's dtype.

    Args:
        model: a transformers causal language model; packs only inside `packed_attention(model)`.
        batch: rows laid end to end.
    """
    if _config_attention(model) == ATTENTION_NAME:
        layout = {_LAYOUT: _Layout(batch.lengths, batch.forks)}
        logits = _logits(model, batch.ids, batch.positions, batch.predict, layout)
        return logits if batch.source is None else F.embedding(batch.source, logits)
    assert batch.source is None, "only a model that packs can share what its rows begin with"
    assert not any(batch.forks), "only a model that packs can share what its rows begin with"
    pieces, start = [], 0
    for length in batch.lengths:
        inside = (batch.predict >= start) & (batch.predict < start + length)
        row = slice(start, start + length)
        if inside.any():
            pieces.append(_logits(model, batch.ids[row], batch.positions[row], batch.predict[inside] - start, {}))
        start += length
    return torch.cat(pieces)


def has_dropout(model: torch.nn.Module) -> bool:
    """Whether the model draws anything in train mode; shared tokens would then have one draw for all their rows."""
    layers = any(
        module.p > 0 if isinstance(module, _DropoutNd) else isinstance(module, LoRA) and module.dropout > 0
        for module in model.modules()
    )
    return layers or any(
        ("drop" in key or "jitter" in key) and isinstance(value, int | float) and value > 0
        for key, value in _settings(model)
    )


def _settings(model: torch.nn.Module) -> Iterator[tuple[str, Any]]:
    """All settings of a transformers model, those of its parts too."""

    def walk(values: dict[str, Any]) -> Iterator[tuple[str, Any]]:
        for key, value in values.items():
            if isinstance(value, dict):
                yield from walk(value)
            else:
                yield str(key), value  # a table of labels has numbers for keys

    config = getattr(model, "config", None)
    if isinstance(config, PreTrainedConfig):
        yield from walk(config.to_dict())


def _longest_packable(model: torch.nn.Module, windows: set[int | None]) -> float:
    """The longest row that may be packed: beyond it, what the model does to a row is not seen by our attention.

    That is attention in chunks or to a chosen few keys, a sliding window that the layers do not tell, and rotary
    frequencies that depend on the longest position at hand, and so on the neighbours.

    Args:
        model: whose settings to read.
        windows: what its attention layers have asked for.
    """
    settings = list(_settings(model))
    limits = [v for key, v in settings if key in ("attention_chunk_size", "index_topk") and isinstance(v, int)]
    limits += [v for key, v in settings if key == "sliding_window" and isinstance(v, int) and v not in windows]
    if any(key in ("rope_type", "type") and value in ("dynamic", "longrope") for key, value in settings):
        context = ("original_max_position_embeddings", "max_position_embeddings")
        limits += [value for key, value in settings if key in context and isinstance(value, int)]
    return min(limits, default=math.inf)


def _logits(
    model: torch.nn.Module, ids: torch.Tensor, positions: torch.Tensor, predict: torch.Tensor, extra: dict[str, Any]
) -> torch.Tensor:
    """One forward of (1, T) tokens; the output head runs at `predict` only, where the model can do that."""
    if "logits_to_keep" in inspect.signature(model.forward).parameters:
        extra = {**extra, "logits_to_keep": predict}
        predict = torch.arange(len(predict), device=predict.device)
    output = model(input_ids=ids[None], position_ids=positions[None], use_cache=False, **extra)
    logits: torch.Tensor = output.logits.squeeze(0)
    return logits if "logits_to_keep" in extra else logits[predict]


def _config_attention(model: torch.nn.Module) -> str | None:
    return getattr(getattr(model, "config", None), "_attn_implementation", None)


def _attention_is_exchangeable(model: torch.nn.Module) -> bool:
    return isinstance(model, PreTrainedModel) and bool(model._supports_attention_backend)


@contextlib.contextmanager
def _exchanged_attention(model: Any) -> Iterator[None]:
    before = model.config._attn_implementation
    model.set_attn_implementation(ATTENTION_NAME)
    try:
        yield
    finally:
        model.set_attn_implementation(before)


@torch.inference_mode()
def _probe(model: Any) -> float:
    """The longest row that may be packed; 0 where rows packed do not give what rows alone give, or a row can tell what
    stands before it.

    Rounding differs between the two ways, so the comparison is loose; the leak test is sharp: the second row's logits
    must not move when the first row's tokens change. Models that refuse our attention do not pack.
    """
    device = next(model.parameters()).device
    was_training = model.training
    model.eval()
    ids = torch.arange(15, device=device) * 7919 % model.get_input_embeddings().weight.shape[0]
    beginning, one, other, changed = ids[:3], ids[3:6], ids[6:12], ids[12:15]
    at = torch.arange(9, device=device)

    def run(*rows: torch.Tensor, forks: tuple[int, ...] = (0, 0)) -> torch.Tensor:
        """Logits of rows laid end to end, without what a row shares with the one before it."""
        own = list(zip(rows, forks, strict=False))
        tokens = torch.cat([row[fork:] for row, fork in own])
        positions = torch.cat([at[fork : len(row)] for row, fork in own])
        layout = _Layout([len(row) for row in rows], forks[: len(rows)])
        every = torch.arange(len(tokens), device=device)
        logits = _logits(model, tokens, positions, every, {_LAYOUT: layout} if len(rows) > 1 else {}).float()
        windows.update(layout.windows)
        return logits

    windows: set[int | None] = set()
    rows = torch.cat([beginning, one]), torch.cat([beginning, other])
    try:
        alone = torch.cat([run(row) for row in rows])
        with _exchanged_attention(model):
            packed, moved = run(*rows), run(torch.cat([beginning, changed]), rows[1])
            shared = run(*rows, forks=(0, len(beginning)))
    except torch.OutOfMemoryError:
        raise
    except (RuntimeError, TypeError, KeyError, ValueError, IndexError):
        return 0
    finally:
        model.train(was_training)
    size = alone.abs().max()
    tolerance = 1e-3 if model.dtype == torch.float32 else 5e-2
    equal = bool((packed - alone).abs().max() <= tolerance * size)
    unshared = torch.cat([shared[:6], shared[:3], shared[6:]])
    equal = equal and bool((unshared - alone).abs().max() <= tolerance * size)
    private = bool((packed[6:] - moved[6:]).abs().max() <= 1e-2 * tolerance * size)
    return _longest_packable(model, windows) if equal and private else 0
