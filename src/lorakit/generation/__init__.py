"""Batched decoding over transformers' `model.generate`. Knows token ids and text, no files and no chat templates.

Each row's result is its own: greedy decoding gives in a batch what it gives alone (to rounding), and sampling draws
from numbers that belong to (seed, row, step).
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from lorakit import models
from lorakit.adapter.attach import invocations_of
from lorakit.adapter.invocations import begun_by
from lorakit.errors import ConfigError
from lorakit.generation.sampling import RowSampler

ROUND_TOKENS = 16  # between looks for rows that have ended
BATCH_TOKENS = 16_384  # prompt and new tokens of a batch, padding included: bounds the memory of keys and values


@dataclass(frozen=True)
class Completion:
    """What a model wrote after a prompt."""

    ids: tuple[int, ...]
    """New tokens, without the one at which generation stopped."""

    text: str
    """`ids` decoded, special tokens left out."""

    finished: bool
    """Whether the model stopped by itself (at a stop id) and not at `max_new_tokens`."""


def generate(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int = 256,
    temperature: float = 0.0,
    top_p: float = 1.0,
    seed: int = 0,
    batch_size: int = 32,
    stop_ids: frozenset[int] | None = None,
    on_progress: Callable[[int, int], None] | None = None,
) -> list[Completion]:
    """Complete many prompts.

    Args:
        model: a transformers causal language model, adapted or not. Its own generation settings (a penalty, a forced
            token) do not apply; they are restored afterwards.
        tokenizer: decodes the result.
        prompts: token ids, as the model is to see them.
        max_new_tokens: largest number of tokens to write per row.
        temperature: 0 takes the most probable token; otherwise divides the logits before drawing.
        top_p: in (0, 1]: draw only from the most probable tokens that together reach this probability.
        seed: determines the draws, together with the row's number and the step.
        batch_size: largest number of rows at once; fewer where rows are long (`BATCH_TOKENS`).
        stop_ids: ids at which a row ends; None asks `models.stop_ids`.
        on_progress: called with (rows done, rows in all) after each batch.

    Returns:
        One completion per prompt, in the order of the prompts.

    Raises:
        ConfigError: a setting is out of range, a prompt is empty, or does not fit into the model's context with
            `max_new_tokens`.
    """
    _check_settings(max_new_tokens, temperature, top_p, seed, batch_size)
    _check_prompts(model, prompts, max_new_tokens)
    stop = models.stop_ids(model, tokenizer) if stop_ids is None else stop_ids
    results: dict[int, Completion] = {}
    for rows in _batches([len(prompt) for prompt in prompts], max_new_tokens, batch_size):
        sampler = None
        if temperature > 0:
            longest = len(prompts[rows[-1]])
            sampler = RowSampler(seed, rows, longest, max_new_tokens, temperature, top_p)
        new = _decode(model, [prompts[row] for row in rows], max_new_tokens, stop, sampler)
        for row, ids in zip(rows, new, strict=True):
            results[row] = _completion(tokenizer, ids, stop)
        if on_progress is not None:
            on_progress(len(results), len(prompts))
    return [results[row] for row in range(len(prompts))]


def stream(
    model: Any,
    tokenizer: Any,
    prompt: Sequence[int],
    *,
    on_text: Callable[[str], None],
    max_new_tokens: int = 256,
    temperature: float = 0.0,
    top_p: float = 1.0,
    seed: int = 0,
    stop_ids: frozenset[int] | None = None,
) -> Completion:
    """Complete one prompt and hand over its text word by word while it is written; otherwise as `generate`."""
    from transformers import TextStreamer

    class Caller(TextStreamer):
        """Hands finished text to `on_text` where transformers would print it."""

        def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
            """Called by transformers with text that later tokens cannot change."""
            if text:
                on_text(text)

    _check_settings(max_new_tokens, temperature, top_p, seed, batch_size=1)
    _check_prompts(model, [prompt], max_new_tokens)
    stop = models.stop_ids(model, tokenizer) if stop_ids is None else stop_ids
    sampler = RowSampler(seed, [0], len(prompt), max_new_tokens, temperature, top_p) if temperature > 0 else None
    caller = Caller(tokenizer, skip_prompt=True, skip_special_tokens=True)
    (ids,) = _decode(model, [prompt], max_new_tokens, stop, sampler, streamer=caller)
    return _completion(tokenizer, ids, stop)


def _batches(lengths: Sequence[int], max_new_tokens: int, batch_size: int) -> Iterator[list[int]]:
    """Row numbers in batches of similar length, short ones first; the last row of a batch is its longest."""
    batch: list[int] = []
    for row in sorted(range(len(lengths)), key=lambda row: (lengths[row], row)):
        if batch and (len(batch) == batch_size or (len(batch) + 1) * (lengths[row] + max_new_tokens) > BATCH_TOKENS):
            yield batch
            batch = []
        batch.append(row)
    if batch:
        yield batch


def _decode(
    model: Any,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    stop: frozenset[int],
    sampler: RowSampler | None,
    streamer: Any = None,
) -> list[list[int]]:
    """One batch through `model.generate`: left-padded prompts in, new ids (with whatever follows a stop id) out.

    `generate` goes on with all rows until the last one has ended, so it is called for `ROUND_TOKENS` at a time, and
    rows that have ended leave the batch in between. Keys and values of the others are kept if they are plain tensors.
    """
    import transformers

    longest = max(len(prompt) for prompt in prompts)
    device = model.get_input_embeddings().weight.device
    pad = min(stop, default=0)  # masked before the prompt and cut off after the answer, so any id will do
    ids = torch.tensor([[pad] * (longest - len(prompt)) + list(prompt) for prompt in prompts], device=device)
    mask = torch.tensor([[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in prompts], device=device)
    rows = torch.arange(len(prompts), device=device)  # which prompt each row of the shrinking batch belongs to
    stop_tensor = torch.tensor(sorted(stop), dtype=torch.long, device=device)
    results: dict[int, list[int]] = {}
    cache = None
    generation_config: Any = transformers.GenerationConfig
    while len(rows):
        left = max_new_tokens - (ids.shape[1] - longest)
        settings = generation_config(
            max_new_tokens=left if len(rows) == 1 else min(left, ROUND_TOKENS),
            do_sample=False,  # the sampler leaves one token possible, so the most probable one is the one drawn
            eos_token_id=sorted(stop) or None,
            pad_token_id=pad,
            return_dict_in_generate=True,
        )
        of_rows = begun_by(invocations_of(model), [prompts[row] for row in rows.tolist()], longest)
        with torch.inference_mode(), _own_settings(model, settings), of_rows:
            output = model.generate(
                ids,
                attention_mask=mask,
                generation_config=settings,
                logits_processor=transformers.LogitsProcessorList([sampler] if sampler is not None else []),
                streamer=streamer,
                past_key_values=cache,
            )
        ended = torch.isin(output.sequences[:, ids.shape[1] :], stop_tensor).any(dim=1)
        if output.sequences.shape[1] == longest + max_new_tokens:
            ended[:] = True
        results |= dict(zip(rows[ended].tolist(), output.sequences[ended, longest:].tolist(), strict=True))
        going_on = (~ended).nonzero().flatten()
        rows, ids = rows[going_on], output.sequences[going_on]
        mask = torch.nn.functional.pad(mask[going_on], (0, ids.shape[1] - mask.shape[1]), value=1)
        cache = _kept(output.past_key_values, going_on, len(ended))
        if sampler is not None:
            sampler.keep(going_on.tolist())
    return [results[row] for row in range(len(prompts))]


def _kept(cache: Any, rows: torch.Tensor, of: int) -> Any:
    """The cache with only these of its rows; None (compute it anew) if it holds more than plain keys and values."""
    from transformers import DynamicCache
    from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

    plain = isinstance(cache, DynamicCache) and all(
        type(layer) in (DynamicLayer, DynamicSlidingWindowLayer) for layer in cache.layers
    )
    if not plain or not len(rows):
        return None
    if len(rows) < of:
        cache.batch_select_indices(rows)
    return cache


@contextlib.contextmanager
def _own_settings(model: Any, settings: Any) -> Iterator[None]:
    """The model in evaluation mode and without its own generation settings, which `generate` would merge into ours."""
    training, configured = model.training, model.generation_config
    model.eval()
    model.generation_config = settings
    try:
        yield
    finally:
        model.generation_config = configured
        model.train(training)


def _completion(tokenizer: Any, ids: list[int], stop: frozenset[int]) -> Completion:
    end = next((position for position, token in enumerate(ids) if token in stop), None)
    kept = tuple(ids[:end])
    return Completion(kept, str(tokenizer.decode(kept, skip_special_tokens=True)), end is not None)


def _check_settings(max_new_tokens: int, temperature: float, top_p: float, seed: int, batch_size: int) -> None:
    if max_new_tokens < 1:
        raise ConfigError(f"max_new_tokens: must be at least 1 (got {max_new_tokens})")
    if not 0 <= temperature < float("inf"):
        raise ConfigError(f"temperature: must be 0 (most probable token) or a positive number (got {temperature})")
    if not 0 < top_p <= 1:
        raise ConfigError(f"top_p: must be in (0, 1] (got {top_p})")
    if not 0 <= seed < 2**64:
        raise ConfigError(f"seed: must be in [0, 2**64) (got {seed})")
    if batch_size < 1:
        raise ConfigError(f"batch_size: must be at least 1 (got {batch_size})")


def _check_prompts(model: Any, prompts: Sequence[Sequence[int]], max_new_tokens: int) -> None:
    empty = [row for row, prompt in enumerate(prompts) if not prompt]
    if empty:
        raise ConfigError(f"prompt {empty[0]} has no tokens ({len(empty)} such prompt(s)); give it some text")
    context = getattr(model.config.get_text_config(decoder=True), "max_position_embeddings", None)
    if context is None:
        return
    beyond = [row for row, prompt in enumerate(prompts) if len(prompt) + max_new_tokens > context]
    if beyond:
        longest = max(len(prompts[row]) for row in beyond)
        raise ConfigError(
            f"{len(beyond)} of {len(prompts)} prompts (first: number {beyond[0]}; longest: {longest:,} tokens) and "
            f"max_new_tokens={max_new_tokens:,} do not fit into the model's context of {context:,} tokens. "
            "Shorten the prompts or lower max_new_tokens."
        )
