"""GPTQ against its algorithm written out column by column, and against rounding to nearest."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from modelgrove_kernels.calibration import output_error
from modelgrove_kernels.gptq import DAMPING, gptq
from modelgrove_kernels.packing import dequantize, quantize


def draw(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def inputs(columns, seed=0):
    """Inputs that lean one way and differ in size, as activations do."""
    mixed = draw(4 * columns, columns, seed=seed) @ (torch.eye(columns) + 0.5 * draw(columns, columns, seed=seed + 1))
    return mixed * torch.logspace(-1, 1, columns)


def plain_gptq(weight, gram, scales, low, high):
    """Algorithm 1 without blocks, in float64: the inverse is reduced by one column after the other."""
    order = np.argsort(-np.diag(gram), kind="stable")
    rest, gram = weight[:, order].copy(), gram[np.ix_(order, order)]
    inverse = np.linalg.inv(gram + DAMPING * np.diag(gram).mean() * np.eye(len(gram)))
    steps = np.zeros_like(rest)
    for column in range(len(gram)):
        step = scales[:, order[column]]
        steps[:, column] = np.clip(np.round(rest[:, column] / step), low[:, order[column]], high[:, order[column]])
        error = (rest[:, column] - steps[:, column] * step) / inverse[column, column]
        rest[:, column:] -= np.outer(error, inverse[column, column:])
        inverse -= np.outer(inverse[:, column], inverse[column]) / inverse[column, column]
    found = np.zeros_like(steps)
    found[:, order] = steps
    return found * scales


def test_blocks_and_factors_change_nothing():
    weight, x = draw(20, 160), inputs(160)
    gram = x.T @ x
    packed = gptq(weight, gram, quantize(weight, 4, 32))
    scales = packed.scales.double().repeat_interleave(32, 1).numpy()
    zeros = packed.zeros.double().repeat_interleave(32, 1).numpy()
    wanted = plain_gptq(weight.double().numpy(), gram.double().numpy(), scales, -zeros, 15 - zeros)
    # In float32 a value near the middle of two steps may fall to the other side, and the columns after it differ.
    assert float(np.mean(np.abs(dequantize(packed).double().numpy() - wanted) > 1e-6)) < 0.02


@pytest.mark.parametrize(("bits", "group"), [(4, 32), (4, None), (8, None)])
def test_outputs_change_less_than_by_rounding_to_nearest(bits, group):
    weight, x = draw(48, 96), inputs(96)
    gram = x.T @ x
    nearest = quantize(weight, bits, group)
    found = gptq(weight, gram, nearest)
    errors = [output_error(dequantize(one) - weight, weight, gram) for one in (found, nearest)]
    assert errors[0] < errors[1] / 2
    assert (found.codes.shape, found.scales.shape) == (nearest.codes.shape, nearest.scales.shape)
    assert found.noise == pytest.approx(float((dequantize(found) - weight).square().sum()), rel=1e-4)


def test_uncorrelated_inputs_leave_rounding_to_nearest():
    weight = draw(10, 32)
    found = gptq(weight, torch.eye(32), quantize(weight, 8))
    grid = found.scales.float()
    # Nothing can be made up for: every value is on the nearest step of its grid, or at its end.
    assert float(((dequantize(found) - weight).abs() / grid)[weight.abs() < 126 * grid].max()) <= 0.5001


@given(st.integers(1, 9), st.integers(1, 70), st.sampled_from([(4, 32), (4, None), (8, None)]), st.integers(0, 99))
@settings(max_examples=40, deadline=None)
def test_any_shape_and_dead_inputs_are_taken(rows, columns, grid, seed):
    weight, x = draw(rows, columns, seed=seed), draw(3, columns, seed=seed + 1)
    x[:, ::3] = 0
    found = gptq(weight, x.T @ x, quantize(weight, *grid))
    assert bool(torch.isfinite(dequantize(found)).all())
    assert dequantize(found).shape == weight.shape


def test_no_inputs_at_all_leave_a_finite_result():
    weight = draw(4, 8)
    assert bool(torch.isfinite(dequantize(gptq(weight, torch.zeros(8, 8), quantize(weight, 4)))).all())


def test_inputs_that_are_not_finite_are_refused():
    weight, gram = draw(4, 8), torch.eye(8)
    gram[1, 1] = torch.nan
    with pytest.raises(ValueError, match="NaN or infinite"):
        gptq(weight, gram, quantize(weight, 4))
