"""Which tokens activated adapters (aLoRA) are for: found in what the model is called with, before it runs.

An adapter counts from the start of the last occurrence of its invocation in a row; a row without has the base alone
(PEFT's rule). A row may come in pieces, with keys and values of the pieces before: what was invoked stays so, and a
piece in which the invocation comes again counts from there. Who lays rows out in another way, or knows better where
rows begin to count, says so (`laid_out`, `begun_by`).
"""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Iterator, Mapping, Sequence
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from lorakit.core import activated
from lorakit.core.activated import Invocation, Mask
from lorakit.errors import AdapterError

_NOTE = "lorakit_invoked"  # on keys and values: in which of their rows what was invoked
_NEVER = torch.iinfo(torch.int64).max


def last_start(ids: torch.Tensor, tokens: Sequence[int]) -> torch.Tensor:
    """Where the last occurrence of some tokens begins in each row.

    Args:
        ids: (rows, length).
        tokens: at least one.

    Returns:
        (rows,) int64; -1: nowhere.
    """
    if ids.shape[1] < len(tokens):
        return ids.new_full((len(ids),), -1, dtype=torch.int64)
    sought = torch.tensor(tokens, device=ids.device, dtype=ids.dtype)
    hit = (ids.unfold(1, len(tokens), 1) == sought).all(-1)  # (rows, length - n + 1)
    at = torch.arange(hit.shape[1], device=ids.device)
    return torch.where(hit, at, -1).amax(1)


def start_in(ids: Sequence[int], tokens: Sequence[int]) -> int | None:
    """The same for one row of plain numbers; None: nowhere."""
    start = int(last_start(torch.tensor([list(ids)]), tokens)[0])
    return None if start < 0 else start


class Watch:
    """Looks at what a model is called with while activated adapters are in it.

    Attributes:
        invocations: slot -> that of the adapter there.
    """

    def __init__(self) -> None:
        self.invocations: dict[str, Invocation] = {}
        self._hooks: list[RemovableHandle] = []

    def take(self, model: nn.Module, slot: str, invocation: Invocation) -> None:
        """An adapter has come into `model`."""
        if not self.invocations:
            self._hooks = [
                model.register_forward_pre_hook(self.before, with_kwargs=True),
                model.register_forward_hook(self.after, with_kwargs=True, always_call=True),
            ]
        self.invocations[slot] = invocation

    def leave(self, slot: str) -> None:
        """The adapter in a slot, activated or not, has gone."""
        if self.invocations.pop(slot, None) is not None and not self.invocations:
            for hook in self._hooks:
                hook.remove()
            self._hooks = []

    def before(self, model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        """Hook: find out which tokens of the pass each adapter is for.

        Raises:
            AdapterError: that cannot be told.
        """
        activated.begin(self)
        given = _by_name(model, args, kwargs)
        ids = given.get("input_ids")
        if not isinstance(ids, torch.Tensor) or ids.ndim != 2 or ids.is_floating_point():
            return  # a layer with such an adapter will say what is missing
        masks, invoked = {}, {}
        for invocation in self.invocations.values():
            where, has_come = _where(invocation, ids, given.get("past_key_values"))
            masks[invocation], invoked[invocation.tokens] = Mask(where), has_come
        activated.found(masks, invoked)

    def after(self, model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any], output: Any) -> None:
        """Hook: the pass is over; keys and values remember what was invoked."""
        over = activated.end(self)
        if over is None or not over.invoked:
            return
        cache = getattr(output, "past_key_values", None)
        if cache is None:  # a plain tuple came out: they are those that went in
            cache = _by_name(model, args, kwargs).get("past_key_values")
        if cache is not None and not isinstance(cache, tuple):
            vars(cache)[_NOTE] = dict(over.invoked)


