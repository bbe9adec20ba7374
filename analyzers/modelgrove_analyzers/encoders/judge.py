"""How good an encoder is, from where it puts models that it was not fitted on."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import TYPE_CHECKING, NamedTuple

from modelgrove_hub.search.seen import text_margins

if TYPE_CHECKING:
    from torch import Tensor

    from modelgrove_hub.search.background import Background


class Placed(NamedTuple):
    """Where an encoder puts models: `vectors` (n, d), and the numbers (n,) of their labels, from 0."""

    vectors: Tensor
    labels: Sequence[int]


class Trial(NamedTuple):
    """Where a fit that knows some of the labels puts models that it was not fitted on, of `known` and other labels.

    A model of a known label is placed without itself, so others still tell its label.
    """

    known: Placed
    unknown: Placed


class Judge:
    """Predictions for models and what they say about one setting of an encoder.

    `texts` (labels, d) are the vectors of all labels, `known` predictions by a fit that knows them all, each
    without the model itself. `trials`, where there are any, leave labels out. Each model is asked among all
    labels (generalised zero-shot), as in a real search box, with other labels left out where there are trials.
    """

    def __init__(
        self,
        texts: Tensor,
        known: Placed,
        trials: Sequence[Trial],
        background: Background,
        setting: Mapping[str, float],
    ) -> None:
        self.known, self.setting = known, setting
        self._texts, self._trials, self._background = texts.numpy(), trials, background

    @cached_property
    def score(self) -> float:
        """Mean reciprocal rank of a model's label, known and unknown labels counting the same."""
        means = [float((1 / ranks).mean()) for ranks in (self._known_ranks, self._unknown_ranks) if len(ranks)]
        return sum(means) / len(means)

    @cached_property
    def threshold(self) -> float:
        """The score that best tells what is here from what is not, both kinds of error weighing the same.

        Here is the best model of a label, not here are background prompts: some of these fit a
        model, but they are few.
        """
        import torch

        here, absent = self._best_scores
        candidates = torch.cat([here, absent]).sort().values
        errors = (here < candidates[:, None]).double().mean(1) + (absent >= candidates[:, None]).double().mean(1)
        return round(float(candidates[errors.argmin()]), 3)

    def metrics(self) -> dict[str, float]:
        """Top-1 accuracies among all labels, and how often the threshold misses a label or lets a prompt pass."""
        here, absent = self._best_scores
        shares = {"top1_known": self._known_ranks == 1}
        if self._trials:
            shares["top1_unknown"] = self._unknown_ranks == 1
        shares |= {"missed": here < self.threshold, "false_alarms": absent >= self.threshold}
        measured = {name: round(float(share.double().mean()), 3) for name, share in shares.items()}
        return {"labels": len(self._texts), **self.setting, **measured}

    @cached_property
    def _known_ranks(self) -> Tensor:
        import torch

        if not self._trials:
            return self._ranks(self.known, self.known)
        return torch.cat([self._ranks(trial.known, trial.known) for trial in self._trials])

    @cached_property
    def _unknown_ranks(self) -> Tensor:
        import torch

        return torch.cat([torch.empty(0), *(self._ranks(trial.unknown, trial.known) for trial in self._trials)])

    def _ranks(self, placed: Placed, known: Placed) -> Tensor:
        """Places (n,) of the models' own labels among all labels, by margins; a tie is a loss."""
        import numpy as np
        import torch

        seen = np.isin(np.arange(len(self._texts)), known.labels)
        vectors, others = placed.vectors.numpy(), known.vectors.numpy()
        margins = text_margins(self._background, vectors, self._texts, others, seen)
        own = np.take_along_axis(margins, np.array(placed.labels)[:, None], axis=1)
        return torch.from_numpy((margins >= own).sum(axis=1))

    @cached_property
    def _best_scores(self) -> tuple[Tensor, Tensor]:
        """The best score of each label's own models, where it has any, and of all models for each prompt."""
        import torch

        background, vectors = self._background, self.known.vectors.numpy()
        here = torch.from_numpy(background.scores(vectors, self._texts))
        absent = torch.from_numpy(background.scores(vectors, background.centre(background.vectors)))
        own = torch.nn.functional.one_hot(torch.tensor(self.known.labels), len(self._texts)).bool()
        best = here.masked_fill(~own, -torch.inf).max(0).values
        return best[best.isfinite()], absent.max(0).values
