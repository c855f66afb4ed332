"""The invocation of a run's activated adapter (aLoRA): its tokens, and what of the rows it reaches. Knows no model."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from lorakit.adapter.invocations import start_in
from lorakit.data.batches import read_ids
from lorakit.data.chat import Example
from lorakit.errors import ConfigError
from lorakit.models import load_tokenizer
from lorakit.training.config import TrainConfig


def with_invocation(config: TrainConfig) -> TrainConfig:
    """The config with the tokens of `invocation` in place of its text.

    Raises:
        ConfigError: the tokenizer makes nothing of it, or other tokens than are given.
    """
    if config.invocation is None:
        return config
    tokens = tuple(load_tokenizer(config.model).encode(config.invocation, add_special_tokens=False))
    if not tokens:
        raise ConfigError(f"invocation: the tokenizer of {config.model} makes no token of {config.invocation!r}")
    if config.lora.alora_invocation_tokens not in ((), tokens):  # a run that goes on has them from its run.yaml
        raise ConfigError(
            f"invocation: {config.invocation!r} is {list(tokens)} in tokens, and alora_invocation_tokens are "
            f"{list(config.lora.alora_invocation_tokens)}; leave one of them out"
        )
    return config.replace(invocation=None, lora=config.lora.replace(alora_invocation_tokens=tokens))


def invocation_line(tokens: Sequence[int], tokenizer: Any, examples: Sequence[Example]) -> str:
    """What a person should know of an invocation in training rows.

    Raises:
        ConfigError: no trained token comes after it in any row, so nothing would be trained.
    """
    rows = trained = reached = 0
    for example in examples:
        start = start_in(read_ids(example), tokens)
        targets = [i for i, is_target in enumerate(example.trained) if is_target]
        rows += start is not None
        trained += len(targets)
        reached += 0 if start is None else sum(i > start for i in targets)  # a token is predicted by the one before it
    text = f"{tokenizer.decode(list(tokens))!r} (tokens {', '.join(map(str, tokens))})"
    if not reached:
        raise ConfigError(
            f"alora_invocation_tokens: {text} is in {rows:,} of {len(examples):,} training rows, and before a trained "
            "token in none, so nothing would be trained; look at the rows' tokens with lorakit check (beside its "
            "neighbours a text may become other tokens)"
        )
    missed = (
        "" if reached == trained else f"; {1 - reached / trained:.1%} of trained tokens are not after it: base alone"
    )
    return f"alora  invoked by {text} in {rows:,} of {len(examples):,} rows{missed}"
