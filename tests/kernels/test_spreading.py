"""Rotations for outliers: orthogonal, chosen by J, and flatter than what they were given."""

import math

import pytest
import torch

from modelgrove_kernels.calibration import LayerInputs
from modelgrove_kernels.emulation import round_symmetric
from modelgrove_kernels.layouts import Layout, transform_inputs
from modelgrove_kernels.spreading import adaptive, fluctuation, greedy, hadamard_spread, zigzag


def draw(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def seen(rows):
    inputs = LayerInputs.none(rows.shape[1])
    inputs.add(rows)
    return inputs


def generator():
    return torch.Generator().manual_seed(0)


def salient(columns=96):
    """Few channels a hundred times as large, as the paper shows them."""
    x = draw(512, columns)
    x[:, 5::31] *= 100
    return x


def test_the_fluctuation_is_the_root_mean_square():
    x = draw(300, 24) * 3
    assert fluctuation(seen(x)) == pytest.approx(float(x.norm()) / math.sqrt(x.numel()), rel=1e-5)


def test_mild_inputs_get_hadamard_and_salient_ones_a_rotation_of_their_own():
    mild = adaptive(seen(0.5 * draw(64, 96)), 16, generator())
    assert (mild.rotation, mild.block, mild.parts) == ("hadamard", 32, {})
    own = adaptive(seen(salient()), 16, generator())
    assert (own.rotation, own.block) == ("stored", 16)
    assert own.parts["rotation"].shape == (6, 16, 16)
    assert sorted(own.parts["permutation"].tolist()) == list(range(96))


def test_columns_that_have_no_blocks_are_left_alone():
    assert adaptive(seen(salient(100)), 16, generator()).rotation is None
    assert hadamard_spread(24).block == 8
    assert hadamard_spread(4096).block == 128


def test_the_zigzag_deals_channels_out_there_and_back():
    sizes = torch.tensor([8.0, 7, 6, 5, 4, 3, 2, 1])
    # Three rounds would go on as the first; blocks of four: 8 5 4 1 and 7 6 3 2.
    assert zigzag(sizes, 4).tolist() == [0, 3, 4, 7, 1, 2, 5, 6]


def test_the_greedy_rotation_is_orthogonal_and_never_raises_a_peak():
    x = salient(64)
    blocks = greedy(x, 16, generator())
    torch.testing.assert_close(blocks @ blocks.mT, torch.eye(16).expand(4, -1, -1), rtol=0, atol=1e-4)
    turned = x.view(512, 4, 1, 16) @ blocks
    before, after = x.view(512, 4, 16).abs().amax((0, 2)), turned.abs().amax((0, 2, 3))
    assert bool((after <= before * 1.001).all())
    assert float(after.max()) < float(before.max()) / 2


def test_salient_inputs_are_rounded_better_when_turned():
    x = draw(512, 96)
    x[:, 5] *= 30
    spread = adaptive(seen(x), 32, generator())
    turned = transform_inputs(x, Layout("lut", 96, 3, 96, rotation=spread.rotation, block=spread.block), spread.parts)
    losses = [float((round_symmetric(one, 4, [-1]) - one).norm()) for one in (x, turned)]
    assert losses[1] < losses[0] / 1.2


def test_inputs_that_are_not_finite_are_refused():
    x = draw(8, 32)
    x[1, 1] = math.nan
    with pytest.raises(ValueError, match="NaN"):
        adaptive(seen(x), 16, generator())


def test_silent_inputs_are_harmless():
    assert adaptive(seen(torch.zeros(8, 32)), 16, generator()).rotation == "hadamard"
