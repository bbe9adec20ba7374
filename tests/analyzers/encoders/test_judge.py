import numpy as np
import pytest
import torch

from modelgrove_analyzers.encoders.judge import LOSS, LOSSES, Judge, Placed, Trial
from modelgrove_hub.search.background import Background

TEXTS = torch.eye(6)
BACKGROUND = Background(np.concatenate([np.eye(6), -np.eye(6)]).astype(np.float32), "test")


def placed(*rows):
    """Models of the given labels, each at (shares of) the texts."""
    vectors = torch.tensor([list(shares) for _, shares in rows], dtype=torch.float32)
    return Placed(vectors / vectors.norm(dim=1, keepdim=True), [label for label, _ in rows])


def at(label):
    return label, [float(i == label) for i in range(6)]


def test_a_loss_is_chosen_with_which_known_and_unknown_labels_are_both_found():
    known = placed(*(at(label) for label in range(5)))
    # What it is comes second to a known relative.
    unknown = placed((5, [1, 0.5, 0, 0, 0, 0.8]))
    judge = Judge(TEXTS, known, [Trial(known, unknown)], BACKGROUND, {})
    assert judge.loss in LOSSES
    assert judge.metrics()["top1_known"] == judge.metrics()["top1_unknown"] == 1
    assert judge.score == 1


def test_no_loss_is_taken_when_nothing_needs_it():
    known = placed(*(at(label) for label in range(5)))
    judge = Judge(TEXTS, known, [Trial(known, placed(at(5)))], BACKGROUND, {})
    assert judge.loss == 0


def test_without_trials_only_known_labels_are_judged():
    known = placed(at(0), at(1), (2, [1, 0, 0.2, 0, 0, 0]))
    judge = Judge(TEXTS, known, (), BACKGROUND, {"epoch": 3})
    metrics = judge.metrics()
    assert judge.loss == LOSS
    assert "top1_unknown" not in metrics
    assert metrics["epoch"] == 3
    assert metrics["top1_known"] == pytest.approx(0.667)
