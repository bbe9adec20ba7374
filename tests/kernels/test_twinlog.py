"""Twin-log quantization against its equations written out in numpy, row by row."""

import math

import numpy as np
import pytest
import torch

from modelgrove_kernels.layouts import Layout, decode
from modelgrove_kernels.twinlog import PERCENTILES, SHIFTS, twin_log_parts, uniform_error


def draw(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def restored(weight, bits):
    parts = twin_log_parts(weight, bits)
    return decode(Layout("lut", weight.shape[1], bits, weight.shape[1]), parts)


def published(row, bits):
    """All η and pairs of percentiles, one after the other, logarithms rounded as the paper does."""
    scale, half = np.abs(row).max(), 2 ** (bits - 1)
    row = row / scale
    least, best = np.inf, None
    for shift in SHIFTS:
        for ups in PERCENTILES:
            for downs in PERCENTILES:
                found = np.zeros_like(row)
                for sign, share in ((1, ups), (-1, downs)):
                    mask = sign * row > 0
                    sizes = np.sort(np.abs(row[mask]))
                    top = sizes[round(share * (len(sizes) - 1))]
                    low, high = np.log2(sizes[0] + shift), np.log2(top + shift)
                    step = (high - low) / (half - 1)
                    zero = np.round(low / step)
                    codes = np.clip(np.round(np.log2(np.abs(row[mask]) + shift) / step) - zero, 0, half - 1)
                    found[mask] = sign * (2 ** ((codes + zero) * step) - shift)
                error = np.square(found - row).sum()
                if error < least:
                    least, best = error, found
    return best * scale


@pytest.mark.parametrize("bits", [3, 4])
def test_no_row_is_worse_than_the_published_search_and_none_much_better(bits):
    weight = draw(6, 200)
    found = restored(weight, bits)
    for row, mine in zip(weight.double().numpy(), found.double().numpy(), strict=True):
        wanted = np.square(published(row, bits) - row).sum()
        error = np.square(mine - row).sum()
        # Nearest levels instead of rounded logarithms gain a little; float16 levels may cost a thousandth.
        assert 0.8 * wanted < error < 1.002 * wanted


def test_it_loses_less_than_equal_steps_on_rows_with_long_tails():
    """Student's t with three degrees of freedom: the paper's weights have such tails; normal rows gain half as much."""
    tails = draw(32, 1000) / draw(3, 32, 1000, seed=1).square().mean(0).sqrt()
    ratios = []
    for bits in (3, 4):
        error = float((restored(tails, bits) - tails).norm() / tails.norm())
        ratios.append((uniform_error(tails, bits) / error) ** 2)
    assert min(ratios) > 3, ratios


def test_equal_steps_are_those_of_the_rows_range():
    weight = torch.tensor([[-1.0, 0.0, 0.6, 2.0], [1.0, 2.0, 3.0, 7.0]])
    # Steps of 3/7 and 1: -1 → -6/7, 0.6 → 3/7 and 2 → 15/7 are off, and nothing in the second row is.
    lost = np.sqrt((1 / 7) ** 2 + (0.6 - 3 / 7) ** 2 + (1 / 7) ** 2)
    assert uniform_error(weight, 3) == pytest.approx(lost / float(weight.norm()), rel=1e-4)


@pytest.mark.parametrize("scale", [1e-30, 1e-5, 1.0, 1e5, 1e30])
def test_the_size_of_a_row_does_not_matter(scale):
    weight = draw(4, 96)
    torch.testing.assert_close(restored(weight * scale, 4) / scale, restored(weight, 4), rtol=2e-3, atol=2e-3)


def test_rows_of_few_values_are_kept():
    """Zeros are as near to zero as the lowest level of their side, whose logarithm is that of η."""
    weight = torch.stack([torch.zeros(24), torch.full((24,), 0.5), torch.full((24,), -3.0), torch.arange(24) % 2 - 0.5])
    torch.testing.assert_close(restored(weight, 3)[1:], weight[1:], rtol=1e-3, atol=1e-3)
    assert bool(torch.isfinite(restored(weight, 3)).all())
    sparse = torch.zeros(1, 64)
    sparse[0, ::9] = draw(8)
    assert float(restored(sparse, 4)[sparse == 0].abs().max()) < 0.1 * float(sparse.abs().max())


def test_one_column_is_a_matrix():
    weight = draw(5, 1)
    torch.testing.assert_close(restored(weight, 3), weight, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_values_that_are_not_finite_are_refused(value):
    weight = draw(4, 8)
    weight[2, 3] = value
    with pytest.raises(ValueError, match="NaN"):
        twin_log_parts(weight, 3)
