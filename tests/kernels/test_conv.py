"""Quantized convolutions give what their reference gives, whatever the shape, format and instruction set."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional

from modelgrove_kernels import native
from modelgrove_kernels.conv import branch, conv2d, conv2d_w4a8, conv2d_w8a8, reference
from modelgrove_kernels.conv_panels import Geometry, matrix_of, to_panels
from modelgrove_kernels.packing import dequantize, quantize

ISAS = [name for name, number in native.ISAS.items() if number <= native.ISAS.get(native.isa(), 0)]
needs_library = pytest.mark.skipif(not ISAS, reason=f"no compiled kernels: {native.absence()}")
PLAIN = Geometry((3, 3), (1, 1), (1, 1), (1, 1))


def draw(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def panels(out, columns, bits, group):
    return to_panels(quantize(draw(out, columns, seed=9), bits, group))


def assert_same(found, wanted):
    """Only float32 sums in another order: 1e-5 of the largest value of an image."""
    assert found.shape == wanted.shape
    assert torch.equal(found.isnan(), wanted.isnan())
    largest = wanted.nan_to_num().abs().amax((1, 2, 3), keepdim=True).clamp_min(1e-30)
    assert float(((found - wanted).nan_to_num().abs() / largest).max()) < 1e-5


pairs = st.tuples(st.integers(1, 3), st.integers(1, 3))


@needs_library
@given(
    st.sampled_from(ISAS), st.integers(1, 3), st.integers(1, 40), st.integers(1, 40),
    st.tuples(st.integers(1, 9), st.integers(1, 9)), pairs, pairs, st.tuples(st.integers(0, 2), st.integers(0, 2)),
    pairs, st.sampled_from([(8, None), (4, None), (8, 32), (4, 8), (4, 64)]), st.booleans(), st.booleans(),
)  # fmt: skip
@settings(max_examples=150, deadline=None)
def test_any_convolution_gives_what_the_reference_gives(
    isa, images, channels, out, sides, kernel, stride, padding, dilation, grid, last, extras
):
    geometry = Geometry(kernel, stride, padding, dilation)
    x = draw(images, channels, *sides)
    if min(geometry.sides(x)) < 1:
        return
    x = x.contiguous(memory_format=torch.channels_last) if last else x
    weight = panels(out, geometry.columns(x), *grid)
    smooth, bias = (draw(channels, seed=2).abs() + 0.1, draw(out, seed=3)) if extras else (None, None)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MODELGROVE_ISA", isa)
        found = conv2d(x, weight, geometry, bias, smooth)
    assert_same(found, reference(x, weight, geometry, bias, smooth))


VALUES = {
    "outliers": lambda x: x * (1 + 1e3 * (draw(*x.shape, seed=1) > 2.3)),
    "one empty image": lambda x: x * torch.tensor([1.0, 0.0]).view(2, 1, 1, 1),
    "not finite": lambda x: x.index_put((torch.tensor([1]), torch.tensor([2]), torch.tensor([3]), torch.tensor([4])),
                                        torch.tensor([torch.nan])),
    "tiny": lambda x: x * 1e-37,
}  # fmt: skip


@needs_library
@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("values", VALUES)
@pytest.mark.parametrize("bits", [8, 4])
def test_extreme_pictures_give_what_the_reference_gives(isa, values, bits, monkeypatch):
    monkeypatch.setenv("MODELGROVE_ISA", isa)
    x, weight = VALUES[values](draw(2, 24, 7, 6)), panels(40, 216, bits, None)
    assert_same(conv2d(x, weight, PLAIN), reference(x, weight, PLAIN, None, None))


@needs_library
@pytest.mark.parametrize("isa", ISAS)
def test_threads_give_the_same_bits(isa, monkeypatch):
    monkeypatch.setenv("MODELGROVE_ISA", isa)
    before, x, weight, found = torch.get_num_threads(), draw(2, 32, 12, 12), panels(70, 288, 4, 32), []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            found.append(conv2d(x, weight, PLAIN))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(found[0], found[1])
    assert torch.equal(found[0], found[2])


def test_the_reference_is_the_dequantized_convolution():
    packed, x = quantize(draw(8, 54), 4, 54), draw(1, 6, 8, 8)
    wanted = functional.conv2d(x, dequantize(packed).view(8, 3, 3, 6).permute(0, 3, 1, 2), padding=1)
    found = reference(x, to_panels(packed), PLAIN, None, None)
    # Pictures of 8 bits with one scale an image lose about a per cent.
    assert float((found - wanted).norm() / wanted.norm()) < 0.02


@pytest.mark.parametrize("bits", [8, 4])
def test_a_branch_of_low_rank_is_added(bits):
    x, weight, down, up = draw(1, 8, 6, 6), panels(16, 72, bits, None), draw(3, 72, seed=4), draw(16, 3, seed=5)
    smooth = draw(8, seed=6).abs() + 0.5
    found = conv2d(x, weight, PLAIN, None, smooth, down, up) - conv2d(x, weight, PLAIN, None, smooth)
    kernels = (up @ down).view(16, 3, 3, 8).permute(0, 3, 1, 2)
    wanted = functional.conv2d(x / smooth.view(-1, 1, 1), kernels, padding=1)
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(branch(x, PLAIN, smooth, down, up), wanted, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("bits", "group"), [(8, None), (4, 8), (8, 16)])
def test_panels_stand_for_the_matrix(bits, group):
    packed = quantize(draw(45, 50), bits, group)
    assert torch.equal(matrix_of(to_panels(packed), 50), dequantize(packed))


def test_torch_accepts_the_operators():
    x, places = draw(1, 8, 5, 5), ([3, 3], [1, 1], [1, 1], [1, 1])
    four, eight = panels(6, 72, 4, 8), panels(6, 72, 8, None)
    rest = (draw(6), draw(8).abs() + 1, draw(2, 72), draw(6, 2))
    torch.library.opcheck(conv2d_w4a8, (x, four.codes, four.scales, four.zeros, 8, 6, *places, *rest))
    torch.library.opcheck(conv2d_w8a8, (x, eight.codes, eight.scales, 72, 6, *places, None, None, None, None))


def test_channels_last_stays_channels_last():
    x = draw(2, 8, 6, 6).contiguous(memory_format=torch.channels_last)
    assert conv2d(x, panels(6, 72, 8, None), PLAIN).is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize(
    ("x", "message"),
    [
        (torch.zeros(1, 8, 5, 5).double(), "float64"),
        (torch.zeros(8, 5, 5), r"\(8, 5, 5\)"),
        (torch.zeros(1, 20, 5, 5), "20 channels"),
    ],
)
def test_what_does_not_fit_is_refused(x, message):
    with pytest.raises(ValueError, match=message):
        conv2d(x, panels(6, 72, 8, None), PLAIN)


def test_groups_that_a_unit_would_cross_are_refused():
    with pytest.raises(ValueError, match="groups of 6 columns"):
        to_panels(quantize(draw(6, 72), 4, 6))


def test_without_the_library_the_reference_computes(monkeypatch):
    x, weight = draw(1, 8, 5, 5), panels(6, 72, 4, 8)
    monkeypatch.setenv("MODELGROVE_ISA", "none")
    assert torch.equal(conv2d(x, weight, PLAIN), reference(x, weight, PLAIN, None, None))
