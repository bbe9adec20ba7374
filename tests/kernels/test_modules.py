"""Quantized layers in the place of torch's own."""

import pytest
import torch
from torch import nn

from modelgrove_kernels import native
from modelgrove_kernels.bitstream import pack_bits
from modelgrove_kernels.layouts import Layout, decode, transform, transform_inputs
from modelgrove_kernels.modules import QuantConv2d, QuantLinear, has_conv, has_linear
from modelgrove_kernels.packing import quantize
from modelgrove_kernels.uniform import uniform_parts


def draw(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def packed(matrix, bits, group):
    found = quantize(matrix, bits, group)
    parts = {"codes": found.codes, "scales": found.scales}
    return parts if found.zeros is None else {**parts, "zeros": found.zeros}


def near(found, wanted, share):
    assert float((found - wanted).norm() / wanted.norm()) < share


@pytest.mark.parametrize(("bits", "group"), [(4, 32), (4, 128), (8, None)])
@pytest.mark.parametrize("turned", [None, "smooth", "hadamard"])
@pytest.mark.parametrize("branch", [False, True])
def test_a_linear_layer_is_its_dequantized_matrix_on_rounded_inputs(bits, group, turned, branch):
    weight, x, bias = draw(40, 128), draw(2, 5, 128, seed=1), draw(40, seed=2)
    extra = {"smooth": draw(128, seed=3).abs() + 0.5} if turned == "smooth" else {}
    rotation = {"rotation": "hadamard", "block": 64} if turned == "hadamard" else {}
    layout = Layout(f"int{bits}", 128, bits, group or 128, **rotation)
    if branch:
        extra |= {"up": draw(40, 4, seed=4), "down": draw(4, 128, seed=5)}
    inner = transform(weight, layout, extra)
    parts = {**packed(inner, bits, group), **extra}
    matrix = decode(layout, parts)
    turned_inputs = transform_inputs(x, layout, extra)
    wanted = turned_inputs @ matrix.T + bias
    if branch:
        wanted = wanted + turned_inputs @ extra["down"].T @ extra["up"].T
    # Activations of 8 bits, one scale a row: steps of 1/127 of the largest. Layers of 8-bit weights are torch's, which
    # has 7 bits without VNNI, for all between the least and the largest of all rows: some three times as coarse.
    coarse = bits == 8 and native.isa() != "avx512vnni"
    near(QuantLinear(layout, parts, bias)(x), wanted, 0.06 if coarse else 0.02)


def test_a_table_of_sixteen_levels():
    codes = torch.randint(16, (20, 64), generator=torch.Generator().manual_seed(0)).to(torch.uint8)
    parts = {"codes": pack_bits(codes, 4), "table": draw(20, 16, 1), "scales": torch.rand(20, 2) + 0.5}
    layout, x = Layout("lut", 64, 4, 32), draw(3, 64)
    near(QuantLinear(layout, parts)(x), x @ decode(layout, parts).T, 0.02)


@pytest.mark.parametrize("layout", [Layout("sparse", 8, 1, 8), Layout("int8", 64, 8, 32), Layout("lut", 64, 5, 32)])
def test_layouts_without_a_kernel_are_told(layout):
    assert not has_linear(layout)
    with pytest.raises(ValueError, match="no kernel"):
        QuantLinear(layout, {})


@pytest.mark.parametrize(("bits", "group"), [(8, None), (8, 32), (4, 32)])
@pytest.mark.parametrize("options", [{}, {"stride": 2, "padding": 1}, {"padding": 2, "dilation": 2}])
def test_a_convolution_is_its_dequantized_kernel_on_rounded_pictures(bits, group, options):
    layer, x = nn.Conv2d(32, 24, 3, **options).requires_grad_(False), draw(2, 32, 9, 8)
    matrix = layer.weight.permute(0, 2, 3, 1).reshape(24, -1)
    layout = Layout(f"int{bits}", 288, bits, group or 288)
    parts = packed(matrix, bits, group)
    plain = nn.Conv2d(32, 24, 3, **options).requires_grad_(False)
    plain.weight.copy_(decode(layout, parts).view(24, 3, 3, 32).permute(0, 3, 1, 2))
    plain.bias.copy_(layer.bias)
    near(QuantConv2d(layer, layout, parts)(x), plain(x), 0.02)


def test_convolutions_without_a_kernel_are_told():
    layout = Layout("int4", 72, 4, 72)
    assert not has_conv(nn.Conv2d(16, 16, 3, groups=2), layout, {})
    assert not has_conv(nn.Conv2d(8, 16, 3, padding="same"), layout, {})
    assert not has_conv(nn.Conv2d(8, 16, 3, padding_mode="reflect"), layout, {})
    with pytest.raises(ValueError, match="no kernel"):
        QuantConv2d(nn.Conv2d(16, 16, 3, groups=2), layout, {})


@pytest.mark.parametrize("bits", [2, 3])
def test_equal_steps_of_fewer_bits_are_computed_as_four(bits):
    weight, x = draw(20, 96), draw(3, 96, seed=1)
    parts, layout = uniform_parts(weight, bits, 32), Layout("lut", 96, bits, 32)
    near(QuantLinear(layout, parts)(x), x @ decode(layout, parts).T, 0.02)
    layer, picture = nn.Conv2d(32, 20, (3, 1), bias=False), draw(1, 32, 8, 8, seed=2)
    plain = nn.functional.conv2d(picture, decode(layout, parts).view(20, 3, 1, 32).permute(0, 3, 1, 2))
    near(QuantConv2d(layer, layout, parts)(picture), plain, 0.02)


def test_a_table_of_eight_unequal_levels_is_widened_to_sixteen():
    codes = torch.randint(8, (20, 64), generator=torch.Generator().manual_seed(0)).to(torch.uint8)
    parts = {"codes": pack_bits(codes, 3), "table": draw(20, 8, 1), "scales": torch.rand(20, 2) + 0.5}
    layout, x = Layout("lut", 64, 3, 32), draw(3, 64)
    near(QuantLinear(layout, parts)(x), x @ decode(layout, parts).T, 0.02)
    assert not has_conv(nn.Conv2d(64, 20, 1), layout, parts)


def test_a_four_bit_layer_is_a_sixth_of_float32():
    layout = Layout("int4", 1280, 4, 64)
    layer = QuantLinear(layout, packed(draw(1280, 1280), 4, 64))
    assert layer.weight.nbytes < 0.16 * 4 * 1280 * 1280
