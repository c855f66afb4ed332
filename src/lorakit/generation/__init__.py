"""Batched decoding over transformers' `model.generate`. Knows token ids and text, no files and no chat templates.

Each row's result is its own: greedy decoding gives in a batch what it gives alone (to rounding), and sampling draws
from numbers that belong to (seed, row, step).
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from lorakit import machine, models
from lorakit.adapter.in_use import has_prefix, invocations_of, rows_only, virtual_tokens_of_rows, with_virtual_tokens
from lorakit.adapter.invocations import begun_by
from lorakit.core.unpacked import unpacked
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
    unpack_memory: int | None = None,
    on_progress: Callable[[int, int], None] | None = None,
) -> list[Completion]:
    """Complete many prompts.

    Args:
        model: a transformers causal language model, adapted or not. Its own generation settings (a penalty, a forced
            token) do not apply; they are restored afterwards. On a route, each prompt has its own adapter.
        tokenizer: decodes the result.
        prompts: token ids, as the model is to see them.
        max_new_tokens: largest number of tokens to write per row.
        temperature: 0 takes the most probable token; otherwise divides the logits before drawing.
        top_p: in (0, 1]: draw only from the most probable tokens that together reach this probability.
        seed: determines the draws, together with the row's number and the step.
        batch_size: largest number of rows at once; fewer where rows are long (`BATCH_TOKENS`).
        stop_ids: ids at which a row ends; None asks `models.stop_ids`.
        unpack_memory: see `decoding`.
        on_progress: called with (rows done, rows in all) after each batch.

    Returns:
        One completion per prompt, in the order of the prompts.

    Raises:
        ConfigError: a setting is out of range, a prompt is empty, or does not fit into the model's context with
            `max_new_tokens`.
        AdapterError: the model runs on a route of another number of rows.
    """
    _check_settings(max_new_tokens, temperature, top_p, seed, batch_size)
    lengths = _checked_lengths(model, prompts, max_new_tokens)
    stop = models.stop_ids(model, tokenizer) if stop_ids is None else stop_ids
    results: dict[int, Completion] = {}
    if _must_go_alone(model, lengths, max_new_tokens):
        batch_size = 1
    with decoding(model, unpack_memory):
        for rows in _batches(lengths, max_new_tokens, batch_size):
            sampling = None
            if temperature > 0:
                sampling = functools.partial(RowSampler, seed, rows, max_new_tokens, temperature, top_p)
            new = _decode(model, {row: prompts[row] for row in rows}, max_new_tokens, stop, sampling)
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
    unpack_memory: int | None = None,
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
    _checked_lengths(model, [prompt], max_new_tokens)
    stop = models.stop_ids(model, tokenizer) if stop_ids is None else stop_ids
    sampling = None
    if temperature > 0:
        sampling = functools.partial(RowSampler, seed, [0], max_new_tokens, temperature, top_p)
    caller = Caller(tokenizer, skip_prompt=True, skip_special_tokens=True)
    with decoding(model, unpack_memory):
        (ids,) = _decode(model, {0: prompt}, max_new_tokens, stop, sampling, streamer=caller)
    return _completion(tokenizer, ids, stop)


@contextlib.contextmanager
def decoding(model: Any, unpack_memory: int | None = None) -> Iterator[None]:
    """Within the block a quantised base decodes by dense weights, as many as the memory given holds: unpacking all of
    them for every token takes many times as long as the token. Of a dense base nothing changes.

    `generate` and `stream` enter it by themselves; around several calls it is entered once, and they are given 0.

    Args:
        model: as in `generate`.
        unpack_memory: bytes for weights unpacked, let go behind the block; 0: none. None: half of what is free on the
            model's device, and none where the system does not say what is.

    Raises:
        ConfigError: less than nothing.
    """
    if unpack_memory is None:
        unpack_memory = (machine.free_memory(model.get_input_embeddings().weight.device) or 0) // 2
    if unpack_memory < 0:
        raise ConfigError(f"unpack_memory: bytes, at least 0 (got {unpack_memory})")
    with unpacked(model, unpack_memory):
        yield


def _must_go_alone(model: Any, lengths: Sequence[int], max_new_tokens: int) -> bool:
    """Whether rows are answered one by one: where there is a prefix, what shorter rows of a batch are filled up with
    lies between it and them, and a sliding window would count that.
    """
    window = getattr(model.config.get_text_config(decoder=True), "sliding_window", None)
    if window is None or max(lengths, default=0) + max_new_tokens <= window:
        return False
    return has_prefix(model)


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
    prompts: Mapping[int, Sequence[int]],
    max_new_tokens: int,
    stop: frozenset[int],
    sampling: Callable[[int], RowSampler] | None,
    streamer: Any = None,
) -> list[list[int]]:
    """One batch through `model.generate`: left-padded prompts in, new ids (with whatever follows a stop id) out.

    `generate` goes on with all rows until the last one has ended, so it is called for `ROUND_TOKENS` at a time, and
    rows that have ended leave the batch in between. Keys and values of the others are kept if they are plain tensors.

    Args:
        model: as in `generate`.
        prompts: by the number of each row in the whole call, which is its place on a route.
        max_new_tokens: as in `generate`.
        stop: ids at which a row ends.
        sampling: makes what draws, of the number of tokens before the first that is drawn.
        streamer: of transformers.
    """
    import transformers

    longest = max(len(prompt) for prompt in prompts.values())
    device = model.get_input_embeddings().weight.device
    pad = min(stop, default=0)  # masked before the prompt and cut off after the answer, so any id will do
    missing = [longest - len(prompt) for prompt in prompts.values()]
    ids = torch.tensor([[pad] * n + list(prompt) for n, prompt in zip(missing, prompts.values(), strict=True)])
    mask = torch.tensor([[0] * n + [1] * (longest - n) for n in missing])
    numbers = list(prompts)
    with rows_only(model, numbers):
        ids, mask = (each.to(device) for each in with_virtual_tokens(model, ids, mask))
    longest = ids.shape[1]
    sampler = None if sampling is None else sampling(longest)
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
        here = [numbers[row] for row in rows.tolist()]
        on_route = rows_only(model, here)
        invoked = begun_by(invocations_of(model), [prompts[number] for number in here], longest)
        with torch.inference_mode(), _own_settings(model, settings), on_route, invoked:
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


def _checked_lengths(model: Any, prompts: Sequence[Sequence[int]], max_new_tokens: int) -> list[int]:
    """Tokens of each prompt, those of its soft prompt included.

    Raises:
        ConfigError: one is empty, or does not fit into the model's context with what is to be written.
    """
    empty = [row for row, prompt in enumerate(prompts) if not prompt]
    if empty:
        raise ConfigError(f"prompt {empty[0]} has no tokens ({len(empty)} such prompt(s)); give it some text")
    virtual = virtual_tokens_of_rows(model, len(prompts))
    lengths = [n + len(prompt) for n, prompt in zip(virtual, prompts, strict=True)]
    context = getattr(model.config.get_text_config(decoder=True), "max_position_embeddings", None)
    if context is None:
        return lengths
    beyond = [row for row, length in enumerate(lengths) if length + max_new_tokens > context]
    if beyond:
        longest = max(lengths[row] for row in beyond)
        soft = " with those of a soft prompt" if any(virtual[row] for row in beyond) else ""
        raise ConfigError(
            f"{len(beyond)} of {len(prompts)} prompts (first: number {beyond[0]}; longest: {longest:,} tokens{soft}) "
            f"and max_new_tokens={max_new_tokens:,} do not fit into the model's context of {context:,} tokens. "
            "Shorten the prompts or lower max_new_tokens."
        )
    return lengths
