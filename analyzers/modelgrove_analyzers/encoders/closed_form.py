"""Kernel ridge from models to label vectors, and which layer says most: nothing is trained here."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from modelgrove_analyzers.encoders.classes import ClassJudge
from modelgrove_analyzers.encoders.grams import crossed, roots
from modelgrove_analyzers.encoders.judge import Judge, Placed, Trial
from modelgrove_analyzers.encoders.training import group_alike, unit

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

    from modelgrove_analyzers.encoders.lesson import Lesson

COPY = 0.999
"""Kernel cosine from which on two models count as copies of each other."""
REGULARISERS = tuple(10.0**k for k in range(-4, 2))
SHARES = (0.5, 1.0, 2.0)
FOLDS = 5


class Said(NamedTuple):
    """Vectors (n, d) of length one for n models by other means, and how much they count beside ridge."""

    vectors: Tensor
    share: float

    def rows(self, chosen: Tensor) -> Said:
        """What was said of some of the models."""
        return Said(self.vectors[chosen], self.share)


class Dual(NamedTuple):
    """Ridge over a kernel of n models."""

    coefficients: Tensor
    """(n, d): a model's vector is its kernel values with the n models times this."""
    places: Tensor
    """(n, d): where each of the models is put by those that are no copies of it."""
    share: float
    """With which what was said of a model by other means is added to its vector, see `blended`."""


def fit_dual(kernel: Tensor, lesson: Lesson, said: Tensor | None = None) -> tuple[Dual, Judge | ClassJudge]:
    """Ridge over a kernel (n, n) with a diagonal near one, and how good it is.

    Of the regularisers that one is taken with which left-out models find their label best among all:
    models left out alone (closed form), and folds of labels left out with all their models. In the same
    way is chosen how much `said` (n, d) counts: where labels had no part in saying where the models belong.
    """
    trying = [_judge(kernel, lesson, regulariser, FOLDS) for regulariser in REGULARISERS]
    best = max(trying, key=lambda judge: judge.score)
    regulariser = best.setting["regulariser"]
    if said is not None:
        with_said = [_judge(kernel, lesson, regulariser, FOLDS, Said(said, share)) for share in SHARES]
        best = max([best, *with_said], key=lambda judge: judge.score)
    return Dual(*_fit(kernel, lesson.labels, regulariser), best.setting.get("share", 0.0)), best


def blended(vectors: Tensor, said: Said) -> Tensor:
    """Vectors (n, d) of length one with a share of what was said, again of length one."""
    return unit(vectors + said.share * said.vectors)


def best_layer(lesson: Lesson, regulariser: float = 0.1) -> str:
    """The layer by which alone models that are left out find their labels best.

    The papers train an expert for each layer and keep the best on validation models; ridge takes a
    hundredth of the time for a layer.
    """

    def score(layer: str) -> float:
        root = roots(lesson.updates[layer])
        return _judge(crossed(root, root), lesson, regulariser, folds=0).score

    return max(lesson.updates, key=score)


def _judge(
    kernel: Tensor, lesson: Lesson, regulariser: float, folds: int, said: Said | None = None
) -> Judge | ClassJudge:
    _, placed = _fit(kernel, lesson.labels, regulariser)
    known = Placed(blended(placed, said) if said else placed, lesson.names)
    setting = {"regulariser": regulariser} | ({"share": said.share} if said else {})
    if lesson.classes is not None:
        return ClassJudge(lesson.classes, lesson.classes.carried, known.vectors, lesson.background, setting)
    trials = [_trial(kernel, lesson, regulariser, left_out, said) for left_out in _label_folds(lesson, folds)]
    return Judge(lesson.texts, known, trials, lesson.background, setting)


def _label_folds(lesson: Lesson, folds: int) -> list[Tensor]:
    """For each fold which models (n,) are left out: all those of some of the labels."""
    import torch

    names = torch.tensor(lesson.names)
    # Labels that follow each other may be alike, so chance decides; the same one for every setting.
    order = torch.randperm(len(lesson.texts), generator=torch.Generator().manual_seed(0))
    folds = min(folds, len(lesson.texts) // 2)
    return [torch.isin(names, order[fold::folds]) for fold in range(folds)]


def _trial(kernel: Tensor, lesson: Lesson, regulariser: float, left_out: Tensor, said: Said | None) -> Trial:
    names, kept = lesson.names, ~left_out
    dual, placed = _fit(kernel[kept][:, kept], lesson.labels[kept], regulariser)
    guessed = unit(kernel[left_out][:, kept] @ dual)
    if said:
        placed, guessed = (blended(own, said.rows(rows)) for own, rows in ((placed, kept), (guessed, left_out)))
    known, unknown = ([name for name, flag in zip(names, flags, strict=True) if flag] for flags in (kept, left_out))
    return Trial(Placed(placed, known), Placed(guessed, unknown))


def _fit(kernel: Tensor, labels: Tensor, regulariser: float) -> tuple[Tensor, Tensor]:
    """The dual (n, d), and where each model is put by those that are no copies of it, (n, d) of length one."""
    from modelgrove_kernels.ridge import fit_ridge

    ridge = fit_ridge(kernel, labels, regulariser)
    copies: Sequence[int] = group_alike(kernel, COPY)
    # The intercept says what the tree's models have in common: nothing that tells them apart.
    return ridge.dual.float(), unit(ridge.left_out(copies) - ridge.intercept).float()
