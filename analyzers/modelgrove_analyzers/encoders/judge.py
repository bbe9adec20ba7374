"""How good an encoder is, from where it puts models that it was not fitted on."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

    from modelgrove_hub.search.background import Background


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
        return float((1 / self._ranks(self.known)).mean() + (1 / self._ranks(self.unknown)).mean()) / 2

    @cached_property
    def threshold(self) -> float:
        """The score that best tells what is here from what is not, both kinds of error weighing the same.

        Here is the best model of a label, not here are background prompts: some of these fit a
        model, but they are few.
        """
        import torch

        here, absent = self._best_scores()
        candidates = torch.cat([here, absent]).sort().values
        errors = (here < candidates[:, None]).double().mean(1) + (absent >= candidates[:, None]).double().mean(1)
        return round(float(candidates[errors.argmin()]), 3)

    def metrics(self) -> dict[str, float]:
        """Top-1 accuracies among all labels, and how often the threshold misses a label or lets a prompt pass."""
        here, absent = self._best_scores()
        shares = {
            "top1_known": self._ranks(self.known) == 1,
            "top1_unknown": self._ranks(self.unknown) == 1,
            "missed": here < self.threshold,
            "false_alarms": absent >= self.threshold,
        }
        measured = {name: round(float(share.double().mean()), 3) for name, share in shares.items()}
        return {"labels": len(self._texts), "regulariser": self.setting, **measured}

    def _ranks(self, predictions: Tensor) -> Tensor:
        """Places (n,) of the models' own labels among all labels, by margins; a tie is a loss."""
        import torch

        texts, background = self._texts.numpy(), self._background
        margins = torch.from_numpy(background.margins(predictions.numpy(), texts, self.known.numpy()))
        return (margins >= margins[self._own][:, None]).sum(1)

    def _best_scores(self) -> tuple[Tensor, Tensor]:
        """The best score of each label's own models, and of all models for each background prompt."""
        import torch

        known, background = self.known.numpy(), self._background
        here = torch.from_numpy(background.scores(known, self._texts.numpy()))
        absent = torch.from_numpy(background.scores(known, background.centre(background.vectors)))
        return here.masked_fill(~self._own, -torch.inf).max(0).values, absent.max(0).values
