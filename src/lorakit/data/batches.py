"""Rows laid end to end without padding, and the plan of which go together. Knows token ids and masks, no text."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from lorakit.data.chat import Example


LEAST_SHARED = 8  # tokens; a shorter common beginning saves less than setting it apart costs


@dataclass(frozen=True)
class Batch:
    """A micro-batch: rows end to end in one sequence of T tokens, L of which are targets. All tensors int64.

    What all rows begin with may stand once, before them; each row is then what follows it.
    """

    ids: torch.Tensor
    """(T,) token ids."""

    positions: torch.Tensor
    """(T,) places in the whole row: 0, 1, 2, ...; what follows a shared beginning goes on from its length."""

    lengths: tuple[int, ...]
    """Tokens of each row behind the shared beginning; with that they sum to T."""

    predict: torch.Tensor
    """(L,) rising places in [0, T) whose logits predict a target."""

    targets: torch.Tensor
    """(L,) `ids[predict + 1]`: the trained tokens."""

    rows: tuple[int, ...]
    """Index of each row among the examples."""

    shared: int = 0
    """Tokens at the front that every row begins with."""

    def to(self, device: torch.device | str) -> Batch:
        """The same batch with its tensors on `device`."""
        tensors = (self.ids, self.positions, self.predict, self.targets)
        ids, positions, predict, targets = (tensor.to(device, non_blocking=True) for tensor in tensors)
        return replace(self, ids=ids, positions=positions, predict=predict, targets=targets)


def collate(examples: Sequence[Example], indices: Sequence[int], *, share_beginning: bool = False) -> Batch:
    """Lay the examples at `indices` end to end.

    The first token of a row is never a target: nothing in its row predicts it, and the row before must not.

    Args:
        examples: all of them.
        indices: which, in the order in which they lie.
        share_beginning: let what all rows begin with (a system prompt, a template's opening) stand once. Exact: causal
            attention makes its activations the same in every row, and its gradient is the sum over rows.
    """
    chosen = [examples[i] for i in indices]
    assert all(example.ids and not example.trained[0] for example in chosen), "a row is empty or trains its first token"
    shared = _shared_beginning(chosen) if share_beginning and len(chosen) > 1 else 0
    ids = torch.tensor(chosen[0].ids[:shared] + [token for example in chosen for token in example.ids[shared:]])
    untrained = [False] * shared
    trained = torch.tensor(untrained + [flag for example in chosen for flag in example.trained[shared:]])
    lengths = tuple(len(example.ids) - shared for example in chosen)
    positions = torch.cat([torch.arange(shared), *(torch.arange(shared, shared + length) for length in lengths)])
    target_places = trained.nonzero().flatten()
    return Batch(ids, positions, lengths, target_places - 1, ids[target_places], tuple(indices), shared)


def _shared_beginning(examples: Sequence[Example]) -> int:
    """How many first tokens all examples have in common, so that every target and its predictor stay behind them."""
    low, high = min(e.ids for e in examples), max(e.ids for e in examples)  # in lexical order the ends differ most
    common = next((i for i, (a, b) in enumerate(zip(low, high, strict=False)) if a != b), min(len(low), len(high)))
    first_target = min(e.trained.index(True) for e in examples)
    shared = min(common, first_target - 1)
    return shared if shared >= LEAST_SHARED else 0


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
