"""Rows laid end to end without padding, and the plan of which go together. Knows token ids and masks, no text."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from lorakit.data.chat import Example


@dataclass(frozen=True)
class Batch:
    """A micro-batch: rows end to end in one sequence of T tokens, L of which are targets. All tensors int64."""

    ids: torch.Tensor
    """(T,) token ids."""

    positions: torch.Tensor
    """(T,) 0, 1, 2, ... from the start of each row."""

    lengths: tuple[int, ...]
    """Tokens of each row; they sum to T."""

    predict: torch.Tensor
    """(L,) rising places in [0, T) whose logits predict a target."""

    targets: torch.Tensor
    """(L,) `ids[predict + 1]`: the trained tokens."""

    rows: tuple[int, ...]
    """Index of each row among the examples."""

    def to(self, device: torch.device | str) -> Batch:
        """The same batch with its tensors on `device`."""
        tensors = (self.ids, self.positions, self.predict, self.targets)
        ids, positions, predict, targets = (tensor.to(device, non_blocking=True) for tensor in tensors)
        return Batch(ids, positions, self.lengths, predict, targets, self.rows)


def collate(examples: Sequence[Example], indices: Sequence[int]) -> Batch:
    """Lay the examples at `indices` end to end.

    The first token of a row is never a target: nothing in its row predicts it, and the row before must not.
    """
    chosen = [examples[i] for i in indices]
    assert all(example.ids and not example.trained[0] for example in chosen), "a row is empty or trains its first token"
    ids = torch.tensor([token for example in chosen for token in example.ids])
    trained = torch.tensor([flag for example in chosen for flag in example.trained])
    lengths = tuple(len(example.ids) for example in chosen)
    positions = torch.cat([torch.arange(length) for length in lengths])
    target_places = trained.nonzero().flatten()
    return Batch(ids, positions, lengths, target_places - 1, ids[target_places], tuple(indices))


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
