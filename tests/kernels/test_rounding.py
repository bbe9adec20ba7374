"""The C rounding finds what the torch rounding finds, bit for bit."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from modelgrove_kernels import native, packing, rounding

pytestmark = pytest.mark.skipif(native.library() is None, reason=f"no compiled kernels: {native.absence()}")


@pytest.fixture
def in_torch(monkeypatch):
    """`packing.quantize` as it is without the library."""

    def quantize(*arguments):
        with monkeypatch.context() as patch:
            patch.setattr(packing, "round_groups", lambda *_: None)
            return packing.quantize(*arguments)

    return quantize


def draw(rows, columns, dtype, seed, spread):
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(rows, columns, generator=generator)
    # Rows of very different sizes, and a few outliers.
    values *= torch.logspace(-spread, spread, rows).unsqueeze(1)
    values[torch.rand(rows, columns, generator=generator) < 0.01] *= 50
    return values.to(dtype)


@given(
    st.integers(1, 7), st.integers(1, 150), st.sampled_from(list(rounding.DTYPES)),
    st.sampled_from([(8, None), (4, None), (8, 32), (4, 32), (4, 64), (8, 5), (4, 6)]), st.integers(0, 2**16),
    st.sampled_from([0.0, 2.0]),
)  # fmt: skip
@settings(max_examples=150, deadline=None)
def test_codes_scales_and_zero_points_are_the_same(rows, columns, dtype, grid, seed, spread):
    weight = draw(rows, columns, dtype, seed, spread)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(packing, "round_groups", lambda *_: None)
        wanted = packing.quantize(weight, *grid)
    found = packing.quantize(weight, *grid)
    assert torch.equal(found.codes, wanted.codes)
    assert torch.equal(found.scales, wanted.scales)
    assert found.zeros is None or torch.equal(found.zeros, wanted.zeros)
    # Sums in another order.
    assert found.signal == pytest.approx(wanted.signal, rel=1e-5)
    assert found.noise == pytest.approx(wanted.noise, rel=1e-4, abs=1e-12 * wanted.signal)


def test_c_does_the_usual_cases_itself():
    assert rounding.round_groups(torch.randn(4, 64, generator=torch.Generator().manual_seed(0)), 4, 32) is not None


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("place", [0, 9, 70])
@pytest.mark.parametrize("dtype", list(rounding.DTYPES))
def test_values_that_are_not_finite_are_refused(value, place, dtype):
    weight = torch.ones(3, 71, dtype=dtype)
    weight[1, place] = value
    with pytest.raises(ValueError, match="NaN or infinite"):
        packing.quantize(weight, 4, 32)


@pytest.mark.parametrize("bits", [8, 4])
def test_zeros_and_extremes_are_the_same(bits, in_torch):
    largest = torch.finfo(torch.float32).max
    for weight in (torch.zeros(2, 40), torch.full((2, 40), largest), torch.tensor([[largest, -largest] * 20]) / 4,
                   torch.full((1, 40), 1e-44), torch.tensor([[65504.0, -65504.0] * 20]).half()):  # fmt: skip
        found, wanted = packing.quantize(weight, bits, 32), in_torch(weight, bits, 32)
        assert torch.equal(found.codes, wanted.codes)
        assert torch.equal(found.scales, wanted.scales)


def test_views_are_read_in_their_own_order(in_torch):
    weight = torch.randn(40, 64, generator=torch.Generator().manual_seed(0)).T
    assert torch.equal(packing.quantize(weight, 4, 8).codes, in_torch(weight, 4, 8).codes)


def test_double_precision_is_left_to_torch():
    assert rounding.round_groups(torch.ones(2, 2, dtype=torch.float64), 8, 2) is None
    assert packing.quantize(torch.ones(2, 2, dtype=torch.float64), 8).codes.tolist() == [[127, 127]] * 2
