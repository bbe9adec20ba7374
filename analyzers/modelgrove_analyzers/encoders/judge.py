"""How good an encoder is, from where it puts models that it was not fitted on."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray
    from torch import Tensor

    from modelgrove_hub.search.background import Background

LOSSES = (0.0, 0.5, 1.0, 1.5, 2.0, 2.5, 3.0)
"""What the score with a known label may lose against other texts, in standard deviations (decision 0006)."""
LOSS = 2.0
"""What it loses where no trials tell better."""


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


class _Asked(NamedTuple):
    """Margins (n, labels) of models, the numbers (n,) of their own labels, and which labels (labels,) are known."""

    margins: NDArray[np.float32]
    own: NDArray[np.int64]
    seen: NDArray[np.bool_]


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
        return self._score(self.loss)

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
        shares = {"top1_known": self._ranks(self._known, self.loss) == 1}
        if self._unknown:
            shares["top1_unknown"] = self._ranks(self._unknown, self.loss) == 1
        shares |= {"missed": here < self.threshold, "false_alarms": absent >= self.threshold}
        measured = {name: round(float(share.double().mean()), 3) for name, share in shares.items()}
        return {"labels": len(self._texts), **self.setting, "loss": self.loss, **measured}

    @cached_property
    def loss(self) -> float:
        """What known labels lose against other texts: with the best score in the trials."""
        return max(LOSSES, key=self._score) if self._trials else LOSS

    def _score(self, loss: float) -> float:
        ranks = (self._ranks(asked, loss) for asked in (self._known, self._unknown) if asked)
        means = [float((1 / found).mean()) for found in ranks]
        return sum(means) / len(means)

    @cached_property
    def _known(self) -> list[_Asked]:
        if not self._trials:
            return [self._ask(self.known, self.known, range(len(self._texts)))]
        return [self._ask(trial.known, trial.known, trial.known.labels) for trial in self._trials]

    @cached_property
    def _unknown(self) -> list[_Asked]:
        return [self._ask(trial.unknown, trial.known, trial.known.labels) for trial in self._trials]

    def _ask(self, placed: Placed, known: Placed, labels: Sequence[int]) -> _Asked:
        import numpy as np

        vectors, others = placed.vectors.numpy(), known.vectors.numpy()
        margins = self._background.margins(vectors, self._texts, others)
        return _Asked(margins, np.array(placed.labels), np.isin(np.arange(len(self._texts)), labels))

    def _ranks(self, asked: Sequence[_Asked], loss: float) -> Tensor:
        """Places (n,) of the models' own labels among all labels; a tie is a loss."""
        import numpy as np
        import torch

        found = []
        for margins, own, seen in asked:
            lessened = margins - loss * seen
            found.append((lessened >= np.take_along_axis(lessened, own[:, None], axis=1)).sum(axis=1))
        return torch.from_numpy(np.concatenate(found))

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
