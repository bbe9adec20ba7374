"""Equal steps at few bits against a search over all scales, and GPTQ on them."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from modelgrove_kernels.calibration import output_error
from modelgrove_kernels.layouts import Layout, decode
from modelgrove_kernels.packing import group_width
from modelgrove_kernels.uniform import uniform_parts


def draw(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def decoded(weight, bits, group, gram=None):
    parts = uniform_parts(weight, bits, group, gram)
    width = group_width(weight.shape[1], bits, group)
    return decode(Layout("lut", weight.shape[1], bits, width), parts)


@given(st.integers(1, 7), st.integers(1, 9), st.integers(1, 70), st.sampled_from([None, 2, 32]))
def test_every_weight_is_a_step_and_none_is_far_off(bits, rows, columns, group):
    weight = draw(rows, columns, seed=bits + columns)
    found = decoded(weight, bits, group)
    assert found.shape == weight.shape
    # Never worse than the widest grid, whose step is the largest weight over half the levels.
    step = weight.abs().amax(1, keepdim=True) / 2 ** (bits - 1)
    assert bool(((found - weight).square().sum(1) <= (step.square() * columns).squeeze(1) * 1.01).all())


@pytest.mark.parametrize("bits", [2, 3])
def test_the_scale_is_nearly_the_best_of_all(bits):
    """Thousand scales of both signs for each row, tried one by one."""
    weight, half = draw(6, 32), 2 ** (bits - 1)
    error = (decoded(weight, bits, None) - weight).square().sum(1)
    for row, found in zip(weight, error, strict=True):
        far = float(row.abs().max()) / half
        scales = torch.cat([torch.linspace(0.3, 1.5, 500) * far, -torch.linspace(0.3, 1.5, 500) * far]).unsqueeze(1)
        tried = ((row / scales).round().clamp(-half, half - 1) * scales - row).square().sum(1)
        assert float(found) <= 1.25 * float(tried.min())


def test_the_extreme_weight_has_the_extra_level():
    weight = torch.tensor([[4.0, 1.0, -3.0, 0.0], [-4.0, -1.0, 3.0, 0.0]])
    torch.testing.assert_close(decoded(weight, 3, None), weight)


def test_gptq_loses_less_of_the_output():
    weight, x = draw(24, 64), draw(400, 8, seed=1) @ draw(8, 64, seed=2) + 0.1 * draw(400, 64, seed=3)
    gram = x.T @ x
    nearest, found = (output_error(decoded(weight, 3, 32, one) - weight, weight, gram) for one in (None, gram))
    assert found < nearest / 2


@pytest.mark.parametrize("weight", [torch.zeros(3, 8), torch.full((3, 8), 1e-30), torch.full((2, 8), 1e30)])
def test_extremes(weight):
    torch.testing.assert_close(decoded(weight, 3, None), weight, rtol=1e-3, atol=0)


def test_values_that_are_not_finite_are_refused():
    with pytest.raises(ValueError, match="NaN"):
        uniform_parts(torch.tensor([[float("nan"), 1.0]]), 3, None)
