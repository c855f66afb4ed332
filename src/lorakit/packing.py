"""Rows of different length through a causal language model as one sequence: no padding, no leak. Knows no loss.

All rows of a micro-batch are laid end to end as (1, T) tokens with positions that restart at each row; what they all
begin with (a system prompt, a template's opening) stands once, before them. Everything in a transformer but attention
works on single tokens, so only attention must know the rows: while `packed_attention` is entered, the model uses the
attention function below, which lets each row see itself and the shared beginning. A model without exchangeable
attention, or one that lets rows touch in another way (a state space, a convolution over time), is found by a probe on
the model itself and then gets its rows one by one: slower, and as right.
"""

from __future__ import annotations

import contextlib
import inspect
import weakref
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch.nn.modules.dropout import _DropoutNd
from transformers import AttentionInterface, PreTrainedConfig, PreTrainedModel

from lorakit.core.deltas import LoRA
from lorakit.data.batches import Batch

ATTENTION_NAME = "lorakit_packed"
_LAYOUT = "lorakit_layout"  # keyword under which a _Layout travels through the model's forward() to its attention
_LONG_ROW = 256  # tokens; from here on the saved (n, n) probabilities outweigh the cost of one fused call a row


@dataclass(frozen=True)
class _Group:
    """k rows of similar length that attend together, padded to n tokens; padding reaches no result.

    Attributes:
        gather: (k * n,) index into the group's own tokens; padding points at the first of them.
        scatter: (own tokens,) index into k * n.
        blocked: (k, 1, n, p + n) True where query i must not see key j; the first p keys are the shared ones.
        rows: k.
        longest: n.
        own: where the group's tokens lie among the T.
        causal: whether a single row's mask is plain causality, without shared keys or a window that cuts.
    """

    gather: torch.Tensor
    scatter: torch.Tensor
    blocked: torch.Tensor
    rows: int
    longest: int
    own: slice
    causal: bool


class _Layout:
    """How the rows of a micro-batch lie in the packed sequence. Handed down to every attention layer."""

    def __init__(self, shared: int, lengths: tuple[int, ...]) -> None:
        self.shared = shared
        self.lengths = lengths
        self._groups: dict[tuple[torch.device, int | None], list[_Group]] = {}

    def groups(self, device: torch.device, window: int | None) -> list[_Group]:
        """The rows after the shared beginning, for a device and a sliding window (None: full). Made once."""
        key = (device, window)
        if key not in self._groups:
            self._groups[key] = list(_make_groups(self.shared, self.lengths, device, window))
        return self._groups[key]

    def shared_group(self, device: torch.device, window: int | None) -> _Group:
        """The shared beginning as a row of its own, which sees only itself."""
        return next(_make_groups(0, (self.shared,), device, window))


def _make_groups(shared: int, lengths: tuple[int, ...], device: torch.device, window: int | None) -> Iterator[_Group]:
    """Neighbouring rows of similar length: padding costs little here, and each group a dozen calls. Long rows stand
    alone.
    """
    first, start = 0, shared
    while first < len(lengths):
        last = first + 1
        low = high = lengths[first]
        while last < len(lengths) and high < _LONG_ROW:
            low, high = min(low, lengths[last]), max(high, lengths[last])
            if high > low + max(low // 2, 16):
                break
            last += 1
        rows = lengths[first:last]
        longest, count = max(rows), last - first
        offset = torch.arange(longest)  # (n,)
        begin = torch.tensor([sum(rows[:i]) for i in range(count)])[:, None]  # (k, 1)
        real = offset < torch.tensor(rows)[:, None]  # (k, n)
        gather = torch.where(real, begin + offset, 0).flatten()
        distance = offset[:, None] - torch.arange(-shared, longest)[None, :]  # (n, p + n) query - key
        keys = torch.nn.functional.pad(real, (shared, 0), value=True)  # (k, p + n)
        blocked = (distance < 0) | ~keys[:, None, None, :]  # (k, 1, n, p + n)
        if window is not None:
            blocked = blocked | (distance >= window)
        # A padded query may see itself, so that its softmax stays finite. Nothing reads its result.
        blocked = blocked & (distance != 0)
        causal = shared == 0 and (window is None or longest <= window)
        scatter = real.flatten().nonzero().flatten()
        own = slice(start, start + sum(rows))
        yield _Group(gather.to(device), scatter.to(device), blocked.to(device), count, longest, own, causal)
        first, start = last, own.stop


class _Pad(torch.autograd.Function):
    """(tokens, H, D) -> (k * n, H, D) by a gather; its gradient is a gather too, since every token has one place."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, gather: torch.Tensor, scatter: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(scatter)
        return x.index_select(0, gather)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        (scatter,) = ctx.saved_tensors
        return grad_outputs[0].index_select(0, scatter), None, None


class _Unpad(torch.autograd.Function):
    """(k * n, H, D) -> (tokens, H, D); the gradient of padding is zero."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, scatter: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(scatter)
        ctx.padded = x.shape[0]
        return x.index_select(0, scatter)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: torch.Tensor) -> tuple[torch.Tensor, None]:
        (scatter,) = ctx.saved_tensors
        (grad,) = grad_outputs
        return grad.new_zeros(ctx.padded, *grad.shape[1:]).index_copy_(0, scatter, grad), None