def _by_name(model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Mapping[str, Any]:
    """What a model is called with, by the names of its arguments; its first one is the token ids, whatever it calls
    them.
    """
    if not args:
        return kwargs
    names = list(inspect.signature(model.forward).parameters)
    return {**dict(zip(names, args, strict=False)), "input_ids": args[0], **kwargs}


def _where(invocation: Invocation, ids: torch.Tensor, cache: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """(rows, tokens) for which of `ids` an adapter is, and (rows,) in which rows it has been invoked.

    Args:
        invocation: of the adapter.
        ids: (rows, tokens) of this pass.
        cache: keys and values of the passes before, if there are any.
    """
    told, at = _told.get(), torch.arange(ids.shape[1], device=ids.device)
    if ids.is_meta:  # without numbers nothing can be found; what is computed is the same
        return torch.ones_like(ids, dtype=torch.bool), ids.new_ones(len(ids), dtype=torch.bool)
    if told.rows is not None:
        where = _of_line(ids[0].cpu(), told.rows, invocation.tokens).to(ids.device)[None]
        return where, where.any(1)
    if told.starts is not None and invocation in told.starts:
        starts = told.starts[invocation].to(ids.device)
        if len(starts) != len(ids):
            raise AdapterError(f"the pass has {len(ids)} rows, its prompts were {len(starts)}")
        return _length(cache) + at >= starts[:, None], starts < _NEVER
    starts = last_start(ids, invocation.tokens)
    has_come = starts >= 0
    where = has_come[:, None] & (at >= starts[:, None])
    if _length(cache) == 0:
        return where, has_come
    before = None if isinstance(cache, tuple) else vars(cache).get(_NOTE, {}).get(invocation.tokens)
    if before is None and not bool(has_come.all()):
        raise AdapterError(
            "keys and values are given, and whether an activated adapter was invoked in what they are of is not known "
            f"(tokens {list(invocation.tokens)}): compute them with this model while its adapters are attached (active "
            "or not), or give a piece that holds the invocation"
        )
    if before is not None and len(before) != len(ids):
        raise AdapterError(f"keys and values are of {len(before)} rows, the pass has {len(ids)}")
    if before is not None:
        before = before.to(ids.device)
        where, has_come = where | (before & ~has_come)[:, None], has_come | before
    return where, has_come


def _length(cache: Any) -> int:
    """How many tokens keys and values are of."""
    if cache is None:
        return 0
    return len(cache) and cache[0][0].shape[-2] if isinstance(cache, tuple) else int(cache.get_seq_length())


def _of_line(ids: torch.Tensor, rows: Sequence[torch.Tensor], tokens: Sequence[int]) -> torch.Tensor:
    """(T,) for rows that lie in one line of T tokens, each at its places.

    Raises:
        AdapterError: two rows share a token that one of them is to activate and the other is not.
    """
    where, known = torch.zeros(len(ids), dtype=torch.bool), torch.zeros(len(ids), dtype=torch.bool)
    for places in rows:
        start = int(last_start(ids[places][None], tokens)[0])
        own = torch.arange(len(places)) >= (start if start >= 0 else len(places))
        if bool((known[places] & (where[places] != own)).any()):
            raise AdapterError(
                "rows share tokens that an activated adapter is for in one of them and not in the other; they must be "
                "collated with invocations=invocations_of(model)"
            )
        where[places], known[places] = own, True
    return where


# ---------------------------------------------------------------- what callers know better


@dataclass(frozen=True)
class _Told:
    rows: Sequence[torch.Tensor] | None = None
    starts: Mapping[Invocation, torch.Tensor] | None = None


_told: ContextVar[_Told] = ContextVar("lorakit_told", default=_Told())  # noqa: B039 - it is never changed


@contextlib.contextmanager
def _telling(told: _Told) -> Iterator[None]:
    token = _told.set(told)
    try:
        yield
    finally:
        _told.reset(token)


def laid_out(rows: Sequence[torch.Tensor]) -> contextlib.AbstractContextManager[None]:
    """Within the block, models are given one line of tokens in which each row lies at its `rows[i]` places."""
    return _telling(_Told(rows=rows))


def begun_by(
    invocations: Sequence[Invocation], prompts: Sequence[Sequence[int]], width: int
) -> contextlib.AbstractContextManager[None]:
    """Within the block, what counts of rows is what they were invoked with in their prompts, whatever is written after
    them.

    Args:
        invocations: of the adapters in the model.
        prompts: one a row.
        width: tokens of a prompt with what stands to its left to make all equally long.
    """
    starts = {}
    for invocation in invocations:
        found = [start_in(prompt, invocation.tokens) for prompt in prompts]
        starts[invocation] = torch.tensor(
            [
                _NEVER if start is None else width - len(prompt) + start
                for start, prompt in zip(found, prompts, strict=True)
            ]
        )
    return _telling(_Told(starts=starts))
