import numpy as np
import pytest

from modelgrove_hub.search.levels import centred, level_of, levelled
from modelgrove_hub.tables import Expert


def rows(vectors):
    return [vector.astype("<f4").tobytes() for vector in vectors]


def test_a_level_is_the_mean_and_the_deviation_of_the_best_scores_for_the_prompts(background):
    vectors = np.random.default_rng(1).normal(size=(5, 8)).astype(np.float32)
    prompts = background.vectors - background.vectors.mean(axis=0)
    best = []
    for prompt in prompts:
        scores = [vector @ prompt / np.std([vector @ other for other in prompts]) for vector in vectors]
        best.append(max(scores))
    level = level_of(background, rows(vectors))["level"]
    # Kept with four digits.
    assert level == pytest.approx({"mean": np.mean(best), "spread": np.std(best)}, abs=2e-4)


def test_more_models_reach_higher_by_chance_and_levels_take_that_off(background):
    noise = np.random.default_rng(2)
    few, many = (noise.normal(size=(count, 8)).astype(np.float32) for count in (3, 300))
    experts = [Expert(calibration=level_of(background, rows(own))) for own in (few, many)]
    queries = noise.normal(size=(400, 8)).astype(np.float32)
    raw = [background.scores(own, queries).max(axis=0) for own in (few, many)]
    assert (raw[1] > raw[0]).mean() > 0.9
    fair = [levelled(best, expert) for best, expert in zip(raw, experts, strict=True)]
    # Unrelated queries of the same length: neither may win nearly always.
    assert 0.25 < (fair[1] > fair[0]).mean() < 0.75


def test_one_model_has_no_level_and_scores_without_one_stay(background):
    assert level_of(background, rows(np.ones((1, 8)))) == {}
    assert levelled(3.5, Expert(calibration={})) == 3.5
    assert levelled(3.5, None) == 3.5


def test_what_the_vectors_of_one_expert_share_is_no_likeness(background):
    noise = np.random.default_rng(3)
    lean = np.array([3.0, *[0.0] * 7], np.float32)
    vectors = noise.normal(size=(40, 8)).astype(np.float32) + lean
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    expert = Expert(calibration=level_of(background, rows(vectors)))
    without = np.stack([centred(vector, expert) for vector in vectors])
    np.testing.assert_allclose(np.linalg.norm(without, axis=1), 1, atol=1e-5)  # float32
    others = ~np.eye(40, dtype=bool)
    assert (vectors @ vectors.T)[others].mean() > 0.4
    assert abs((without @ without.T)[others].mean()) < 0.1
    few = Expert(calibration=level_of(background, rows(vectors[:3])))
    np.testing.assert_array_equal(centred(vectors[0], few), vectors[0])
