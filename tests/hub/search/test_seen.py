import numpy as np

from modelgrove_hub.search.background import Background
from modelgrove_hub.search.seen import NEAR, SAME, SHARE, ranking_keys


def unit(rows):
    return (rows / np.linalg.norm(rows, axis=-1, keepdims=True)).astype(np.float32)


def test_a_model_that_nothing_known_explains_comes_before_a_known_relative():
    # Prompts in all directions alike, so that a z-score is a cosine times the same number for all.
    background = Background(np.concatenate([np.eye(3), -np.eye(3)]).astype(np.float32), "test")
    guitar, drum, violin = unit(np.array([[1, 0, 0], [0, 1, 0], [0.59, 0, 0.81]]))
    # The known model lies on its label; the new one between labels, with a part of what is its own.
    vectors = unit(np.array([[1, 0, 0], [0.6, 0.7, 0.2]]))
    labels = np.stack([guitar, drum])
    assert background.scores(vectors, violin[None])[:, 0].argmax() == 0
    assert ranking_keys(background, vectors, violin[None], labels).argmax() == 1
    # A search for the label itself still finds its model.
    assert ranking_keys(background, vectors, guitar[None], labels).argmax() == 0


def test_a_search_for_a_known_label_is_left_as_it_is(background):
    dice = np.random.default_rng(5)
    vectors, labels = (dice.normal(size=(n, 8)).astype(np.float32) for n in (40, 5))
    said = unit(unit(labels[:1]) + 0.3 * unit(dice.normal(size=(1, 8))))  # a paraphrase
    assert (said @ unit(labels[:1]).T).item() > SAME
    np.testing.assert_array_equal(ranking_keys(background, vectors, said, labels), background.scores(vectors, said))


def test_models_far_from_the_query_stay_behind_in_their_order(background):
    dice = np.random.default_rng(2)
    vectors, queries, labels = (dice.normal(size=(n, 8)).astype(np.float32) for n in (40, 3, 5))
    scores, keys = background.scores(vectors, queries), ranking_keys(background, vectors, queries, labels)
    for column in range(3):
        near = scores[:, column] >= NEAR * scores[:, column].max()
        assert 1 < near.sum() < 40
        assert keys[near, column].min() > keys[~near, column].max()
        np.testing.assert_array_equal(keys[~near, column], scores[~near, column])
        expected = scores[near, column] - SHARE * background.scores(vectors[near], labels).max(1)
        np.testing.assert_array_equal(keys[near, column].argsort(), expected.argsort())


def test_models_that_all_lack_what_is_asked_keep_their_order(background):
    vectors = unit(np.random.default_rng(4).normal(size=(9, 8)))
    query = -unit(vectors.mean(0))
    far = vectors[background.scores(vectors, query[None])[:, 0] < 0]
    np.testing.assert_array_equal(
        ranking_keys(background, far, query[None], vectors), background.scores(far, query[None])
    )
