import itertools

import numpy as np
import pytest
import torch

from modelgrove_analyzers.encoders.classes import Classes, ClassJudge, find_classes
from modelgrove_analyzers.encoders.training import unit
from modelgrove_hub.search.text import embed_texts

NAMES = ("six", "seven", "eight", "nine")


@pytest.fixture
def classes(background):
    texts = unit(torch.from_numpy(background.centre(embed_texts(NAMES))))
    carried = torch.tensor([[float(c in pair) for c in range(4)] for pair in itertools.combinations(range(4), 2)])
    return Classes(texts, carried)


def test_a_placed_model_has_its_logits_as_products_with_the_texts(classes):
    logits = torch.randn(5, 4, generator=torch.Generator().manual_seed(0))
    vectors = classes.place(logits)
    found = vectors @ classes.texts.T
    # Names of numbers are alike, so a pseudo-inverse in float32 loses two digits.
    torch.testing.assert_close(unit(found), unit(logits), atol=1e-4, rtol=1e-3)
    torch.testing.assert_close(vectors.norm(dim=1), torch.ones(5))


def test_labels_tell_what_is_carried(classes):
    assert ((classes.labels @ classes.texts.T > 0) == (classes.carried > 0)).all()


def test_names_that_mean_the_same_do_no_harm(background):
    texts = unit(torch.from_numpy(background.centre(embed_texts(["seven", "Seven", "a violin"]))))
    vectors = Classes(texts, torch.zeros(1, 3)).place(torch.tensor([[1.0, 1.1, -1.0]]))
    found = vectors @ texts.T
    assert found[0, :2].min() > 0.1 > -0.1 > found[0, 2]


def test_tags_in_many_combinations_are_classes(background):
    tags = [("zoo", "pictures", *pair) for pair in itertools.combinations(NAMES, 2)]
    classes, rows = find_classes([*tags, ("pictures", "Six", "a tag of one"), ("pictures",), ()], background)
    assert rows == [*range(8)]
    assert classes.carried.sum(0).tolist() == [8, 3, 4, 3, 3]


def test_tags_that_tell_one_thing_each_are_no_classes(background):
    assert find_classes([(name, "pictures") for name in NAMES for _ in range(3)], background) is None
    assert find_classes([("guitar", "music"), ("violin", "music"), ("cat", "animals")] * 4, background) is None


def test_the_judge_counts_right_decisions_and_finds_a_threshold(classes, background):
    noise = torch.randn(classes.labels.shape, generator=torch.Generator().manual_seed(0))
    vectors = unit(classes.labels + 0.01 * noise)
    perfect = ClassJudge(classes, classes.carried, vectors, background, {"epoch": 3})
    assert perfect.score == 1
    assert perfect.metrics()["class_accuracy"] == 1
    assert perfect.metrics()["missed"] <= 0.25
    assert perfect.metrics()["epoch"] == 3
    scores = background.scores(vectors.numpy(), classes.texts.numpy())
    best = np.where(classes.carried.numpy() > 0, scores, -np.inf).max(0)
    assert (best >= perfect.threshold).mean() == 1 - perfect.metrics()["missed"]
    vectors[0] = -vectors[0]
    assert ClassJudge(classes, classes.carried, vectors, background, {}).score == pytest.approx(1 - 4 / 24)
