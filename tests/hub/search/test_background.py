import numpy as np

from modelgrove_hub.search.background import load_background, prompts


def test_prompts_are_many_short_and_different():
    texts = prompts()
    assert len(texts) > 300
    assert len(set(texts)) == len(texts)
    assert max(map(len, texts)) < 80


def test_a_score_counts_standard_deviations_over_the_prompts(background):
    vectors = np.random.default_rng(1).normal(size=(3, 8)).astype(np.float32)
    query = np.random.default_rng(2).normal(size=8).astype(np.float32)
    found = background.scores(vectors, background.centre(query)[None])[:, 0]
    usual = vectors @ background.vectors.T
    expected = (vectors @ query - usual.mean(axis=1)) / usual.std(axis=1)
    # float32 sums in another order.
    np.testing.assert_allclose(found, expected, rtol=1e-4)


def test_scores_do_not_depend_on_the_length_of_a_vector(background):
    vector = np.ones((1, 8), np.float32)
    query = np.arange(8, dtype=np.float32)[None]
    np.testing.assert_allclose(background.scores(vector, query), background.scores(9 * vector, query), rtol=1e-5)


def test_a_vector_that_says_nothing_scores_nothing(background):
    assert np.isfinite(background.scores(np.zeros((1, 8), np.float32), np.ones((1, 8), np.float32))).all()


def test_a_margin_is_the_score_above_the_ten_nearest_others(background):
    others = np.random.default_rng(3).normal(size=(50, 8)).astype(np.float32)
    queries = np.random.default_rng(4).normal(size=(2, 8)).astype(np.float32)
    scores = background.scores(others, queries)
    expected = scores - [sorted(column)[-10:] for column in scores.T] @ np.full(10, 0.1)
    np.testing.assert_allclose(background.margins(others, queries, others), expected, atol=1e-5)
    assert background.margins(others[:3], queries, others[:2]).shape == (3, 2)


def test_the_background_is_made_once(tmp_path):
    first = load_background.__wrapped__(tmp_path)
    assert len(first.vectors) == len(prompts())
    (file,) = tmp_path.glob("background-*.npy")
    assert first.digest in file.name
