"""Entry-wise and whole-vector merging rules against their formulas in float64."""

import math

import pytest
import torch

from modelgrove_kernels.task_vectors import drop, elected_mean, keep_by_rank, slerp, stock_ratio, trim


@pytest.fixture
def updates():
    generator = torch.Generator().manual_seed(3)
    return [torch.randn(24, 40, generator=generator) for _ in range(3)]


@pytest.mark.parametrize("density", [0.01, 0.2, 0.5, 1.0])
def test_trimming_keeps_exactly_the_largest(updates, density):
    kept = trim(updates[0], density)
    wanted = updates[0].abs().flatten().sort(descending=True).values[: int(density * 960)]
    assert torch.equal(kept[kept != 0].abs().sort(descending=True).values, wanted)


def test_equal_magnitudes_do_not_exceed_the_share():
    assert int(trim(torch.ones(4, 5), 0.3).count_nonzero()) == 6
    assert int(trim(torch.ones(1, 3), 0.1).count_nonzero()) == 1


def test_election_is_the_formula(updates):
    weights = [0.7, -0.4, 1.2]
    scaled = torch.stack([w * x.double() for w, x in zip(weights, updates, strict=True)])
    shares = torch.tensor(weights).double().abs()[:, None, None] * (scaled.sign() == scaled.sum(0).sign())
    # A few float32 roundings of values near one.
    wanted = (shares * scaled).sum(0) / shares.sum(0)
    assert torch.allclose(elected_mean(updates, weights).double(), wanted, rtol=0, atol=1e-6)


def test_dropping_keeps_the_expectation_and_repeats_with_the_seed(updates):
    ones = torch.ones(400, 500)
    found = drop(ones, 0.3, torch.Generator().manual_seed(1))
    # Six deviations of a mean of 200,000 draws.
    assert float(found.mean()) == pytest.approx(1, abs=6 * math.sqrt(0.7 / 0.3 / 200_000))
    assert torch.equal(found, drop(ones, 0.3, torch.Generator().manual_seed(1)))
    assert torch.equal(drop(updates[0], 1.0, torch.Generator()), updates[0])


def test_larger_entries_stay_more_likely(updates):
    found = keep_by_rank(updates[0], 0.5, 0.2)
    order = updates[0].abs().argsort(1)
    assert torch.allclose(found.gather(1, order), torch.linspace(0.4, 0.6, 40).expand(24, 40))


def test_slerp_and_model_stock_are_their_formulas(updates):
    a, b = updates[0].double(), updates[1].double()
    cosine = float((a * b).sum() / a.norm() / b.norm())
    angle = math.acos(cosine)
    wanted = (math.sin(0.7 * angle) * a + math.sin(0.3 * angle) * b) / math.sin(angle)
    assert torch.allclose(slerp(updates[0], updates[1], 0.3).double(), wanted, atol=1e-5)
    assert torch.allclose(slerp(updates[0], 2 * updates[0], 0.5), 1.5 * updates[0])
    shared = [updates[0] + 0.5 * x for x in updates[1:]]
    one, two = (x.double() for x in shared)
    cosine = float((one * two).sum() / one.norm() / two.norm())
    assert stock_ratio(shared) == pytest.approx(2 * cosine / (1 + cosine), abs=1e-5)
    assert stock_ratio([a, -a]) == 0


def test_values_that_are_not_finite_are_refused():
    with pytest.raises(ValueError, match="NaN"):
        trim(torch.full((2, 2), math.nan), 0.5)
