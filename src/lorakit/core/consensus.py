"""How several dense updates of one layer become one: first each is thinned out, then they are added or put to a vote.

Every published method is a pair of the two. They mean something only on the dense update: B A = (B G)(G^-1 A) for any
invertible G, so what is small in B or in A says nothing about the update. Knows no adapters and no ranks.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch

Thinning = Callable[[torch.Tensor, float, float, torch.Generator], torch.Tensor]


def keep_largest(delta: torch.Tensor, density: float, epsilon: float, generator: torch.Generator) -> torch.Tensor:
    """Zero all but the `density` largest in magnitude (the "trim" of TIES, arXiv 2306.01708); what equals the smallest
    that stays, stays too. Draws nothing.
    """
    count = int(density * delta.numel())
    if count == 0:
        return torch.zeros_like(delta)
    magnitude = delta.abs()
    smallest_kept = magnitude.flatten().kthvalue(delta.numel() - count + 1).values
    return torch.where(magnitude >= smallest_kept, delta, 0.0)


def keep_random(delta: torch.Tensor, density: float, epsilon: float, generator: torch.Generator) -> torch.Tensor:
    """Keep each element with probability `density`, divided by it, so that the mean stays (DARE, arXiv 2311.03099)."""
    kept = torch.rand(delta.shape, generator=generator).to(delta.device) < density
    return torch.where(kept, delta / density, 0.0)


def keep_by_rank(delta: torch.Tensor, density: float, epsilon: float, generator: torch.Generator) -> torch.Tensor:
    """MAGPRUNE (DELLA, arXiv 2406.11617): keep an element with a probability that grows with the place of its magnitude
    in its row, linearly from density - epsilon / 2 to density + epsilon / 2, and divide by that probability.

    Args:
        delta: (..., rows, columns); a row is one output.
        density: mean probability.
        epsilon: how far apart the probabilities of smallest and largest are.
        generator: of the draws.
    """
    columns = delta.shape[-1]
    share = (
        torch.linspace(-0.5, 0.5, columns, dtype=delta.dtype, device=delta.device)
        if columns > 1
        else delta.new_zeros(1)
    )
    order = delta.abs().argsort(dim=-1)
    probability = density + epsilon * torch.zeros_like(delta).scatter_(-1, order, share.expand_as(delta))
    kept = torch.rand(delta.shape, generator=generator).to(delta.device) < probability
    return torch.where(kept, delta / probability, 0.0)


def keep_all(delta: torch.Tensor, density: float, epsilon: float, generator: torch.Generator) -> torch.Tensor:
    """The update as it is."""
    return delta


def added(contributions: torch.Tensor) -> torch.Tensor:
    """The sum over the first dimension."""
    return contributions.sum(0)


def elected(contributions: torch.Tensor) -> torch.Tensor:
    """Each place has the sign of its sum, and the mean of those contributions that are of this sign ("elect" and
    "disjoint merge" of TIES, arXiv 2306.01708). Zeros do not vote.
    """
    positive = contributions.sum(0) >= 0
    agree = torch.where(positive, contributions > 0, contributions < 0)
    return (contributions * agree).sum(0) / agree.sum(0).clamp(min=1)


class Recipe(NamedTuple):
    """A method: how each update is thinned out, and how they become one."""

    thin: Thinning
    fuse: Callable[[torch.Tensor], torch.Tensor]


RECIPES: dict[str, Recipe] = {
    "linear": Recipe(keep_all, added),
    "magnitude_prune": Recipe(keep_largest, added),
    "ties": Recipe(keep_largest, elected),
    "dare_linear": Recipe(keep_random, added),
    "dare_ties": Recipe(keep_random, elected),
    "della": Recipe(keep_by_rank, elected),
    "della_linear": Recipe(keep_by_rank, added),
}


def fused(
    recipe: Recipe,
    deltas: list[torch.Tensor],
    weights: list[float],
    *,
    density: float,
    epsilon: float,
    generators: list[torch.Generator],
) -> torch.Tensor:
    """What a recipe makes of the updates of one layer. A weight counts before the vote: an update subtracted votes for
    the other sign.

    Args:
        recipe: of `RECIPES`.
        deltas: of equal shape.
        weights: one each.
        density: share of elements that stay.
        epsilon: for `keep_by_rank`.
        generators: one each.
    """
    thinned = [
        weight * recipe.thin(delta, density, epsilon, generator)
        for delta, weight, generator in zip(deltas, weights, generators, strict=True)
    ]
    return recipe.fuse(torch.stack(thinned))