def _attend_fused(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, group: _Group, scale: float, dropout: float
) -> torch.Tensor:
    """One row by torch's fused attention. q (n, H, D), k and v (p + n, H_kv, D) -> (n, H, D)."""
    out = F.scaled_dot_product_attention(
        q.transpose(0, 1)[None],
        k.transpose(0, 1)[None],
        v.transpose(0, 1)[None],
        attn_mask=None if group.causal else ~group.blocked,
        is_causal=group.causal,
        scale=scale,
        dropout_p=dropout,
        enable_gqa=q.shape[1] != k.shape[1],
    )
    return out[0].transpose(0, 1)


def _attend_padded(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    shared: tuple[torch.Tensor, torch.Tensor] | None,
    group: _Group,
    scale: float,
    dropout: float,
    softcap: float | None,
) -> torch.Tensor:
    """Rows of a group by plain batched products, which beat the fused call on many short rows.

    Args:
        q: (tokens, H, D).
        k: (tokens, H_kv, D).
        v: as `k`.
        shared: keys and values (p, H_kv, D) that every row sees before its own; their gradient is the sum over rows.
        group: the rows.
        scale: of the scores.
        dropout: on the probabilities.
        softcap: scores become softcap * tanh(scores / softcap), or None.

    Returns:
        (tokens, H, D).
    """
    rows, n, heads, kv_heads = group.rows, group.longest, q.shape[1], k.shape[1]
    query_heads = heads // kv_heads  # that read one key head; laid below each other, so that no key is copied for them

    def pad(x: torch.Tensor) -> torch.Tensor:  # (tokens, heads, D) -> (rows, n, heads, D)
        padded: torch.Tensor = _Pad.apply(x, group.gather, group.scatter)  # type: ignore[no-untyped-call]
        return padded.view(rows, n, *x.shape[1:])

    q = pad(q).view(rows, n, kv_heads, query_heads, -1)
    q = q.permute(0, 2, 3, 1, 4).reshape(rows * kv_heads, query_heads * n, -1)
    k, v = pad(k), pad(v)
    if shared is not None:
        k, v = (torch.cat([s.expand(rows, *s.shape), x], dim=1) for s, x in zip(shared, (k, v), strict=True))
    keys = k.shape[1]  # p + n
    k = k.permute(0, 2, 3, 1).reshape(rows * kv_heads, -1, keys)
    v = v.transpose(1, 2).reshape(rows * kv_heads, keys, -1)
    scores = torch.bmm(q * scale, k)  # (rows * H_kv, query_heads * n, p + n)
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    scores = scores.view(rows, heads, n, keys).masked_fill(group.blocked, torch.finfo(scores.dtype).min)
    probabilities = torch.softmax(scores, dim=-1)  # torch accumulates the softmax of bf16 in fp32
    if dropout > 0:
        probabilities = F.dropout(probabilities, dropout)
    out = torch.bmm(probabilities.view(rows * kv_heads, query_heads * n, keys), v)
    out = out.view(rows, kv_heads, query_heads, n, -1).permute(0, 3, 1, 2, 4)
    packed: torch.Tensor = _Unpad.apply(out.reshape(rows * n, heads, -1), group.scatter)  # type: ignore[no-untyped-call]
    return packed


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
    q, k, v = (x[0].transpose(0, 1) for x in (query, key, value))  # (T, H, D), (T, H_kv, D) twice
    scale = q.shape[-1] ** -0.5 if scaling is None else scaling

    def attend(group: _Group, shared: tuple[torch.Tensor, torch.Tensor] | None) -> torch.Tensor:
        own_q, own_k, own_v = q[group.own], k[group.own], v[group.own]
        if group.rows > 1 or softcap is not None:
            return _attend_padded(own_q, own_k, own_v, shared, group, scale, dropout, softcap)
        if shared is not None:
            own_k, own_v = torch.cat([shared[0], own_k]), torch.cat([shared[1], own_v])
        return _attend_fused(own_q, own_k, own_v, group, scale, dropout)

    pieces, shared = [], None
    if layout.shared:
        pieces.append(attend(layout.shared_group(q.device, sliding_window), None))
        shared = (k[: layout.shared], v[: layout.shared])
    pieces += [attend(group, shared) for group in layout.groups(q.device, sliding_window)]
    return torch.cat(pieces)[None], None


AttentionInterface.register(ATTENTION_NAME, _packed_attention_forward)


# ---------------------------------------------------------------- entering a model

_packs: weakref.WeakKeyDictionary[torch.nn.Module, bool] = weakref.WeakKeyDictionary()


