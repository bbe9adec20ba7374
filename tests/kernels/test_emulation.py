"""Rounded activations and emulated layers, against the formulas written out."""

import pytest
import torch
from torch import nn

from modelgrove_kernels.emulation import (
    ActivationRule,
    Clock,
    EmulatedConv2d,
    EmulatedLinear,
    round_activations,
    round_symmetric,
    round_to_ranges,
)
from modelgrove_kernels.layouts import Layout
from modelgrove_kernels.packing import dequantize, quantize


def draw(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def test_symmetric_rounding_has_the_rows_maximum_on_its_grid():
    values = draw(4, 9)
    values[2] = 0
    found = round_symmetric(values, 8, [-1])
    step = values.abs().amax(1, keepdim=True) / 127
    assert float((found - values).abs().max()) <= float(step.max()) / 2 * 1.0001
    assert torch.equal(found[2], values[2])
    torch.testing.assert_close(found.abs().amax(1), values.abs().amax(1))


def test_stored_ranges_clip_and_keep_zero():
    values = torch.tensor([-9.0, -0.4, 0.0, 1.6, 9.0])
    found = round_to_ranges(values, 2, torch.tensor(-1.0), torch.tensor(2.0))
    assert found.tolist() == [-1, 0, 0, 2, 2]


def test_groups_within_a_token_have_scales_of_their_own():
    values = torch.cat([draw(3, 8), 1000 * draw(3, 8, seed=1)], 1)
    found = round_activations(values, ActivationRule(4, width=8), {}, 0)
    alone = torch.cat([round_symmetric(half, 4, [-1]) for half in values.split(8, 1)], 1)
    assert torch.equal(found, alone)
    ragged = round_activations(values[:, :11], ActivationRule(4, width=8), {}, 0)
    assert torch.equal(ragged[:, :8], found[:, :8])
    assert torch.equal(ragged[:, 8:], round_symmetric(values[:, 8:11], 4, [-1]))


def test_floating_inputs_have_torch_s_fp8_values_of_their_own_maximum():
    values = draw(3, 40) * draw(3, 1, seed=1).exp()
    found = round_activations(values, ActivationRule(8, exponent=4), {}, 0)
    scale = values.abs().amax(1, keepdim=True) / 240  # the largest value of E4M3 with this bias
    wanted = (values / scale).to(torch.float8_e4m3fnuz).float() * scale
    assert torch.equal(found, wanted)
    pictures = values.view(3, 10, 2, 2)
    torch.testing.assert_close(
        round_activations(pictures, ActivationRule(8, exponent=4), {}, 0, channel=1).flatten(1), wanted
    )
    halves = round_activations(values, ActivationRule(8, width=20, exponent=4), {}, 0)
    assert torch.equal(halves[:, :20], round_activations(values[:, :20], ActivationRule(8, exponent=4), {}, 0))


@pytest.mark.parametrize("channel", [-1, 1])
def test_channel_groups_are_rounded_apart(channel):
    shape = (2, 5, 6) if channel == -1 else (2, 6, 3, 3)
    values, groups = draw(*shape), torch.tensor([0, 1, 0, 1, 1, 0], dtype=torch.uint8)
    found = round_activations(values, ActivationRule(4), {"channels": groups}, 0, channel)
    for group in (0, 1):
        places = (groups == group).nonzero().flatten()
        mine = values.index_select(channel, places)
        dims = [-1] if channel == -1 else [1, 2, 3]
        assert torch.equal(found.index_select(channel, places), round_symmetric(mine, 4, dims))


def test_each_interval_of_timesteps_has_its_range():
    ranges = torch.tensor([[[-1.0, 1.0]], [[-4.0, 4.0]]])
    rule, values = ActivationRule(8, "timestep"), torch.tensor([[3.0]])
    assert float(round_activations(values, rule, {"ranges": ranges}, 0)) == pytest.approx(1, abs=0.01)
    for late in (1, 7):
        assert float(round_activations(values, rule, {"ranges": ranges}, late)) == pytest.approx(3, abs=0.02)


def test_a_linear_layer_adds_its_branch_of_unrounded_inputs():
    weight, inputs, bias = draw(6, 16), draw(3, 16, seed=1), draw(6, seed=2)
    smooth, up, down = draw(16, seed=3).abs() + 0.5, draw(6, 2, seed=4), draw(2, 16, seed=5)
    packed = quantize(weight * smooth, 4, 8)
    parts = {"codes": packed.codes, "scales": packed.scales, "zeros": packed.zeros}
    layer = EmulatedLinear(
        Layout("int4", 16, 4, 8), {**parts, "smooth": smooth, "up": up, "down": down}, ActivationRule(8), bias, Clock()
    )
    inner = inputs / smooth
    wanted = round_symmetric(inner, 8, [-1]) @ dequantize(packed).T + inner @ down.T @ up.T + bias
    # The same sums in another order.
    torch.testing.assert_close(layer(inputs), wanted, rtol=1e-5, atol=1e-5)


def test_a_smoothed_convolution_of_many_bits_is_nearly_the_convolution():
    layer, inputs = nn.Conv2d(6, 4, 3, stride=2, padding=1), draw(2, 6, 7, 7)
    smooth = draw(6, seed=3).abs() + 0.5
    matrix = (layer.weight.detach() * smooth.view(-1, 1, 1)).permute(0, 2, 3, 1).reshape(4, -1)
    packed = quantize(matrix, 8)
    parts = {"codes": packed.codes, "scales": packed.scales, "smooth": smooth}
    layer.requires_grad_(False)
    found = EmulatedConv2d(Layout("int8", 54, 8, 54), parts, ActivationRule(8), layer, Clock())(inputs)
    wanted = layer(inputs).detach()
    # Two roundings to 8 bits leave about half a per cent each.
    assert float((found - wanted).norm() / wanted.norm()) < 0.02


def test_a_convolution_adds_its_branch_of_unrounded_pictures():
    layer, inputs = nn.Conv2d(6, 4, 3, padding=1).requires_grad_(False), draw(2, 6, 5, 5)
    packed, smooth = quantize(draw(4, 54, seed=1), 8), draw(6, seed=2).abs() + 0.5
    parts = {"codes": packed.codes, "scales": packed.scales, "smooth": smooth}
    branch = {"up": draw(4, 2, seed=3), "down": draw(2, 54, seed=4)}
    layout, rule = Layout("int8", 54, 8, 54), ActivationRule(4)
    found, plain = (EmulatedConv2d(layout, one, rule, layer, Clock())(inputs) for one in ({**parts, **branch}, parts))
    kernels = (branch["up"] @ branch["down"]).view(4, 3, 3, 6).permute(0, 3, 1, 2)
    wanted = nn.functional.conv2d(inputs / smooth.view(-1, 1, 1), kernels, padding=1)
    # Sums of products in another order.
    torch.testing.assert_close(found - plain, wanted, rtol=1e-4, atol=1e-4)
