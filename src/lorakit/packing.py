"""Rows of different length through a causal language model as one sequence: no padding, no leak between rows. Knows no
loss.

All rows of a micro-batch are laid end to end as (1, T) tokens with positions that restart at each row. Everything in a
transformer but attention
works on single tokens, so only attention must know the rows: while `packed_attention` is entered, the model uses the
attention function below, which
keeps each row to itself. A model without exchangeable attention, or one that lets rows touch in another way (a state
space, a convolution over
time), is found by a probe on the model itself and then gets its rows one by one: slower, and as right.
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
from transformers import AttentionInterface, PreTrainedModel

from lorakit.data.batches import Batch

ATTENTION_NAME = "lorakit_packed"
_LAYOUT = "lorakit_layout"  # keyword under which a _Layout travels through the model's forward() to its attention
_LONG_ROW = 256  # tokens; from here on the saved (n, n) probabilities outweigh the cost of one fused call a row


@dataclass(frozen=True)
class _Group:
    """Rows of similar length that attend together: (k rows, n tokens) with padding that reaches no result."""

    gather: torch.Tensor  # (k * n,) index into the group's tokens; padding points at the group's first token
    scatter: torch.Tensor  # (tokens of the group,) index into k * n
    blocked: torch.Tensor  # (k, 1, n, n) True where query i must not see key j
    rows: int
    longest: int
    start: int  # the group's tokens are [start, stop) of the T
    stop: int
    windowed: bool  # whether a sliding window hides anything beyond causality


class _Layout:
    """How the rows of a micro-batch lie in the packed sequence. Handed down to every attention layer; its groups are
    made once.
    """

    def __init__(self, lengths: tuple[int, ...]) -> None:
        self.lengths = lengths
        self._groups: dict[tuple[torch.device, int | None], list[_Group]] = {}

    def groups(self, device: torch.device, window: int | None) -> list[_Group]:
        """Neighbouring rows whose lengths differ by less than an eighth, for a device and a sliding window (None:
        full).
        """
        key = (device, window)
        if key not in self._groups:
            self._groups[key] = list(_make_groups(self.lengths, device, window))
        return self._groups[key]


def _make_groups(lengths: tuple[int, ...], device: torch.device, window: int | None) -> Iterator[_Group]:
    first, start = 0, 0
    while first < len(lengths):
        last = first + 1
        low = high = lengths[first]
        while last < len(lengths) and high < _LONG_ROW:
            low, high = min(low, lengths[last]), max(high, lengths[last])
            if high > low + max(low // 8, 8):
                break
            last += 1
        rows = lengths[first:last]
        longest, count = max(rows), last - first
        offset = torch.arange(longest)  # (n,)
        length = torch.tensor(rows)[:, None]  # (k, 1)
        begin = torch.tensor([sum(rows[:i]) for i in range(count)])[:, None]  # (k, 1)
        real = offset < length  # (k, n)
        gather = torch.where(real, begin + offset, 0).flatten()
        distance = offset[:, None] - offset[None, :]  # (n, n) query - key
        blocked = (distance < 0) | ~real[:, None, None, :]  # (k, 1, n, n)
        windowed = window is not None and longest > window
        if window is not None and windowed:
            blocked = blocked | (distance >= window)
        # A padded query sees nothing; it may see itself so that its softmax stays finite. Nothing reads its result.
        blocked = blocked & (distance != 0)
        scatter = real.flatten().nonzero().flatten()
        stop = start + sum(rows)
        yield _Group(gather.to(device), scatter.to(device), blocked.to(device), count, longest, start, stop, windowed)
        first, start = last, stop


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
    """One row by torch's fused attention. q (n, H, D), k and v (n, H_kv, D) -> (n, H, D)."""
    out = F.scaled_dot_product_attention(
        q.transpose(0, 1)[None],
        k.transpose(0, 1)[None],
        v.transpose(0, 1)[None],
        attn_mask=~group.blocked if group.windowed else None,
        is_causal=not group.windowed,
        scale=scale,
        dropout_p=dropout,
        enable_gqa=q.shape[1] != k.shape[1],
    )
    return out[0].transpose(0, 1)


