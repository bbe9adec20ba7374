"""The search alone, on functions whose best coefficients are known."""

import math

import pytest

from modelgrove_plugins.merge.evolution import AVERAGE, DECAYS, SINGLE, Evolution, balanced, starts

OPTIMUM = (-0.8, 0.5, 1.3)


def distance(coefficients):
    return sum((a - b) ** 2 for a, b in zip(coefficients, OPTIMUM, strict=True))


def search(score=distance, seed=0, budget=150, **more):
    found = Evolution(len(OPTIMUM), budget, more.get("population", 12), more.get("sigma", 0.5), seed, score)
    return found.run()


def test_coefficients_add_up_to_one():
    for candidate in search():
        assert math.fsum(candidate.coefficients) == pytest.approx(1, abs=1e-12)


@pytest.mark.parametrize("seed", range(4))
def test_a_planted_optimum_with_a_negative_coefficient_is_found(seed):
    tried = search(seed=seed)
    begun = min(candidate.score for candidate in tried if candidate.origin in (SINGLE, AVERAGE))
    best = min(tried, key=lambda candidate: candidate.score)
    assert begun > 0.9
    assert best.score < 0.01
    assert best.coefficients[0] < -0.7


def test_it_begins_with_every_state_and_with_averages():
    found = list(starts(3))
    assert [one for one, origin in found if origin == SINGLE] == [(1, 0, 0), (0, 1, 0), (0, 0, 1)]
    averages = [one for one, origin in found if origin == AVERAGE]
    assert len(averages) == len(DECAYS)
    for decay, weights in zip(DECAYS, averages, strict=True):
        assert weights[1] / weights[2] == pytest.approx(decay)
        assert weights[0] / weights[1] == pytest.approx(decay)
    assert averages[-1] == pytest.approx((1 / 3, 1 / 3, 1 / 3))


def test_the_budget_is_what_is_scored_and_all_of_it_is_kept():
    scored = []
    tried = search(lambda coefficients: scored.append(coefficients) or distance(coefficients), budget=40, population=10)
    assert [candidate.coefficients for candidate in tried] == scored
    assert len(tried) == 40
    # Ten to begin with, and three generations of ten.
    assert [candidate.generation for candidate in tried] == sorted([0, 1, 2, 3] * 10)


def test_a_seed_decides_the_search():
    assert search(seed=3) == search(seed=3)
    assert search(seed=3) != search(seed=4)


def test_balanced_is_the_nearest_on_the_plane():
    found = balanced((0.2, 0.5, 0.9))
    assert found == pytest.approx((0.0, 0.3, 0.7))
