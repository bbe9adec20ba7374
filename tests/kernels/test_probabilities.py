"""Probabilities on powers of two against arithmetic one by one."""

import math

import pytest
import torch

from modelgrove_kernels.probabilities import round_log2, round_probabilities


def one_by_one(value, bits, delta):
    if not value:
        return delta * 2.0 ** -(2**bits - 1)
    return delta * 2.0 ** -min(max(round(-math.log2(value / delta)), 0), 2**bits - 1)


@pytest.mark.parametrize("bits", [2, 4, 6])
def test_values_are_the_nearest_power_of_two_of_the_largest(bits):
    values = torch.rand(200, generator=torch.Generator().manual_seed(0)) ** 8
    values[:2] = torch.tensor([0.0, 1e-30])
    delta = float(values.max())
    found = round_log2(values, bits, values.max())
    wanted = torch.tensor([one_by_one(float(value), bits, delta) for value in values])
    assert torch.allclose(found, wanted, rtol=1e-6, atol=0)
    assert float(found.max()) == delta


def test_nothing_at_all_stays_nothing():
    assert round_log2(torch.zeros(3), 4, torch.tensor(0.0)).tolist() == [0, 0, 0]


def test_each_sample_has_its_own_scale_and_the_first_key_is_left_alone():
    exact = torch.softmax(
        3 * torch.randn(6, 5, 4, generator=torch.Generator().manual_seed(0)), -1
    )  # 2 samples, 3 heads
    found = round_probabilities(exact, 4, heads=3, start=True)
    assert torch.equal(found[..., 0], exact[..., 0])
    for sample in (slice(0, 3), slice(3, 6)):
        delta = float(exact[sample, :, 1:].max())
        wanted = [one_by_one(float(value), 4, delta) for value in exact[sample, :, 1:].flatten()]
        assert torch.allclose(found[sample, :, 1:].flatten(), torch.tensor(wanted), rtol=1e-6, atol=0)
    whole = round_probabilities(exact, 4, heads=3, start=False)
    assert not torch.equal(whole[..., 0], exact[..., 0])


def test_a_single_token_apart_leaves_nothing_to_round():
    exact = torch.ones(2, 3, 1)
    assert torch.equal(round_probabilities(exact, 4, heads=1, start=True), exact)
