import numpy as np
import pytest
import torch

from modelgrove_analyzers.heritage.rounding import ROUNDINGS, fit_grid, precision, rounding_variance, spacing
from modelgrove_kernels.packing import dequantize, quantize

WEIGHTS = torch.randn(64, 96, generator=torch.Generator().manual_seed(1)) * 0.05


@pytest.mark.parametrize("rounding", ROUNDINGS, ids=lambda rounding: rounding.name)
def test_what_is_rounded_once_stays_as_it_is(rounding):
    once = rounding.apply(WEIGHTS)

    assert torch.equal(rounding.apply(once), once)


def test_the_spacing_of_half_precision_is_that_of_numpy():
    values = torch.tensor([1.0, 1.5, 0.1, 6e-5, 3e-6, 0.0, 1000.0, -2.0]).half()

    expected = np.spacing(np.abs(values.numpy())).astype(np.float64)

    assert spacing(values.double(), "F16").tolist() == expected.tolist()


@pytest.mark.parametrize("dtype", ["F16", "BF16", "F8_E4M3"])
def test_rounding_errors_are_as_large_as_foretold(dtype):
    rounding = next(r for r in ROUNDINGS if r.dtype == dtype)
    measured = float((rounding.apply(WEIGHTS) - WEIGHTS).double().std())

    # 6,144 errors that are uniform in their steps: their deviation is known to about 2 %.
    assert measured == pytest.approx(float(rounding_variance(WEIGHTS.double(), dtype).mean().sqrt()), rel=0.05)


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        (WEIGHTS, "F32"),
        (WEIGHTS.half().float(), "F16"),
        (WEIGHTS.bfloat16(), "BF16"),
        (WEIGHTS.to(torch.float8_e4m3fn).half(), "F8_E4M3"),
        (WEIGHTS.double() + 1e-12, "F64"),
    ],
)
def test_precision_is_seen_in_the_values_whatever_type_holds_them(values, expected):
    assert precision(values.double()) == expected


@pytest.mark.parametrize("stored", ["F32", "F16"])
@pytest.mark.parametrize(("bits", "group", "levels"), [(8, None, 255), (8, 32, 255), (4, 32, 16), (4, 16, 16)])
def test_a_quantized_matrix_lies_on_its_grid(bits, group, levels, stored):
    copy = dequantize(quantize(WEIGHTS, bits, group))
    copy = copy.half().float() if stored == "F16" else copy

    fit = fit_grid(WEIGHTS, copy, stored)

    assert fit is not None
    assert fit.group == (group or 96)
    assert fit.levels <= levels
    assert fit.within > 0.9995


def test_ordinary_weights_lie_on_no_grid():
    assert fit_grid(WEIGHTS, WEIGHTS + 0.001, "F32") is None
    assert fit_grid(WEIGHTS, WEIGHTS.half().float(), "F16") is None


@pytest.mark.parametrize("bits", [4, 8])
def test_a_quantized_fine_tune_is_not_within_half_a_step_of_the_base(bits):
    tuned = WEIGHTS + 0.01 * 0.05 * torch.randn(64, 96, generator=torch.Generator().manual_seed(2))

    fit = fit_grid(WEIGHTS, dequantize(quantize(tuned, bits, 32)), "F32")

    assert fit is not None
    assert fit.within < 0.999
