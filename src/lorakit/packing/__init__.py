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
import math
import weakref
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.modules.dropout import _DropoutNd
from transformers import PreTrainedConfig, PreTrainedModel

from lorakit.adapter.in_use import first_tokens, invocations_of, soft_prompt_of, without_soft_prompt
from lorakit.adapter.invocations import laid_out
from lorakit.core.deltas import LoRA
from lorakit.data.batches import Batch, collate
from lorakit.fusion import KEEP, keeps
from lorakit.packing.attention import ATTENTION_NAME, LAYOUT
from lorakit.packing.head import frozen_linear_head, left_out
from lorakit.packing.layout import Layout

if TYPE_CHECKING:
    from lorakit.data.chat import Example

_packable: weakref.WeakKeyDictionary[torch.nn.Module, float] = weakref.WeakKeyDictionary()
_ends_with_head: weakref.WeakKeyDictionary[torch.nn.Module, bool] = weakref.WeakKeyDictionary()


@contextlib.contextmanager
def packed_attention(model: torch.nn.Module, longest: int) -> Iterator[bool]:
    """Let `packed_logits` run rows of `model` end to end. The model's own attention is back afterwards, whatever is
    raised.

    The first time a model is entered, a probe runs four short rows through it, packed and alone (see `_probe`).

    Args:
        model: any causal language model. On the meta device there are no numbers to compare: one that runs packed is
            taken to pack.
        longest: tokens of the longest row that will come. Some models treat rows beyond a length in a way that packing
            cannot give them (see `_longest_packable`).

    Yields:
        Whether the model packs; if not, `packed_logits` runs its rows one by one.
    """
    if not _attention_is_exchangeable(model):
        yield False
        return
    if model not in _packable:
        with without_soft_prompt(model):
            _packable[model] = _probe(model)
    if _packable[model] < longest:
        yield False
        return
    with _exchanged_attention(model):
        yield True


def collated(model: torch.nn.Module, examples: Sequence[Example], indices: Sequence[int], *, share: bool) -> Batch:
    """`collate` for `model` as it is now: with the virtual tokens of its soft prompt before every row, and no token
    shared that an activated adapter is for in one row alone.

    Args:
        model: that the batch is for; not inside `route`.
        examples: as in `collate`.
        indices: as in `collate`.
        share: as in `collate`; only for a model that packs.
    """
    return collate(examples, indices, share=share, first=first_tokens(model), invocations=invocations_of(model))


def packed_logits(model: torch.nn.Module, batch: Batch) -> torch.Tensor:
    """Logits that predict the targets of a micro-batch: (L, V), in the model's dtype.

    Args:
        model: a transformers causal language model; packs only inside `packed_attention(model)`.
        batch: rows laid end to end.
    """
    logits = _at_places(model, batch, None)
    return logits if batch.source is None else F.embedding(batch.source, logits)


def packed_hidden(model: torch.nn.Module, batch: Batch, head: nn.Linear) -> torch.Tensor:
    """What enters the output head at the places that predict targets, `batch.predict`: (P, d).

    Args:
        model: as in `packed_logits`.
        batch: as in `packed_logits`.
        head: `separable_head(model)`, which does not run.
    """
    return _at_places(model, batch, head)


def separable_head(model: torch.nn.Module) -> nn.Linear | None:
    """The output head, if it is frozen and linear and the model's logits are its product and nothing else, so that
    logits can be computed from `packed_hidden`, a part at a time; else None.

    Models that scale or cap their logits differ in an operation or two, so nothing is taken from names or settings: the
    first time, a pass of two tokens shows it.
    """
    head = frozen_linear_head(model)
    if head is None:
        return None
    if model not in _ends_with_head:
        with without_soft_prompt(model):
            _ends_with_head[model] = _probe_head(model, head)
    return head if _ends_with_head[model] else None


