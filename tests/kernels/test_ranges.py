"""Ranges of activations against searches of their own."""

import numpy as np
import pytest
import torch

from modelgrove_kernels.calibration import LayerInputs
from modelgrove_kernels.ranges import alike, best_range, channel_extremes, group_extremes, spreads


def rounded(values, bits, low, high):
    step = (high - low) / (2**bits - 1)
    zero = np.round(-low / step)
    return (np.clip(np.round(values / step) + zero, 0, 2**bits - 1) - zero) * step


def error(values, bits, low, high):
    return (np.abs(rounded(values, bits, low, high) - values) ** 2.4).sum()


@pytest.mark.parametrize("bits", [4, 6])
def test_a_range_is_as_good_as_the_best_of_all_pairs(bits):
    values = torch.nn.functional.silu(3 * torch.randn(4000, generator=torch.Generator().manual_seed(0)))
    values[0] = 40.0
    low, high = best_range(values, bits)
    exact = values.double().numpy()
    least = min(error(exact, bits, a, b) for a in np.linspace(-0.28, -0.02, 27) for b in np.linspace(4, 40, 73))
    # Each end is searched with the other fixed, so it need not be the very best pair.
    assert error(exact, bits, low, high) < 1.1 * least
    assert error(exact, bits, low, high) < error(exact, bits, float(values.min()), 40.0)


def test_ranges_include_zero_and_nothing_has_an_empty_one():
    low, high = best_range(torch.tensor([2.0, 3.0]), 8)
    assert low == 0
    assert high >= 3 * 0.9
    assert best_range(torch.zeros(5), 8) == (0, 0)
    assert best_range(torch.zeros(0), 8) == (0, 0)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_what_is_not_finite_has_no_range(bad):
    with pytest.raises(ValueError, match="NaN or infinite"):
        best_range(torch.tensor([1.0, bad]), 8)


def test_channels_reach_as_far_as_any_input_did():
    inputs = LayerInputs.none(4)  # two channels at two kernel positions
    inputs.add(torch.tensor([[1.0, -2, 0.5, 1]] * 3))
    inputs.absmax = torch.tensor([2.0, 2, 3, 8])
    assert channel_extremes(inputs, 2).tolist() == [[1.5, 3.0], [-8.0, 4.0]]


def test_like_ranges_are_grouped_and_groups_have_the_ranges_of_all():
    middles = torch.tensor([1.0, 10, 100]).repeat_interleave(20)
    noise = torch.rand(60, 2, generator=torch.Generator().manual_seed(0)) / 10
    extremes = torch.stack([-middles, middles], 1) * (1 + noise)
    groups = alike(extremes, 3)
    assert [len(set(groups[i : i + 20].tolist())) for i in (0, 20, 40)] == [1, 1, 1]
    assert sorted(groups.unique().tolist()) == [0, 1, 2]
    ranges = group_extremes(extremes, groups)
    for group in range(3):
        own = extremes[groups == group]
        assert ranges[group].tolist() == [float(own[:, 0].min()), float(own[:, 1].max())]


def test_there_are_no_more_groups_than_different_ranges():
    assert alike(torch.tensor([[-1.0, 1], [-1, 1], [-1, 1]]), 3).tolist() == [0, 0, 0]


def test_spreads_are_those_of_root_mean_squares():
    sample = torch.tensor([[1.0, 2, 1, 2], [3, 2, 3, 2]])  # two pixels; two channels at two kernel positions
    by_channel, by_pixel = spreads(sample, 2)
    assert by_channel == pytest.approx(5**0.5 - 2)
    assert by_pixel == pytest.approx(6.5**0.5 - 2.5**0.5)
