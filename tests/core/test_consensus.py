"""Thinning and voting, against PEFT's functions on the same dense tensors and against fp64 loops."""

import pytest
import torch
from peft.utils import merge_utils

from lorakit.core import consensus

DELTAS = [torch.randn(6, 40, generator=torch.Generator().manual_seed(seed)) for seed in range(3)]


def fuse(name, deltas, weights, density=0.5, epsilon=0.1, seed=0):
    generators = [torch.Generator().manual_seed(seed + i) for i in range(len(deltas))]
    return consensus.fused(
        consensus.RECIPES[name], deltas, weights, density=density, epsilon=epsilon, generators=generators
    )


@pytest.mark.parametrize("weights", [[1.0, 1.0, 1.0], [0.4, 0.4, 0.4]])
@pytest.mark.parametrize("density", [0.2, 0.5, 0.9])
def test_ties_and_magnitude_pruning_are_those_of_peft(weights, density):
    expected = merge_utils.ties(DELTAS, torch.tensor(weights), density)
    torch.testing.assert_close(fuse("ties", DELTAS, weights, density), expected)
    expected = merge_utils.magnitude_prune(DELTAS, torch.tensor(weights), density)
    torch.testing.assert_close(fuse("magnitude_prune", DELTAS, weights, density), expected)


def test_ties_by_hand():
    deltas = [torch.tensor([[4.0, -1.0, 0.1, 2.0]]), torch.tensor([[-1.0, -3.0, 0.2, 2.0]])]
    kept = fuse("ties", deltas, [1.0, 1.0], density=0.75)
    torch.testing.assert_close(kept, torch.tensor([[4.0, -2.0, 0.0, 2.0]]))
    # an adapter taken away votes against itself: PEFT lets it vote for itself and then takes away what it won
    torch.testing.assert_close(fuse("ties", deltas, [1.0, -1.0], density=0.75), torch.tensor([[2.5, 3.0, 0.0, 2.0]]))


@pytest.mark.parametrize("name", ["dare_linear", "della_linear"])
def test_random_thinning_keeps_the_mean(name):
    delta = DELTAS[0]
    draws = torch.stack([fuse(name, [delta], [1.0], 0.4, 0.2, seed) for seed in range(3000)])
    torch.testing.assert_close(draws.mean(0), delta, rtol=0, atol=0.25)
    assert float((draws != 0).float().mean()) == pytest.approx(0.4, abs=0.01)


def test_magprune_keeps_what_is_large_more_often():
    delta = torch.arange(1.0, 41.0).repeat(6, 1)
    kept = torch.stack([fuse("della_linear", [delta], [1.0], 0.5, 0.6, seed) != 0 for seed in range(2000)])
    often = kept.float().mean((0, 1))
    torch.testing.assert_close(often, torch.linspace(0.2, 0.8, 40), rtol=0, atol=0.03)


def test_dare_scales_what_it_keeps():
    thinned = fuse("dare_linear", [DELTAS[0]], [1.0], density=0.25)
    kept = thinned != 0
    torch.testing.assert_close(thinned[kept], DELTAS[0][kept] * 4)


@pytest.mark.parametrize("name", consensus.RECIPES)
def test_the_same_seeds_give_the_same_bits_and_full_density_drops_nothing(name):
    weights = [0.5, -1.0, 2.0]
    assert torch.equal(fuse(name, DELTAS, weights), fuse(name, DELTAS, weights))
    whole = fuse(name, DELTAS, weights, density=1.0, epsilon=0.0)
    parts = torch.stack([weight * delta.double() for weight, delta in zip(weights, DELTAS, strict=True)])
    if consensus.RECIPES[name].fuse is consensus.added:
        expected = parts.sum(0)
    else:
        agree = parts.sign() == parts.sum(0).sign()
        expected = (parts * agree).sum(0) / agree.sum(0)
    torch.testing.assert_close(whole.double(), expected, rtol=1e-5, atol=1e-6)


def test_equal_magnitudes_are_not_all_dropped():
    assert torch.equal(consensus.keep_largest(torch.ones(2, 4), 0.5, 0.0, torch.Generator()), torch.ones(2, 4))
    assert not consensus.keep_largest(torch.ones(2, 4), 0.01, 0.0, torch.Generator()).any()
