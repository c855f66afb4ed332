"""Products in integers: exact in their sums, within the bounds of their rounding, whatever is large in the input."""

import math

import pytest
import torch

from lorakit.core import int8
from lorakit.core.int8 import Int8Weight, product, product_reference, rotated, rounded


def random(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def with_outliers(*shape, seed=0):
    """As inputs of a transformer's layers are: a few features far larger than the rest, in every token."""
    x = random(*shape, seed=seed)
    x[:, :: max(1, shape[1] // 3)] *= 60
    return x


def relative(found, expected):
    return float((found.double() - expected.double()).norm() / expected.double().norm())


SHAPES = [(5, 64, 48), (1, 96, 7), (20, 33, 5), (3, 1, 1), (300, 1000, 12)]  # tokens, in, out


@pytest.mark.parametrize(("n", "k", "m"), SHAPES)
def test_a_product_is_that_of_what_its_sides_stand_for(n, k, m):
    x, W = rounded(random(n, k)), rounded(random(m, k, seed=1))
    for right in (W.values.T, W.values.T.contiguous()):
        torch.testing.assert_close(product(x, right), product_reference(x, right), rtol=1e-12, atol=1e-12)


def test_sums_are_exact_up_to_the_longest():
    assert int8.is_exact(torch.device("cpu")), "train refuses int8 here, and so would this test"
    assert int8.LONGEST_SUM * 127**2 < 2**31 <= (int8.LONGEST_SUM + 1) * 127**2
    largest = torch.full((2, int8.LONGEST_SUM), 127, dtype=torch.int8)
    assert torch._int_mm(largest, -largest.T).eq(-int8.LONGEST_SUM * 127**2).all()


@pytest.mark.parametrize("k", [1, 7, 12, 32, 96, 100])
def test_rotation_undoes_itself_and_keeps_products(k):
    x, y = random(5, k), random(4, k, seed=1)
    torch.testing.assert_close(rotated(rotated(x)), x)
    torch.testing.assert_close(rotated(x) @ rotated(y).T, x @ y.T)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("make", [random, with_outliers])
def test_every_number_is_within_half_a_level(make, dtype):
    x = make(700, 400).to(dtype)  # several times what is rounded at once
    found = rounded(x)
    assert found.scales.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert found.values.abs().amax(1).eq(127).all()
    off = (found.dense() - rotated(x)).abs()
    assert (off <= found.scales * (0.5 + 1e-4)).all()


@pytest.mark.parametrize("make", [random, with_outliers])
@pytest.mark.parametrize(("n", "k", "m"), SHAPES)
def test_products_are_within_the_bounds_of_rounding(make, n, k, m):
    """|x W - x' W'| <= |dx| |W| + |x'| |dW|, where dx and dW are half a level at most."""
    x, W = make(n, k), random(m, k, seed=1)
    copy = Int8Weight(W)
    near, turned = rounded(x), rotated(W)
    half_x, half_W = (0.5 + 1e-9) * near.scales, (0.5 + 1e-9) * copy.rounded.scales
    bound = half_x * turned.abs().sum(1) + near.dense().abs().sum(1, keepdim=True) * half_W.T
    assert ((copy.forwards(near) - x @ W.T).abs() <= bound + 1e-12).all()

    g = make(n, m, seed=2)
    scaled = g * copy.rounded.scales.T
    off = 0.5 * scaled.abs().amax(1, keepdim=True) / 127  # of a scaled gradient
    bound = off * copy.rounded.values.double().abs().sum(0) + (0.5 + 1e-9) * scaled.abs().sum(1, keepdim=True)
    assert ((copy.backwards(g) - g @ turned).abs() <= 1.01 * bound + 1e-12).all()
    torch.testing.assert_close(g @ rotated(copy.dense()), g @ copy.rounded.dense())


def test_errors_are_about_one_percent_whatever_is_large():
    W = random(96, 192, seed=1)
    copy = Int8Weight(W)
    for make in (random, with_outliers):
        x, g = make(64, 192), make(64, 96, seed=2)
        assert relative(copy.forwards(rounded(x)), x @ W.T) < 0.02
        assert relative(rotated(copy.backwards(g)), g @ W) < 0.03
    x[:, 3] *= 50
    unturned = product(rounded(x, lambda rows: rows), rounded(W, lambda rows: rows).values.T)
    plain = unturned * rounded(W, lambda rows: rows).scales.T
    assert relative(plain, x @ W.T) > 1.5 * relative(copy.forwards(rounded(x)), x @ W.T)


def test_a_row_of_zeros_is_zeros():
    x = random(3, 32)
    x[1] = 0
    y = Int8Weight(random(4, 32, seed=1)).forwards(rounded(x))
    assert y[1].eq(0).all()
    assert y.isfinite().all()
    assert Int8Weight(torch.zeros(4, 32)).forwards(rounded(x.float())).eq(0).all()


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_stays_so(bad):
    """Training must see it: the loss is checked, the integers cannot be."""
    x = random(3, 32, dtype=torch.float32)
    x[1, 5] = bad
    copy = Int8Weight(random(32, 32, seed=1, dtype=torch.float32))
    for y in (copy.forwards(rounded(x)), rotated(copy.backwards(x))):
        assert not y[1].isfinite().any()
        assert y[[0, 2]].isfinite().all()


def test_no_tokens_are_no_outputs():
    assert Int8Weight(random(4, 32)).forwards(rounded(random(0, 32))).shape == (0, 4)


def test_its_memory_is_told_beforehand():
    copy = Int8Weight(random(40, 64, dtype=torch.float32))
    taken = sum(tensor.numel() * tensor.element_size() for tensor in copy.rounded)
    assert int8.nbytes(40, 64) == taken
