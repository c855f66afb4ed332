"""Is the merged model the adapter? Logits of both on real prompts, against what the same model differs from itself.

The floor: the adapted model computes every row alone, and again with the rows side by side in one padded batch. That
changes nothing but the order of additions, so a merge that differs no more than that is as exact as its dtype.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch

from lorakit.generation import generate

MAX_KL = 1e-2
"""Largest mean divergence, nats a token, that a merge may show unless a caller says otherwise."""

LOST = 0.1
"""Share of what the adapter does (its divergence from the base) that a merge may be off by."""

PROMPTS = (
    "What is the capital of France?",
    "Write one sentence about the sea.",
    "Translate to Spanish: The weather is nice today.",
    "List three things to pack for a winter hike.",
    "A train leaves at 14:10 and arrives at 16:45. How long does it travel?",
    "Summarise: The meeting moved from Monday to Thursday because two people were ill.",
    'Return JSON with the keys "name" and "age" for: Ana is 31 years old.',
    "Correct the spelling: I recieved teh pakage yesterday.",
)
_ANSWER_TOKENS = 24
_POSITIONS = 512  # logits of so many tokens are held at once: (512, V) fp32 is 100 MB at V = 49k


@dataclass(frozen=True)
class Limit:
    """What a merged model may be off by.

    Attributes:
        kl: mean divergence, nats a token.
        share: of the base's own distance, where that is less: an adapter that changes little is lost in what would be a
            small divergence for another.
    """

    kl: float
    share: float


@dataclass(frozen=True, kw_only=True)
class Difference:
    """How far one model's logits are from another's, over all positions compared.

    Attributes:
        max_logit: largest absolute difference of a logit.
        mean_logit: mean absolute difference.
        mean_kl: mean over positions of KL(reference || other), in nats.
        max_kl: the largest of them.
        same_top: share of positions with the same likeliest token.
    """

    max_logit: float
    mean_logit: float
    mean_kl: float
    max_kl: float
    same_top: float


@dataclass(frozen=True, kw_only=True)
class Proof:
    """Outcome of a comparison.

    Attributes:
        merged: the merged model against base + adapter.
        floor: base + adapter against itself, rows computed side by side: what the dtype alone does.
        base: the base without adapter against base + adapter: how much there is to lose.
        rows: rows compared.
        positions: tokens compared.
        dtype: both models' dtype.
        limit: largest mean divergence that passes: the one asked for, or a share of what the adapter does (the base's
        distance) if that is less; but ten times the floor passes always.
    """

    merged: Difference
    floor: Difference
    base: Difference
    rows: int
    positions: int
    dtype: str
    limit: float

    @property
    def passed(self) -> bool:
        """Whether the merged model may stand for the adapter."""
        return self.merged.mean_kl <= self.limit  # false for nan

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {**asdict(self), "passed": self.passed}


@dataclass(frozen=True)
class Reference:
    """What the adapted model says of the rows, kept while the merged one is loaded.

    Attributes:
        rows: token ids.
        logits: (positions, V) fp32.
        floor: see `Proof`.
        base: see `Proof`.
    """

    rows: list[list[int]]
    logits: torch.Tensor
    floor: Difference
    base: Difference


def answered(model: Any, tokenizer: Any, prompts: Sequence[Sequence[int]], stop_ids: frozenset[int]) -> list[list[int]]:
    """Each prompt with the beginning of the model's own answer: text on which the adapter acts."""
    completions = generate(model, tokenizer, prompts, max_new_tokens=_ANSWER_TOKENS, stop_ids=stop_ids)
    return [[*prompt, *completion.ids] for prompt, completion in zip(prompts, completions, strict=True)]


def within_budget(rows: Sequence[Sequence[int]]) -> list[list[int]]:
    """The first rows, as many as fit the positions that are compared; a longer one is cut."""
    kept: list[list[int]] = []
    left = _POSITIONS
    for row in rows:
        if left <= 0:
            break
        kept.append(list(row[:left]))
        left -= len(kept[-1])
    return kept


@torch.inference_mode()
def refer(model: Any, handle: Any, rows: list[list[int]]) -> Reference:
    """Logits of the adapted model, its floor, and the base's distance."""
    alone = _logits(model, rows, together=False)
    floor = difference(alone, _logits(model, rows, together=True))
    with handle.disabled():
        base = difference(alone, _logits(model, rows, together=False))
    return Reference(rows, alone, floor, base)


@torch.inference_mode()
def compare(reference: Reference, merged: Any, limit: Limit) -> Proof:
    """Hold the merged model's logits against the reference."""
    return Proof(
        merged=difference(reference.logits, _logits(merged, reference.rows, together=False)),
        floor=reference.floor,
        base=reference.base,
        rows=len(reference.rows),
        positions=len(reference.logits),
        dtype=str(merged.dtype).removeprefix("torch."),
        limit=max(min(limit.kl, limit.share * reference.base.mean_kl), 10 * reference.floor.mean_kl),
    )


def difference(reference: torch.Tensor, other: torch.Tensor) -> Difference:
    """Compare logits (positions, V), fp32."""
    largest, total, kls = 0.0, 0.0, []
    for start in range(0, len(reference), 64):  # fp64 of a few positions at a time
        r, o = (logits[start : start + 64].double() for logits in (reference, other))
        largest, total = max(largest, float((r - o).abs().max())), total + float((r - o).abs().sum())
        log_r, log_o = r.log_softmax(-1), o.log_softmax(-1)
        kls.append((log_r.exp() * (log_r - log_o)).sum(-1))
    kl = torch.cat(kls)
    return Difference(
        max_logit=largest,
        mean_logit=total / reference.numel(),
        mean_kl=float(kl.mean().clamp(min=0)),  # rounding can make a divergence of nothing negative; nan stays nan
        max_kl=float(kl.max()),
        same_top=float((reference.argmax(-1) == other.argmax(-1)).double().mean()),
    )


def _logits(model: Any, rows: Sequence[Sequence[int]], *, together: bool) -> torch.Tensor:
    """(all positions, V) in fp32 on the CPU: rows one by one, or side by side with padding after them."""
    device = next(model.parameters()).device
    if not together:
        parts = [model(input_ids=torch.tensor([row], device=device)).logits[0].float().cpu() for row in rows]
        return torch.cat(parts)
    longest = max(map(len, rows))
    ids = torch.zeros(len(rows), longest, dtype=torch.long)
    mask = torch.zeros_like(ids)
    for i, row in enumerate(rows):
        ids[i, : len(row)], mask[i, : len(row)] = torch.tensor(row), 1
    logits = model(input_ids=ids.to(device), attention_mask=mask.to(device)).logits
    return torch.cat([logits[i, : len(row)].float().cpu() for i, row in enumerate(rows)])
