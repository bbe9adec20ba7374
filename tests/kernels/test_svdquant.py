"""SVDQuant's pieces against the paper's equations, and what it is there for: outliers."""

import math

import pytest
import torch

from modelgrove_kernels.calibration import LayerInputs
from modelgrove_kernels.emulation import ActivationRule, round_activations
from modelgrove_kernels.packing import dequantize
from modelgrove_kernels.svdquant import nearest_error, svdquant

FOUR = ActivationRule(4, width=64)


def draw(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def seen(rows):
    inputs = LayerInputs.none(rows.shape[1])
    inputs.add(rows)
    return inputs


def outliers(rows=48, columns=128):
    """A layer like those that the paper shows: few input channels are thirty times the others."""
    x = draw(512, columns)
    x[:, ::17] *= 30
    return draw(rows, columns, seed=1), seen(x)


def outputs(found, rule, x):
    inner = x / found.smooth.float()
    rounded = round_activations(inner, rule, {}, 0)
    return rounded @ dequantize(found.residual).T + inner @ found.down.float().T @ found.up.float().T


def decibels(error):
    return -10 * math.log10(error)


def test_outliers_cost_at_least_five_decibels_less():
    weight, inputs = outliers()
    found = svdquant(weight, inputs, 64, 16, FOUR)
    gained = decibels(found.error) - decibels(nearest_error(weight, inputs, 64, FOUR))
    assert gained >= 5
    assert found.strength is not None


def test_the_error_is_that_of_the_outputs_and_holds_on_other_inputs():
    weight, inputs = outliers()
    found = svdquant(weight, inputs, 64, 16, FOUR)
    exact = inputs.sample @ weight.T
    error = float((outputs(found, FOUR, inputs.sample) - exact).square().sum() / exact.square().sum())
    assert found.error == pytest.approx(error, rel=1e-4)
    fresh = draw(512, 128, seed=9)
    fresh[:, ::17] *= 30
    exact = fresh @ weight.T
    assert float((outputs(found, FOUR, fresh) - exact).square().sum() / exact.square().sum()) < 1.3 * error


def test_a_weight_of_low_rank_goes_to_the_branch():
    """Nothing is left to round: float16 of the factors is the only loss."""
    weight = draw(40, 4) @ draw(4, 64, seed=1)
    found = svdquant(weight, seen(draw(256, 64, seed=2)), 64, 4, FOUR)
    assert found.error < 1e-5


@pytest.mark.parametrize("rank", [1, 4, 16])
def test_more_rank_is_not_worse_than_less(rank):
    weight, inputs = outliers()
    fewer, more = (svdquant(weight, inputs, 64, size, FOUR, rounds=3).error for size in (rank, 2 * rank))
    assert more <= 1.02 * fewer  # both are found greedily


def test_turns_are_made_while_they_help_and_no_longer():
    weight, inputs = outliers()
    none, few = (svdquant(weight, inputs, 64, 8, FOUR, rounds=rounds) for rounds in (0, 5))
    assert none.rounds == 0
    assert few.error <= none.error
    assert few.rounds <= 5


def test_dead_channels_and_layers_are_harmless():
    weight, x = draw(24, 64), draw(128, 64, seed=1)
    weight[:, 3], x[:, 5] = 0, 0
    found = svdquant(weight, seen(x), 64, 8, FOUR)
    assert bool(torch.isfinite(found.smooth).all())
    assert bool((found.smooth > 0).all())
    assert found.error < 0.02
    nothing = svdquant(torch.zeros(8, 64), seen(x), 64, 8, FOUR)
    assert nothing.error == 0
    silent = svdquant(weight, seen(torch.zeros(16, 64)), 64, 8, FOUR)
    assert bool(torch.isfinite(dequantize(silent.residual)).all())


@pytest.mark.parametrize("scale", [1e-6, 1e4, 1e12])
def test_the_size_of_weights_does_not_matter(scale):
    weight, inputs = outliers()
    plain, scaled = (svdquant(weight * factor, inputs, 64, 8, FOUR, rounds=3) for factor in (1.0, scale))
    assert scaled.error == pytest.approx(plain.error, rel=0.2)


def test_inputs_that_are_not_finite_are_refused():
    x = draw(32, 64)
    x[3, 3] = math.nan
    with pytest.raises(ValueError, match="NaN"):
        svdquant(draw(8, 64), seen(x), 64, 4, FOUR)
