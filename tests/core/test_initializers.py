"""How A and B begin: the formulas against fp64, and updates that count from where they began."""

import math

import pytest
import torch

from lorakit.core import initializers, lowrank
from lorakit.core.components import PrincipalComponents, shared_ranks
from lorakit.core.deltas import LoRA
from lorakit.core.kernels import lora_linear_reference, lora_linears
from lorakit.core.sites import LINEAR
from lorakit.errors import ConfigError


def drawn(*shape, seed=0, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def generator():
    return torch.Generator().manual_seed(7)


shapes = pytest.mark.parametrize("shape", [(1, 24, 40), (1, 40, 24), (3, 16, 16)], ids=str)


@shapes
def test_olora_is_the_beginning_of_the_whole_qr_decomposition(shape):
    W, r = drawn(*shape), 5
    A, B = initializers.olora(W, r, 0.7, generator())
    Q, R = torch.linalg.qr(W.double())
    assert torch.allclose(B, Q[..., :r], atol=1e-12)
    assert torch.allclose(A, R[..., :r, :], atol=1e-12)


@shapes
@pytest.mark.parametrize("s", [2.0, 0.25])
def test_pissa_is_the_best_approximation_of_its_rank(shape, s):
    W, r = drawn(*shape), 5
    A, B = initializers.pissa(W, r, s, generator())
    U, S, V = torch.linalg.svd(W.double(), full_matrices=False)
    best = U[..., :r] @ torch.diag_embed(S[..., :r]) @ V[..., :r, :]
    assert torch.allclose(s * B @ A, best, atol=1e-9)
    root = (S[..., :r] / s).sqrt()
    assert torch.allclose(A.norm(dim=-1), root, atol=1e-9)  # both sides get the root
    assert torch.allclose(B.norm(dim=-2), root, atol=1e-9)


def test_fast_pissa_comes_close_with_passes_and_follows_its_seed():
    W, r = drawn(1, 300, 200), 4
    exact = torch.linalg.svdvals(W.double())[0, r:].norm()
    errors = []
    for passes in (0, 2, 16):
        A, B = initializers.factorisation(f"pissa_niter_{passes}")(W, r, 0.5, generator())
        again = initializers.factorisation(f"pissa_niter_{passes}")(W, r, 0.5, generator())
        assert torch.equal(A, again[0])
        errors.append(float((W - 0.5 * B @ A).norm() / exact))
    assert errors[0] > errors[1] > errors[2]
    assert errors[2] < 1.001


@shapes
def test_leading_singular_directions_are_those_of_the_whole_decomposition(shape):
    W = drawn(*shape)
    found, whole = lowrank.leading_svd(W, 6), torch.linalg.svd(W.double(), full_matrices=False)
    assert torch.allclose(found.S, whole.S[..., :6], rtol=1e-10)
    for got, expected in ((found.U, whole.U[..., :6]), (found.V.mT, whole.Vh[..., :6, :].mT)):
        assert torch.allclose((got.mT @ expected).abs(), torch.eye(6).double().expand(shape[0], 6, 6), atol=1e-8)


def test_a_weight_of_lower_rank_leaves_directions_that_can_be_trained():
    W = drawn(1, 12, 2, seed=1) @ drawn(1, 2, 9, seed=2)
    A, B = initializers.pissa(W.double(), 4, 1.0, generator())
    assert torch.allclose(B @ A, W.double(), atol=1e-6)
    assert A.norm(dim=-1).min() > 1e-9


def test_a_rank_above_the_dimension_is_refused():
    with pytest.raises(ConfigError, match="a matrix of 4 x 6 has no 5 directions"):
        initializers.from_weight(initializers.olora, drawn(1, 4, 6), (5, 6), (4, 5), 1.0, generator())


def test_lora_ga_takes_the_papers_directions_of_the_gradient():
    G, r, gamma = drawn(1, 18, 14), 3, 16.0
    A, B = initializers.lora_ga(G, r, gamma)
    U, _, V = torch.linalg.svd(G[0].double())
    c = 18**0.25 / math.sqrt(gamma)
    assert torch.allclose((A[0] @ V[:r].T).abs(), c * torch.eye(r).double(), atol=1e-9)
    assert torch.allclose((B[0].T @ U[:, r : 2 * r]).abs(), c * torch.eye(r).double(), atol=1e-9)


def test_loftq_takes_the_best_approximation_of_what_quantising_lost_and_more_rounds_lose_less():
    W, s = drawn(1, 32, 32), 2.0

    def quantised(weight):
        return (weight * 2).round() / 2

    def error(iterations):
        A, B, Q = initializers.loftq(W, 8, s, quantised, iterations)
        return float((W - Q - s * B @ A).norm())

    A, B, Q = initializers.loftq(W, 8, s, quantised)
    assert torch.equal(Q, quantised(W).double())
    lost = (W - Q).double()
    U, S, V = torch.linalg.svd(lost, full_matrices=False)
    assert torch.allclose(s * B @ A, U[..., :8] @ torch.diag_embed(S[..., :8]) @ V[..., :8, :], atol=1e-9)
    assert error(5) < error(1) < float(lost.norm())


# ---------------------------------------------------------------- components of inputs


def test_components_in_batches_are_those_of_all_rows_together():
    rows = drawn(90, 12) * torch.arange(1, 13) + 3.0
    found = PrincipalComponents(12)
    for batch in rows.split([40, 5, 45]):
        found.add(batch)
    centred = rows.double() - rows.double().mean(0)
    _, S, V = torch.linalg.svd(centred, full_matrices=False)
    assert found.rows == 90
    assert torch.allclose(found.strengths, S, rtol=1e-9)
    assert torch.allclose((found.directions @ V.T).abs(), torch.eye(12).double(), atol=1e-6)
    assert torch.allclose(found.shares, S.square() / centred.square().sum(), rtol=1e-9)


def test_components_are_pefts():
    from peft.utils.incremental_pca import IncrementalPCA

    rows = drawn(120, 16) * torch.logspace(0, -2, 16) + drawn(16, seed=3)
    ours, theirs = PrincipalComponents(4), IncrementalPCA(n_components=4)
    for batch in rows.split(40):
        ours.add(batch)
        theirs.partial_fit(batch)
    assert torch.allclose((ours.directions @ theirs.components_.double().T).abs(), torch.eye(4).double(), atol=1e-3)
    assert torch.allclose(ours.strengths, theirs.singular_values_.double(), rtol=1e-4)
    assert torch.allclose(ours.shares, theirs.explained_variance_ratio_.double(), rtol=1e-3)


def test_components_of_large_batches_are_close():
    rows = (drawn(1500, 600) / torch.arange(1, 601)) @ torch.linalg.qr(drawn(600, 600, seed=3)).Q + 0.5
    found = PrincipalComponents(24)
    for batch in rows.split(700):
        found.add(batch)
    centred = rows.double() - rows.double().mean(0)
    V = torch.linalg.svd(centred, full_matrices=False).Vh[:8]
    assert float((found.directions[:8] @ V.T).norm()) > 0.98 * 8**0.5
    best = (centred @ V.T).square().sum()
    assert float((centred @ found.directions[:8].T).square().sum()) > 0.999 * float(best)


def test_ranks_go_to_the_most_telling_directions():
    shares = {"a": torch.tensor([0.5, 0.4, 0.3]), "b": torch.tensor([0.6, 0.1]), "c": torch.tensor([0.05])}
    assert shared_ranks(shares, 4) == {"a": 3, "b": 1, "c": 0}
    assert sum(shared_ranks(shares, 6).values()) == 6


# ---------------------------------------------------------------- an update from its start


def moved(dtype=torch.float64, size=0.1):
    """A layer, and a LoRA whose factors have moved from where they began."""
    layer = torch.nn.Linear(10, 8, dtype=dtype).requires_grad_(False)
    lora = LoRA(drawn(3, 10), drawn(8, 3, seed=1), alpha=6.0, s=2.0, from_start=True).to(dtype)
    with torch.no_grad():
        lora.A += size * drawn(3, 10, seed=2).to(dtype)
        lora.B += size * drawn(8, 3, seed=3).to(dtype)
    return layer, lora


def by_definition(lora):
    return lora.s * (lora.B @ lora.A - lora.B0 @ lora.A0)


def test_the_update_is_what_the_factors_have_moved_and_so_are_gradients():
    layer, lora = moved()
    x = drawn(6, 10, dtype=torch.float64).requires_grad_(True)
    assert [name for name, _ in lora.named_parameters()] == ["A", "B"]
    expected = torch.nn.functional.linear(x, layer.weight + by_definition(lora), layer.bias)
    results = [
        lora_linears(x, [lora.fused(LINEAR, layer, x, 1.0)])[0],
        lora_linear_reference(x, lora.fused(LINEAR, layer, x, 1.0)),
        layer(x) + lora(LINEAR, layer, x, layer(x)),
    ]
    wanted = torch.autograd.grad(expected.sin().sum(), [x, lora.A, lora.B])
    for result in results:
        assert torch.allclose(result, expected, atol=1e-12)
        got = torch.autograd.grad(result.sin().sum(), [x, lora.A, lora.B])
        assert all(torch.allclose(a, b, atol=1e-11) for a, b in zip(got, wanted, strict=True))


@pytest.mark.parametrize("stacked", [False, True])
def test_factors_side_by_side_come_apart_again(stacked):
    if stacked:
        pairs = [(drawn(4, 2, 5, seed=i), drawn(4, 6, 2, seed=i + 9)) for i in (1, 2)]
    else:  # a grouped convolution
        pairs = [(drawn(4, 3, 1, 2, seed=i), drawn(6, 2, 1, 1, seed=i + 9)) for i in (1, 2)]
    joined = lowrank.side_by_side(*pairs[0], *pairs[1], stacked=stacked)
    for pair, half in zip(pairs, lowrank.halves(*joined, stacked=stacked), strict=True):
        assert all(torch.equal(a, b) for a, b in zip(pair, half, strict=True))
    dense = lowrank.matrix_delta if stacked else lowrank.convolution_delta
    assert torch.allclose(dense(*joined, 0.5), dense(*pairs[0], 0.5) + dense(*pairs[1], 0.5), atol=1e-6)


def test_a_small_update_has_the_accuracy_of_its_size_in_bf16():
    """B A - B0 A0 computed as it stands would be rounding alone."""
    layer, lora = moved(torch.float32, size=1e-3)
    x = drawn(50, 10, dtype=torch.bfloat16)
    layer = layer.to(torch.bfloat16)
    exact = x.double() @ by_definition(lora.double()).T
    lora = lora.float()
    got = lora(LINEAR, layer, x, layer(x)).double()
    assert (got - exact).norm() < 1e-2 * exact.norm()
    naive = ((x @ lora.A.bfloat16().T) @ lora.B.bfloat16().T - (x @ lora.A0.bfloat16().T) @ lora.B0.bfloat16().T) * 2
    assert (naive.double() - exact).norm() > 0.3 * exact.norm()


def test_before_the_first_step_the_update_is_zero_to_the_bit():
    layer = torch.nn.Linear(10, 8, dtype=torch.bfloat16).requires_grad_(False)
    lora = LoRA(drawn(3, 10), drawn(8, 3, seed=1), alpha=6.0, s=2.0, from_start=True)
    x = drawn(50, 10, dtype=torch.bfloat16)
    assert torch.equal(lora_linears(x, [lora.fused(LINEAR, layer, x, 1.0)])[0], layer(x))


@pytest.mark.parametrize("frozen", [True, False])
def test_where_no_A_is_trained_the_input_is_not_kept(frozen):
    layer = torch.nn.Linear(10, 8).double().requires_grad_(False)
    lora = LoRA(drawn(3, 10), drawn(8, 3, seed=1), alpha=6.0, s=2.0).double()
    lora.A.requires_grad_(not frozen)
    x = drawn(50, 10).double().requires_grad_(True)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.shape) or t, lambda t: t):
        y = lora_linears(x, [lora.fused(LINEAR, layer, x, 1.0)])[0]
    assert (x.shape in kept) is not frozen
    wanted = [x, lora.B] if frozen else [x, lora.A, lora.B]
    got = torch.autograd.grad(y.sin().sum(), wanted)
    reference = lora_linear_reference(x, lora.fused(LINEAR, layer, x, 1.0))
    for a, b in zip(got, torch.autograd.grad(reference.sin().sum(), wanted), strict=True):
        assert torch.allclose(a, b)
