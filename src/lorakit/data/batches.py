"""Rows laid end to end without padding, and the plan of which go together. Knows token ids and masks, no text."""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch

from lorakit.adapter.invocations import start_in

if TYPE_CHECKING:
    from lorakit.core.activated import Invocation
    from lorakit.data.chat import Example


LEAST_SHARED = 8  # tokens; a shorter common beginning saves less than setting it apart costs


@dataclass(frozen=True)
class Batch:
    """A micro-batch: rows end to end in one sequence of T tokens, with L targets. All tensors int64.

    A row is what the model reads of an example: its tokens up to the last one that predicts a target.

    Rows that begin alike may form a tree: what a row has in common with the row before it stands once, there, and the
    row brings only the rest, its own tokens.
    """

    ids: torch.Tensor
    """(T,) token ids: the own tokens of each row, row after row."""

    positions: torch.Tensor
    """(T,) places in the whole row: 0, 1, 2, ...; own tokens behind a fork go on from it."""

    lengths: tuple[int, ...]
    """Tokens of each whole row."""

    forks: tuple[int, ...]
    """How many first tokens of each row are those of the row before it and stand there; 0: none. At least one token of
    each row is its own, so T = sum(lengths) - sum(forks).
    """

    predict: torch.Tensor
    """(P,) different places in [0, T) whose logits predict targets."""

    source: torch.Tensor | None
    """(L,) which of `predict` predicts each target; None: each its own, in this order. A place that ends what several
    rows share predicts for each of them.
    """

    targets: torch.Tensor
    """(L,) the trained tokens, row after row."""

    rows: tuple[int, ...]
    """Index of each row among the examples."""

    def to(self, device: torch.device | str) -> Batch:
        """The same batch with its tensors on `device`."""

        def moved(tensor: torch.Tensor) -> torch.Tensor:
            return tensor.to(device, non_blocking=True)

        return replace(
            self,
            ids=moved(self.ids),
            positions=moved(self.positions),
            predict=moved(self.predict),
            source=None if self.source is None else moved(self.source),
            targets=moved(self.targets),
        )


def row_places(lengths: Sequence[int], forks: Sequence[int]) -> list[torch.Tensor]:
    """Where the tokens of each whole row lie in the packed sequence: (length,) int64 for each row.

    >>> row_places((3, 4), (0, 2))
    [tensor([0, 1, 2]), tensor([0, 1, 3, 4])]
    """
    places: list[torch.Tensor] = []
    start = 0
    for length, fork in zip(lengths, forks, strict=True):
        own = torch.arange(start, start + length - fork)
        places.append(torch.cat([places[-1][:fork], own]) if fork else own)
        start += length - fork
    return places


def collate(
    examples: Sequence[Example],
    indices: Sequence[int],
    *,
    share: bool = False,
    first: Sequence[int] = (),
    invocations: Sequence[Invocation] = (),
) -> Batch:
    """Lay the examples at `indices` end to end.

    The first token of a row is never a target: nothing in its row predicts it, and the row before must not. What comes
    after the last token that predicts one (the end token itself, what a template puts after it, turns that are not
    trained) is left out: no token before it could tell.

    Args:
        examples: all of them.
        indices: which, in the order in which they lie.
        share: let what rows begin with in common (a system prompt, a template, a whole question) stand once; the rows
            are laid in lexical order for it. Exact: causal attention makes a token's activations a function of the
            tokens before it, and their gradient is the sum over the rows that have them.
        first: tokens that stand before every row: the virtual ones of a soft prompt.
        invocations: of the model's activated adapters (aLoRA): a token that one is for in a row does not stand for a
            row in which it is not.
    """
    assert all(examples[i].ids and not examples[i].trained[0] for i in indices), "a row is empty or trains its start"
    read = {i: read_ids(examples[i]) for i in indices}
    if share:
        indices = sorted(indices, key=lambda i: (read[i], i))
    chosen = [[*first, *read[i]] for i in indices]
    forks = [0] * len(chosen)
    if share:
        forks[1:] = [_fork(before, row, invocations) for before, row in itertools.pairwise(chosen)]
    lengths = tuple(len(row) for row in chosen)
    places = row_places(lengths, forks)
    flags = [torch.tensor(examples[i].trained) for i in indices]
    # a row's first token is no target even behind others
    predict = torch.cat(
        [place[len(first) :][flag[1:].nonzero().flatten()] for place, flag in zip(places, flags, strict=True)]
    )
    different, source = torch.unique(predict, return_inverse=True)
    repeats = len(different) < len(predict)
    return Batch(
        ids=torch.tensor([token for row, fork in zip(chosen, forks, strict=True) for token in row[fork:]]),
        positions=torch.cat([torch.arange(fork, n) for fork, n in zip(forks, lengths, strict=True)]),
        lengths=lengths,
        forks=tuple(forks),
        predict=different if repeats else predict,
        source=source if repeats else None,
        targets=torch.cat([torch.tensor(examples[i].ids)[flag] for i, flag in zip(indices, flags, strict=True)]),
        rows=tuple(indices),
    )


