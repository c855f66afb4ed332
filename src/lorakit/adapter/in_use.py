"""What adapters in use ask of a pass of their model: virtual tokens before its rows, tokens that rows may not share,
rows that are a part of a route. For who lays out rows and decodes; nothing of it where a model has no adapters.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence

import torch
from torch import nn

from lorakit.adapter.attach import handle_of
from lorakit.core.activated import Invocation
from lorakit.core.prompts import SoftPrompt


def invocations_of(model: nn.Module) -> tuple[Invocation, ...]:
    """Those of a model's activated adapters (aLoRA)."""
    handle = handle_of(model)
    return () if handle is None else tuple(handle.watch.invocations.values())


def soft_prompt_of(model: nn.Module) -> SoftPrompt | None:
    """The soft prompt that every row of a pass of `model` now has.

    Raises:
        AdapterError: inside `route`, where each row has its own.
    """
    handle = handle_of(model)
    return None if handle is None else handle.prompts.of_all()


def first_tokens(model: nn.Module) -> tuple[int, ...]:
    """The virtual tokens with which every row of `model`, as ids, now begins: of a prompt that is embeddings (a prefix
    is in no row). Errors as in `soft_prompt_of`.
    """
    prompt = soft_prompt_of(model)
    return () if prompt is None or prompt.is_prefix else tuple(prompt.ids)


def virtual_tokens(model: nn.Module) -> int:
    """How many virtual tokens every row of `model` now has, which take that much of its context. Errors as in
    `soft_prompt_of`.
    """
    prompt = soft_prompt_of(model)
    return 0 if prompt is None else prompt.length


def virtual_tokens_of_rows(model: nn.Module, rows: int) -> list[int]:
    """The same for each row of a batch, on a route or not.

    Raises:
        AdapterError: the route is of another number of rows.
    """
    handle = handle_of(model)
    prompts = [None] * rows if handle is None else handle.prompts.of_rows(rows)
    return [0 if prompt is None else prompt.length for prompt in prompts]


def has_prefix(model: nn.Module) -> bool:
    """Whether any row of `model` now has a prefix."""
    handle = handle_of(model)
    return handle is not None and handle.prompts.prefix_in_use


def with_virtual_tokens(model: nn.Module, ids: torch.Tensor, mask: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """A batch as `model` is to be given it now: ids and mask (rows, n), with the columns of its virtual tokens. Errors
    as in `virtual_tokens_of_rows`.
    """
    handle = handle_of(model)
    return (ids, mask) if handle is None else handle.prompts.before(ids, mask)


@contextlib.contextmanager
def without_soft_prompt(model: nn.Module) -> Iterator[None]:
    """Within the block no adapter is in use if one that is has a soft prompt; else all stays as it is."""
    handle = handle_of(model)
    with handle.disabled() if handle is not None and handle.prompts.in_use else contextlib.nullcontext():
        yield


@contextlib.contextmanager
def rows_only(model: nn.Module, rows: Sequence[int]) -> Iterator[None]:
    """Within the block a route of `model`, if it runs in one, is of these of its rows alone, in this order."""
    handle = handle_of(model)
    with contextlib.nullcontext() if handle is None else handle.rows_only(rows):
        yield