def _attend_padded(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    group: _Group,
    scale: float,
    dropout: float,
    softcap: float | None,
) -> torch.Tensor:
    """Rows of a group by plain batched products, which beat the fused call on many short rows. Shapes as in
    `_attend_fused`.
    """
    rows, n, heads, kv_heads = group.rows, group.longest, q.shape[1], k.shape[1]
    shared = heads // kv_heads  # query heads that read one key head; laid below each other, so that no key is copied

    def pad(x: torch.Tensor) -> torch.Tensor:  # (tokens, heads, D) -> (rows * n, heads, D)
        padded: torch.Tensor = _Pad.apply(x, group.gather, group.scatter)  # type: ignore[no-untyped-call]
        return padded

    q = pad(q).view(rows, n, kv_heads, shared, -1)
    q = q.permute(0, 2, 3, 1, 4).reshape(rows * kv_heads, shared * n, -1)
    k = pad(k).view(rows, n, kv_heads, -1).permute(0, 2, 3, 1)
    v = pad(v).view(rows, n, kv_heads, -1).transpose(1, 2)
    scores = torch.bmm(q * scale, k.reshape(rows * kv_heads, -1, n))  # (rows * H_kv, shared * n, n)
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    scores = scores.view(rows, kv_heads * shared, n, n).masked_fill(group.blocked, torch.finfo(scores.dtype).min)
    probabilities = torch.softmax(scores, dim=-1)  # torch accumulates the softmax of bf16 in fp32
    if dropout > 0:
        probabilities = F.dropout(probabilities, dropout)
    out = torch.bmm(probabilities.view(rows * kv_heads, shared * n, n), v.reshape(rows * kv_heads, n, -1))
    out = out.view(rows, kv_heads, shared, n, -1).permute(0, 3, 1, 2, 4)
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
    """The attention function given to transformers. query (1, H, T, D), key and value (1, H_kv, T, D) -> (1, T, H,
    D).
    """
    unknown = [name for name in ("s_aux", "position_bias", "cache") if kwargs.get(name) is not None]
    if unknown or attention_mask is not None or query.shape[0] != 1:
        raise NotImplementedError(f"packed attention knows no {', '.join(unknown) or 'mask'}")
    q, k, v = (x[0].transpose(0, 1) for x in (query, key, value))  # (T, H, D), (T, H_kv, D) twice
    scale = q.shape[-1] ** -0.5 if scaling is None else scaling
    pieces = []
    for group in kwargs[_LAYOUT].groups(q.device, sliding_window):
        part = (q[group.start : group.stop], k[group.start : group.stop], v[group.start : group.stop])
        if group.rows == 1 and softcap is None:
            pieces.append(_attend_fused(*part, group, scale, dropout))
        else:
            pieces.append(_attend_padded(*part, group, scale, dropout, softcap))
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
        layout = {_LAYOUT: _Layout(batch.lengths)}
        return _logits(model, batch.ids, batch.positions, batch.predict, layout)
    pieces, start = [], 0
    for length in batch.lengths:
        inside = (batch.predict >= start) & (batch.predict < start + length)
        row = slice(start, start + length)
        if inside.any():
            pieces.append(_logits(model, batch.ids[row], batch.positions[row], batch.predict[inside] - start, {}))
        start += length
    return torch.cat(pieces)


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
    must not
    move when the first row's tokens change. Models that refuse our attention (other arguments, another forward) do not
    pack.
    """
    device = next(model.parameters()).device
    was_training = model.training
    model.eval()
    vocabulary = model.get_input_embeddings().weight.shape[0]
    lengths = (5, 7)
    ids = torch.arange(12, device=device) * 7919 % vocabulary
    other = torch.cat([(ids[:5] + 1) % vocabulary, ids[5:]])
    positions = torch.cat([torch.arange(n, device=device) for n in lengths])
    every = torch.arange(12, device=device)

    def run(tokens: torch.Tensor) -> torch.Tensor:
        return _logits(model, tokens, positions, every, {_LAYOUT: _Layout(lengths)}).float()

    try:
        alone = torch.cat(
            [_logits(model, ids[s], positions[s], positions[s], {}).float() for s in (slice(0, 5), slice(5, 12))]
        )
        with _exchanged_attention(model):
            packed, changed = run(ids), run(other)
    except (NotImplementedError, TypeError, KeyError, ValueError, IndexError):
        return False
    finally:
        model.train(was_training)
    size = alone.abs().max()
    tolerance = 1e-3 if model.dtype == torch.float32 else 5e-2
    equal = bool((packed - alone).abs().max() <= tolerance * size)
    sealed = bool((packed[5:] - changed[5:]).abs().max() <= 1e-2 * tolerance * size)
    return equal and sealed