def read_ids(example: Example) -> list[int]:
    """What the model reads of an example: its tokens before the last target; without targets, the first one."""
    last = max((i for i, trained in enumerate(example.trained) if trained), default=1)
    return example.ids[:last]


def _fork(before: Sequence[int], row: Sequence[int], invocations: Sequence[Invocation]) -> int:
    """How many first tokens a row takes from the one before it; at least one stays its own, and so do those that an
    activated adapter is for in one of the two alone.
    """
    longest = min(len(before), len(row) - 1)
    common = next((i for i in range(longest) if before[i] != row[i]), longest)
    for invocation in invocations:
        starts = [common if (start := start_in(ids, invocation.tokens)) is None else start for ids in (before, row)]
        if min(starts[0], common) != min(starts[1], common):
            common = min(*starts, common)
    return common if common >= LEAST_SHARED else 0


def epoch_order(count: int, seed: int, epoch: int) -> list[int]:
    """A permutation of range(count): a function of the three integers alone, the same on every machine."""
    digest = hashlib.blake2b(repr((seed, epoch)).encode(), digest_size=8).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest, "big") >> 1)
    order: list[int] = torch.randperm(count, generator=generator).tolist()
    return order


def plan_steps(
    lengths: Sequence[int], *, seed: int, epoch: int, batch_size: int, micro_batch_tokens: int
) -> list[list[list[int]]]:
    """The steps of an epoch: each a list of micro-batches, each a list of example indices; every example once.

    A step takes the next `batch_size` examples of the epoch's order. Inside a step the order changes nothing but
    rounding (the gradient is a sum over tokens), so examples are sorted by length: attention is cheapest among equals.

    Args:
        lengths: tokens of each example.
        seed: of the run.
        epoch: from 0.
        batch_size: examples a step; the last step of an epoch takes what is left.
        micro_batch_tokens: most tokens a micro-batch holds; a longer example stands alone.
    """
    order = epoch_order(len(lengths), seed, epoch)
    steps = (order[start : start + batch_size] for start in range(0, len(order), batch_size))
    return [_micro_batches(step, lengths, micro_batch_tokens) for step in steps]


def plan_evaluation(lengths: Sequence[int], *, micro_batch_tokens: int) -> list[list[int]]:
    """Micro-batches over all examples once, for a loss in bounded memory."""
    return _micro_batches(range(len(lengths)), lengths, micro_batch_tokens)


def _micro_batches(indices: Sequence[int], lengths: Sequence[int], micro_batch_tokens: int) -> list[list[int]]:
    batches: list[list[int]] = []
    room = 0
    for index in sorted(indices, key=lambda i: (lengths[i], i)):
        if lengths[index] > room:
            batches.append([])
            room = micro_batch_tokens
        batches[-1].append(index)
        room -= lengths[index]
    return batches