def _at_places(model: Any, batch: Batch, head: nn.Linear | None) -> torch.Tensor:
    """Logits at `batch.predict`, (P, V); with `head`, what enters it, (P, d)."""
    prompt = soft_prompt_of(model)
    prefix = prompt if prompt is not None and prompt.is_prefix else None
    if _config_attention(model) == ATTENTION_NAME:
        kept = None if prefix is None else prefix.by_layer(model.dtype)
        layout = {LAYOUT: Layout(batch.lengths, batch.forks, kept)}
        positions = batch.positions if prefix is None else batch.positions + prefix.length
        return _logits(model, batch.ids, positions, batch.predict, layout, head)
    assert not any(batch.forks), "only a model that packs can share what its rows begin with"
    pieces, start = [], 0
    for length in batch.lengths:
        inside = (batch.predict >= start) & (batch.predict < start + length)
        row = slice(start, start + length)
        if inside.any():
            ids, positions = batch.ids[row], batch.positions[row]
            if prefix is not None:  # whose tokens stand for it in a pass of its own
                ids = torch.cat([torch.tensor(prefix.ids).to(ids), ids])
                positions = torch.arange(len(ids)).to(positions)
            pieces.append(_logits(model, ids, positions, batch.predict[inside] - start, {}, head))
        start += length
    return torch.cat(pieces)


def has_dropout(model: torch.nn.Module) -> bool:
    """Whether the model draws anything in train mode; shared tokens would then have one draw for all their rows."""
    return any(map(draws, model.modules())) or bool(settings_that_draw(model))


def draws(module: torch.nn.Module) -> bool:
    """Whether this module itself, without its parts, is known to draw in train mode."""
    return module.p > 0 if isinstance(module, _DropoutNd) else isinstance(module, LoRA) and module.dropout > 0


def settings_that_draw(model: torch.nn.Module) -> list[str]:
    """The model's settings by which functions in it may draw in train mode, as "name value"."""
    return [
        f"{key} {value}"
        for key, value in _settings(model)
        if ("drop" in key or "jitter" in key) and isinstance(value, int | float) and value > 0
    ]


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
    model: torch.nn.Module,
    ids: torch.Tensor,
    positions: torch.Tensor,
    predict: torch.Tensor,
    extra: dict[str, Any],
    head: nn.Linear | None = None,
) -> torch.Tensor:
    """One forward of (1, T) tokens; the output head (and the last MLP) run at `predict` only, where the model can do
    that. With `head`, which then does not run, what enters it.
    """
    last_layer_keeps = keeps(model)
    keyword = KEEP if last_layer_keeps else "logits_to_keep"
    kept = last_layer_keeps or keyword in inspect.signature(model.forward).parameters
    if kept:
        extra = {**extra, keyword: predict}
    layout = extra.get(LAYOUT)
    lies = contextlib.nullcontext() if layout is None else laid_out([row.places for row in layout.rows])
    with lies, contextlib.nullcontext() if head is None else left_out(head) as entering:
        output = model(input_ids=ids[None], position_ids=positions[None], use_cache=False, **extra).logits
    if entering is not None and not entering.came_out(output):
        raise RuntimeError(
            f"{type(model).__name__} does more to its logits than when it was probed: were its settings changed since? "
            "Load it again"
        )
    logits: torch.Tensor = output.squeeze(0)
    assert not kept or len(logits) == len(predict), "the model does more after its last layer than was thought"
    return logits if kept else logits[predict]


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
    must not move when the first row's tokens change. Models that refuse our attention do not pack. On the meta device
    only that is seen.
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
        layout = Layout([len(row) for row in rows], forks[: len(rows)])
        every = torch.arange(len(tokens), device=device)
        logits = _logits(model, tokens, positions, every, {LAYOUT: layout} if len(rows) > 1 else {}).float()
        windows.update(layout.windows)
        return logits

    windows: set[int | None] = set()
    rows = torch.cat([beginning, one]), torch.cat([beginning, other])
    try:
        with _exchanged_attention(model):
            shared = run(*rows, forks=(0, len(beginning)))
            if device.type == "meta":
                return _longest_packable(model, windows)
            packed, moved = run(*rows), run(torch.cat([beginning, changed]), rows[1])
        alone = torch.cat([run(row) for row in rows])
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


@torch.inference_mode(False)
@torch.no_grad()
def _probe_head(model: torch.nn.Module, head: nn.Linear) -> bool:
    """Whether two tokens show that nothing but `head` stands between what enters it and the logits; False for a model
    that cannot run without.
    """
    device = head.weight.device
    at, places = torch.arange(2, device=device), torch.arange(2)  # a row alone asks which places are its own
    batch = Batch(at, at, (2,), (0,), places, None, at, (0,))
    was_training = model.training
    model.eval()
    try:
        packed_hidden(model, batch, head)
    except torch.OutOfMemoryError:
        raise
    except (RuntimeError, TypeError, KeyError, ValueError, IndexError):
        return False
    finally:
        model.train(was_training)
    return True
