"""How good an encoder is, from where it puts models that it was not fitted on."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

    from modelgrove_hub.search.background import Background

NEIGHBOURS = 10
PASSED = 0.9


class Judge:
    """Predictions for n training models and what they say about one setting of an encoder.

    `known` (n, d) are predictions without the model itself, so others may still know its label;
    `unknown` (n, d) without all models of its label. `names` (n,) are numbers of labels from 0, `labels`
    (n, d) their vectors. Each model is asked among all labels (generalised zero-shot), as in a real
    search box.
    """

    def __init__(
        self,
        known: Tensor,
        unknown: Tensor,
        labels: Tensor,
        names: Sequence[int],
        background: Background,
        setting: float,
    ) -> None:
        import torch

        self.known, self.unknown, self.setting = known, unknown, setting
        self._background = background
        self._texts = labels[[names.index(name) for name in range(max(names) + 1)]]
        self._own = torch.nn.functional.one_hot(torch.tensor(names)).bool()

    @cached_property
    def score(self) -> float:
        """Mean reciprocal rank of a model's label, known and unknown labels counting the same."""
        known, unknown = self._ranks()
        return float((1 / known).mean() + (1 / unknown).mean()) / 2

    @cached_property
    def threshold(self) -> float:
        """The score that nine in ten background prompts do not reach with any model."""
        return round(float(self._best_for_prompts().quantile(PASSED)), 3)

    def metrics(self) -> dict[str, float]:
        """How often a model's label is its first (of five) guesses, and how often the threshold misses a label."""
        known, unknown = self._ranks()
        own = self._scores(self.known).masked_fill(~self._own, -float("inf"))
        shares = {
            "top1_known": known == 1,
            "top1_unknown": unknown == 1,
            "top5_unknown": unknown <= 5,
            "missed": own.max(0).values < self.threshold,
        }
        measured = {name: round(float(share.double().mean()), 3) for name, share in shares.items()}
        return {"labels": len(self._texts), "regulariser": self.setting, **measured}

    def _ranks(self) -> tuple[Tensor, Tensor]:
        """Places (n,) of the models' own labels among all labels, known and unknown, by margins; a tie is a loss."""
        known, unknown = self._scores(self.known), self._scores(self.unknown)
        usual = usual_scores(known)
        # Where a label is unknown, the models that have it do not answer to it.
        strange = unknown - usual
        strange[self._own] = (unknown - usual_scores(known.masked_fill(self._own, -float("inf"))))[self._own]
        return _places(known - usual, self._own), _places(strange, self._own)

    def _scores(self, predictions: Tensor) -> Tensor:
        import torch

        return torch.from_numpy(self._background.scores(predictions.numpy(), self._texts.numpy()))

    def _best_for_prompts(self) -> Tensor:
        import torch

        prompts = self._background.centre(self._background.vectors)
        return torch.from_numpy(self._background.scores(self.known.numpy(), prompts)).max(0).values


def usual_scores(scores: Tensor) -> Tensor:
    """For each text (a column of (n, texts)) the mean of its ten highest scores: what it gets anyway.

    Taken off, it makes texts comparable: an expert answers more loudly to words it was fitted on
    (CSLS; Conneau et al., ICLR 2018, arXiv 1710.04087, eq. 6). Minus infinity is left out.
    """
    import torch

    highest = scores.topk(min(NEIGHBOURS, len(scores)), dim=0).values
    return torch.where(highest.isfinite(), highest, torch.nan).nanmean(0)


def _places(margins: Tensor, own: Tensor) -> Tensor:
    return (margins >= margins[own][:, None]).sum(1)
