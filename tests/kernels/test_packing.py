"""Quantization against NumPy, bit by bit, and what the packers promise."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from modelgrove_kernels import packing
from modelgrove_kernels.packing import dequantize, pack_nibbles, quantize, unpack_nibbles

floats = st.floats(-(2.0**100), 2.0**100, width=32)
matrices = hnp.arrays(np.float32, hnp.array_shapes(min_dims=2, max_dims=2, max_side=70), elements=floats)
groups = st.sampled_from([None, 2, 32, 64, 128])


def padded_groups(weight, bits, group):
    """(rows, groups, width) in float64, padded with zeros."""
    columns = weight.shape[1]
    whole = columns + columns % 2 if bits == 4 else columns
    width = whole if group is None else min(group, whole)
    count = math.ceil(columns / width)
    padded = np.pad(weight.astype(np.float64), ((0, 0), (0, count * width - columns)))
    return padded.reshape(len(weight), count, width)


def steps_of(packed):
    """Codes minus zero points, (rows, groups, width), unpacked in NumPy."""
    rows, count = packed.scales.shape
    codes = packed.codes.numpy()
    if packed.bits == 8:
        return codes.reshape(rows, count, packed.group).astype(np.int64)
    codes = np.stack([codes % 16, codes // 16], axis=-1).reshape(rows, count, packed.group)
    return codes.astype(np.int64) - packed.zeros.numpy()[..., None]


@given(matrices, st.sampled_from([8, 4]), groups)
@settings(max_examples=150, deadline=None)
def test_every_weight_goes_to_the_nearest_code_of_its_group(weight, bits, group):
    packed = quantize(torch.from_numpy(weight), bits, group)
    grouped = padded_groups(weight, bits, group)
    scale = packed.scales.numpy().astype(np.float64)[..., None]
    distance = np.abs(steps_of(packed) * scale - grouped)
    # Half a step, and a rounding of float32 in the quotient; at the ends of an int4 grid the rounded
    # zero point may push a value half a step further, and a float16 scale may be short by 2^-11 of the range.
    # A scale near the smallest float32, 1.4e-45, may be off by half of that, 127 times.
    room = (0.5 if bits == 8 else 1.0) * scale + np.abs(grouped) * 2.0**-11 + 1e-43
    assert (distance <= room).all()


@given(matrices, st.sampled_from([8, 4]), groups)
@settings(max_examples=100, deadline=None)
def test_scales_and_zero_points_are_those_of_the_range(weight, bits, group):
    packed = quantize(torch.from_numpy(weight), bits, group)
    grouped = padded_groups(weight, bits, group)
    low, high = np.minimum(grouped.min(-1), 0), np.maximum(grouped.max(-1), 0)
    wanted = np.maximum(-low, high) / 127 if bits == 8 else (high - low) / 15
    # 2^-11 is float16's rounding; below 1e-37 float32 itself has fewer digits.
    real = wanted > 1e-37
    assert np.allclose(packed.scales.numpy()[real], wanted[real], rtol=2.0**-10)
    if bits == 4:
        zeros = packed.zeros.numpy()[real]
        assert (np.abs(zeros - -low[real] / wanted[real]) <= 0.51).all()


@given(matrices, st.sampled_from([8, 4]), groups)
@settings(max_examples=100, deadline=None)
def test_dequantizing_gives_the_codes_meaning_and_keeps_zeros(weight, bits, group):
    packed = quantize(torch.from_numpy(weight), bits, group)
    values = dequantize(packed).numpy()
    scale = packed.scales.numpy().astype(np.float32)[..., None]
    wanted = (steps_of(packed).astype(np.float32) * scale).reshape(len(weight), -1)[:, : weight.shape[1]]
    assert values.shape == weight.shape
    assert np.array_equal(values, wanted)
    assert (values[weight == 0] == 0).all()


@given(
    hnp.arrays(
        np.uint8, st.tuples(st.integers(0, 9), st.integers(0, 9).map(lambda n: 2 * n)), elements=st.integers(0, 15)
    )
)
@settings(deadline=None)
def test_nibbles_survive_packing_with_the_even_column_low(codes):
    packed = pack_nibbles(torch.from_numpy(codes))
    assert np.array_equal(packed.numpy(), codes[:, 0::2] + 16 * codes[:, 1::2])
    assert np.array_equal(unpack_nibbles(packed).numpy(), codes)


def test_the_reported_error_is_the_true_one():
    weight = torch.randn(37, 111, generator=torch.Generator().manual_seed(0))
    packed = quantize(weight, 4, 32)
    noise = (dequantize(packed).double() - weight.double()).square().sum()
    # Sums of float32 squares a chunk at a time.
    assert packed.noise == pytest.approx(float(noise), rel=1e-5)
    assert packed.signal == pytest.approx(float(weight.double().square().sum()), rel=1e-5)
    assert packed.sqnr == pytest.approx(10 * math.log10(packed.signal / packed.noise))


def test_the_error_of_gaussian_weights_is_what_theory_says():
    weight = torch.randn(256, 1280, generator=torch.Generator().manual_seed(0))
    # Uniform noise of step²/12. The largest of 1280 Gaussians is about 3.4 deviations, so a step is 3.4/127.
    assert quantize(weight, 8).sqnr == pytest.approx(10 * math.log10(12 * (127 / 3.4) ** 2), abs=1)
    # The range of 64 Gaussians is about 4.7 deviations, so a step is 4.7/15.
    assert quantize(weight, 4, 64).sqnr == pytest.approx(10 * math.log10(12 * (15 / 4.7) ** 2), abs=1)


def test_smaller_groups_lose_less():
    weight = torch.randn(64, 512, generator=torch.Generator().manual_seed(0))
    assert quantize(weight, 4, 32).sqnr > quantize(weight, 4, 128).sqnr > quantize(weight, 4).sqnr


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_any_floating_dtype_is_taken_and_given_back(dtype):
    weight = (torch.randn(8, 40, generator=torch.Generator().manual_seed(0)) * 0.02).to(dtype)
    packed = quantize(weight, 8)
    assert dequantize(packed, dtype).dtype == dtype
    assert torch.equal(packed.codes, quantize(weight.float(), 8).codes)


def test_scales_are_float16_where_they_fit_and_float32_elsewhere():
    weight = torch.ones(2, 4)
    assert quantize(weight, 8).scales.dtype == torch.float16
    assert quantize(weight * 1e-6, 8).scales.dtype == torch.float32
    assert quantize(weight * 1e9, 4).scales.dtype == torch.float32


def test_the_extremes_of_float32_survive():
    weight = torch.tensor([[1e38, -1e38, 0.0, 1.0], [1e-45, 0.0, 0.0, 0.0], [0.0, 0.0, 0.0, 0.0]])
    for bits in (8, 4):
        packed = quantize(weight, bits)
        assert torch.isfinite(dequantize(packed)).all()
        assert math.isfinite(packed.signal)
        assert math.isfinite(packed.noise)
        # One step is 1/127 of the largest magnitude, or 1/15 of the range with a zero point half a step off.
        assert dequantize(packed)[0, 0] == pytest.approx(1e38, rel=0.07)


def test_the_size_is_the_true_one():
    packed = quantize(torch.randn(10, 130), 4, 64)
    # 130 columns are padded to 3 groups of 64: 96 bytes of codes a row, 3 scales of 2 bytes and 3 zeros.
    assert packed.nbytes == 10 * (96 + 3 * 2 + 3)


def test_results_do_not_depend_on_the_chunk(monkeypatch):
    weight = torch.randn(33, 70, generator=torch.Generator().manual_seed(0))
    whole = quantize(weight, 4, 32)
    monkeypatch.setattr(packing, "CHUNK", 100)
    pieces = quantize(weight, 4, 32)
    assert torch.equal(whole.codes, pieces.codes)
    assert torch.equal(dequantize(whole), dequantize(pieces))


@pytest.mark.parametrize("shape", [(0, 5), (5, 0), (0, 0), (1, 1), (3, 1)])
def test_empty_and_tiny_matrices_survive(shape):
    for bits in (8, 4):
        assert dequantize(quantize(torch.ones(shape), bits, 32)).shape == shape


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_values_that_are_no_numbers_are_refused(value):
    weight = torch.zeros(4, 4)
    weight[2, 1] = value
    for bits in (8, 4):
        with pytest.raises(ValueError, match="NaN or infinite"):
            quantize(weight, bits, 2)


def test_what_cannot_be_quantized_is_refused():
    with pytest.raises(ValueError, match="3 bits"):
        quantize(torch.ones(2, 2), 3)
    with pytest.raises(ValueError, match="group of 7"):
        quantize(torch.ones(2, 2), 4, 7)
    with pytest.raises(ValueError, match="no matrix of floats"):
        quantize(torch.ones(2, 2, 2), 8)
    with pytest.raises(ValueError, match="no matrix of floats"):
        quantize(torch.ones(2, 2, dtype=torch.int32), 8)
