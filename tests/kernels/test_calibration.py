"""Captured inputs are those that the layer's matrix multiplies."""

import pytest
import torch
from torch import nn

from modelgrove_kernels.calibration import SAMPLED, LayerInputs, captured, columns_of, output_error, rows_of


def draw(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("options", [{}, {"stride": 2, "padding": 1}, {"padding": (2, 1), "dilation": 2}])
def test_a_convolution_is_its_packed_matrix_on_the_rows(options):
    layer, x = nn.Conv2d(5, 7, (3, 2), bias=False, **options).requires_grad_(False), draw(2, 5, 8, 9)
    matrix = layer.weight.permute(0, 2, 3, 1).reshape(7, -1)
    wanted = layer(x)
    found = (rows_of(layer, x) @ matrix.T).view(2, *wanted.shape[2:], 7).permute(0, 3, 1, 2)
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)


def test_all_calls_add_up():
    network = nn.Sequential(nn.Linear(6, 5), nn.Linear(5, 4)).requires_grad_(False)
    first, second = draw(3, 6), draw(2, 4, 6, seed=1)
    with captured(network, ["0", "1"]) as found:
        network(first)
        network(second)
    network(first)
    rows = torch.cat([first, second.flatten(0, 1)])
    torch.testing.assert_close(found["0"].gram, rows.T @ rows)
    assert torch.equal(found["0"].absmax, rows.abs().amax(0))
    assert found["0"].count == found["1"].count == 11
    torch.testing.assert_close(found["1"].absmax, network[0](rows).abs().amax(0))


def test_pictures_are_cut_up_one_at_a_time(monkeypatch):
    layer, x, sizes = nn.Conv2d(3, 4, 3, padding=1).requires_grad_(False), draw(5, 3, 6, 7), []

    def cut(module, inputs):
        sizes.append(len(inputs))
        return rows_of(module, inputs)

    monkeypatch.setattr("modelgrove_kernels.calibration.rows_of", cut)
    network = nn.Sequential(layer)
    with captured(network, ["0"]) as found:
        network(x)
    rows = rows_of(layer, x)
    assert sizes == [1] * 5
    assert found["0"].count == len(rows)
    torch.testing.assert_close(found["0"].gram, rows.T @ rows)
    assert torch.equal(found["0"].absmax, rows.abs().amax(0))


def test_what_cannot_be_captured_is_left_out():
    network = nn.Sequential(nn.Conv2d(4, 4, 3, groups=2), nn.Conv2d(4, 4, 3, padding="same"), nn.GroupNorm(2, 4))
    assert [columns_of(layer) for layer in network] == [None, None, None]
    with captured(network, ["0", "1", "2"]) as found:
        network(draw(1, 4, 6, 6))
    assert found == {}
    assert not any(layer._forward_pre_hooks for layer in network)


def test_the_output_error_is_that_of_the_outputs():
    weight, difference, x = draw(6, 9), draw(6, 9, seed=1) / 10, draw(50, 9, seed=2)
    wanted = ((x @ difference.T).norm() / (x @ weight.T).norm()) ** 2
    assert output_error(difference, weight, x.T @ x) == pytest.approx(float(wanted), rel=1e-4)
    assert output_error(difference, torch.zeros(6, 9), x.T @ x) == 0


def test_few_inputs_are_all_kept_with_their_timesteps():
    seen = LayerInputs.none(3)
    rows = draw(9, 3)
    seen.add(rows[:4], 900.0)
    seen.add(rows[4:], 100.0)
    order = torch.tensor([int((rows == row).all(1).nonzero()) for row in seen.sample])
    assert sorted(order.tolist()) == list(range(9))
    assert torch.equal(seen.times, torch.where(order < 4, 900.0, 100.0))


def test_of_many_inputs_the_sample_is_even():
    """10,000 inputs in calls of unequal size: each tenth of them has a tenth of the sample, within six deviations."""
    seen, rows = LayerInputs.none(1), torch.arange(10_000.0).unsqueeze(1)
    for start, end in ((0, 500), (500, 501), (501, 9000), (9000, 10_000)):
        seen.add(rows[start:end], float(start))
    assert len(seen.sample) == len(seen.times) == SAMPLED
    assert len(seen.sample.unique()) == SAMPLED
    counts = torch.histc(seen.sample, 10, 0, 10_000)
    assert float((counts - SAMPLED / 10).abs().max()) < 6 * (SAMPLED / 10) ** 0.5