@contextlib.contextmanager
def packed_attention(model: torch.nn.Module) -> Iterator[bool]:
    """Let `packed_logits` run rows of `model` end to end. The model's own attention is back afterwards, whatever is
    raised.

    The first time a model is entered, a probe runs four short rows through it, packed and alone (see `_probe`).

    Yields:
        Whether the model packs; if not, `packed_logits` runs its rows one by one.
    """
    if not _attention_is_exchangeable(model):
        yield False
        return
    if model not in _packs:
        _packs[model] = _probe(model)
    if not _packs[model]:
        yield False
        return
    with _exchanged_attention(model):
        yield True


def packed_logits(model: torch.nn.Module, batch: Batch) -> torch.Tensor:
    """Logits at the labelled positions of a micro-batch: (L, V), in the model's dtype.

    Args:
        model: a transformers causal language model; packs only inside `packed_attention(model)`.
        batch: rows laid end to end; `batch.predict` (L,) are the positions whose logits are wanted.
    """
    if _config_attention(model) == ATTENTION_NAME:
        layout = {_LAYOUT: _Layout(batch.shared, batch.lengths)}
        return _logits(model, batch.ids, batch.positions, batch.predict, layout)
    assert batch.shared == 0, "only a model that packs can share the beginning of its rows"
    pieces, start = [], 0
    for length in batch.lengths:
        inside = (batch.predict >= start) & (batch.predict < start + length)
        row = slice(start, start + length)
        if inside.any():
            pieces.append(_logits(model, batch.ids[row], batch.positions[row], batch.predict[inside] - start, {}))
        start += length
    return torch.cat(pieces)


def has_dropout(model: torch.nn.Module) -> bool:
    """Whether the model draws anything in train mode; a shared beginning would then have one draw for all its rows."""
    layers = any(
        module.p > 0 if isinstance(module, _DropoutNd) else isinstance(module, LoRA) and module.dropout > 0
        for module in model.modules()
    )
    settings = getattr(model, "config", None)
    values = settings.to_dict() if isinstance(settings, PreTrainedConfig) else {}
    return layers or any("drop" in key and isinstance(v, int | float) and v > 0 for key, v in values.items())


def _logits(
    model: torch.nn.Module, ids: torch.Tensor, positions: torch.Tensor, predict: torch.Tensor, extra: dict[str, Any]
) -> torch.Tensor:
    """One forward of (1, T) tokens; the output head runs at `predict` only, where the model can do that."""
    if "logits_to_keep" in inspect.signature(model.forward).parameters:
        extra = {**extra, "logits_to_keep": predict}
        predict = torch.arange(len(predict), device=predict.device)
    output = model(input_ids=ids[None], position_ids=positions[None], use_cache=False, **extra)
    logits: torch.Tensor = output.logits[0]
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
def _probe(model: Any) -> bool:
    """Whether rows packed give what rows alone give, and whether a row can tell what stands before it.

    Rounding differs between the two ways, so the comparison is loose; the leak test is sharp: the second row's logits
    must not move when the first row's tokens change. Models that refuse our attention do not pack.
    """
    device = next(model.parameters()).device
    was_training = model.training
    model.eval()
    ids = torch.arange(15, device=device) * 7919 % model.get_input_embeddings().weight.shape[0]
    beginning, one, other, changed = ids[:3], ids[3:6], ids[6:12], ids[12:15]
    at = torch.arange(9, device=device)

    def run(*rows: torch.Tensor, shared: int = 0) -> torch.Tensor:
        """Logits of whole rows laid end to end; of rows behind `beginning`, if they share it."""
        positions = torch.cat([at[:shared], *(at[shared : shared + len(row)] for row in rows)])
        tokens = torch.cat([beginning[:shared], *rows])
        layout = _Layout(shared, tuple(len(row) for row in rows)) if len(rows) > 1 else None
        every = torch.arange(len(tokens), device=device)
        return _logits(model, tokens, positions, every, {_LAYOUT: layout} if layout else {}).float()

    rows = torch.cat([beginning, one]), torch.cat([beginning, other])
    try:
        alone = torch.cat([run(row) for row in rows])
        with _exchanged_attention(model):
            packed, moved = run(*rows), run(torch.cat([beginning, changed]), rows[1])
            shared = run(one, other, shared=3)
    except (NotImplementedError, TypeError, KeyError, ValueError, IndexError):
        return False
    finally:
        model.train(was_training)
    size = alone.abs().max()
    tolerance = 1e-3 if model.dtype == torch.float32 else 5e-2
    equal = bool((packed - alone).abs().max() <= tolerance * size)
    unshared = torch.cat([shared[:6], shared[:3], shared[6:]])
    equal = equal and bool((unshared - alone).abs().max() <= tolerance * size)
    return equal and bool((packed[6:] - moved[6:]).abs().max() <= 1e-2 * tolerance * size)
