"""Floating-point grids against torch's own FP8 numbers and brute force over all values."""

import math

import pytest
import torch

from modelgrove_kernels.floating import SPLITS, FloatGrid, grid, largest, round_floating, round_to_float
from modelgrove_kernels.layouts import Layout, decode

FORMS = [(bits, exponent) for bits, splits in SPLITS.items() for exponent in splits]


def draw(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def restored(found, parts=None):
    layout = Layout("lut", found.columns, found.bits, found.width)
    return decode(layout, found.parts() if parts is None else parts)


@pytest.mark.parametrize(("exponent", "dtype"), [(4, torch.float8_e4m3fnuz), (5, torch.float8_e5m2fnuz)])
def test_the_codes_are_the_bits_of_eight_bit_floats(exponent, dtype):
    """Those of the same bias; their code for minus zero is NaN, ours is zero."""
    wanted = torch.arange(256, dtype=torch.uint8).view(dtype).float()
    found = grid(8, exponent)
    assert wanted.isnan().nonzero().flatten().tolist() == [128]
    assert torch.equal(found[:128], wanted[:128])
    assert torch.equal(found[129:], wanted[129:])
    assert found[128] == 0


@pytest.mark.parametrize(("bits", "exponent"), FORMS)
def test_float16_holds_every_grid(bits, exponent):
    values = grid(bits, exponent)
    assert torch.equal(values.half().float(), values)
    assert float(values.max()) == largest(bits, exponent) == values[len(values) // 2 - 1]


@pytest.mark.parametrize(("bits", "exponent"), FORMS)
def test_rounding_finds_the_nearest_value(bits, exponent):
    values = torch.cat([draw(2000) * largest(bits, exponent) / 3, draw(500) * 1e-3, torch.zeros(1)])
    found, levels = round_to_float(values, bits, exponent), grid(bits, exponent)
    nearest = (values.unsqueeze(1) - levels).abs().amin(1)
    assert torch.equal((values - found).abs(), nearest)
    assert bool(torch.isin(found, levels).all())


def test_each_row_has_its_largest_value_on_the_grid():
    values = draw(4, 9)
    values[2] = 0
    found = round_floating(values, 8, 4, [-1])
    torch.testing.assert_close(found.abs().amax(1), values.abs().amax(1))
    assert torch.equal(found[2], values[2])
    # Half a step of three bits of mantissa; subnormals are below 2^-7 of 240.
    error = (found - values).abs()
    assert bool((error <= (values.abs() / 16).clamp_min(values.abs().amax(1, keepdim=True) * 2**-18)).all())


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("width", [7, 40])
def test_the_search_is_not_beaten_by_any_single_scale(bits, width):
    weight = draw(3, 40)
    found = FloatGrid(weight, bits, width)
    error = float((restored(found) - weight).square().sum())
    for exponent in SPLITS[bits]:
        scale = weight.abs().amax(1, keepdim=True) / largest(bits, exponent)
        plain = round_to_float(weight / scale, bits, exponent) * scale
        # The found scales are float16.
        assert error <= 1.01 * float((plain - weight).square().sum())


def test_codes_give_the_nearest_values_and_neighbours_enclose_the_weights():
    weight = draw(5, 48)
    found = FloatGrid(weight, 4, 16)
    levels = grid(4, found.exponent) * found.scales.float().repeat_interleave(16, 1).unsqueeze(-1)
    back = restored(found)
    torch.testing.assert_close((back - weight).abs(), (levels - weight.unsqueeze(-1)).abs().amin(-1), rtol=0, atol=1e-6)
    lower, upper = found.neighbours()
    assert bool((lower < upper).all())
    inside = weight.abs() <= levels.amax(-1)
    assert bool(((lower <= weight) & (weight <= upper))[inside].all())
    assert bool(((back == lower) | (back == upper)).all())
    assert torch.equal(restored(found, found.parts(upper)), upper)
    assert torch.equal(restored(found, found.parts(lower)), lower)


def test_wide_ranges_take_more_exponent():
    even = torch.rand(8, 256, generator=torch.Generator().manual_seed(0)) * 2 - 1
    assert FloatGrid(even, 4, 256).name == "e1m2"
    assert FloatGrid(draw(8, 256).pow(5), 4, 256).name == "e3m0"


@pytest.mark.parametrize("scale", [1e-30, 1e-6, 1e6, 1e30])
def test_the_size_of_weights_does_not_matter(scale):
    weight = draw(4, 64)
    plain, scaled = (restored(FloatGrid(weight * factor, 8, 64)) for factor in (1.0, scale))
    torch.testing.assert_close(scaled / scale, plain, rtol=0.05, atol=0.01)


def test_rows_of_zeros_and_of_one_value_are_kept():
    weight = torch.stack([torch.zeros(12), torch.full((12,), -0.75), torch.full((12,), 3.0)])
    # Scales are float16.
    torch.testing.assert_close(restored(FloatGrid(weight, 4, 12)), weight, rtol=1e-3, atol=0)


@pytest.mark.parametrize("value", [math.nan, -math.inf])
def test_values_that_are_not_finite_are_refused(value):
    weight = draw(4, 8)
    weight[2, 3] = value
    with pytest.raises(ValueError, match="NaN"):
        FloatGrid(weight, 4, 8)
