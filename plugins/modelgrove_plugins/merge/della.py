"""DELLA: as DARE drops entries at random, but small ones more often; then signs are elected and averaged as in TIES.

Within each row (an output of the layer; in the core a direction of outputs) the probability of being dropped falls
evenly with the rank of the magnitude, from 1 − density + epsilon/2 to 1 − density − epsilon/2, and what remains is
divided by its own probability of staying (MagPrune). The paper's factor λ of the result is that of the weights.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, ClassVar, Self

from pydantic import Field, model_validator

from modelgrove_hub.contracts import API, Context, Kind, Params, Result
from modelgrove_plugins.merge.entries import EntryParams, by_entries
from modelgrove_plugins.merge.merging import merge
from modelgrove_plugins.merge.methods import Parts

if TYPE_CHECKING:
    from torch import Tensor


class DellaParams(EntryParams):
    """The choices of methods that look at entries, and how much magnitude counts."""

    epsilon: float = Field(
        0.2, ge=0, lt=1, description="How much more likely the largest entry stays than the smallest."
    )

    @model_validator(mode="after")
    def _probabilities(self) -> Self:
        if not (self.density - self.epsilon / 2 > 0 and self.density + self.epsilon / 2 <= 1):
            found = f"{self.density} ± {self.epsilon / 2}"
            raise ValueError(
                f"density ± epsilon/2 are probabilities: {found} is not in (0, 1], but is with a smaller epsilon"
            )
        return self


class Della:
    """Thin out every model's changes at random, the small ones more, and let the rest settle signs."""

    name: ClassVar[str] = "della"
    kind: ClassVar[Kind] = Kind.MERGER
    api: ClassVar[int] = API
    summary: ClassVar[str] = "Drops changes at random, small ones more often, and elects signs among the others."
    paper: ClassVar[str] = "Deep et al., DELLA-Merging (arXiv 2406.11617, 2024)"
    Params: ClassVar[type[Params]] = DellaParams

    def run(self, context: Context, params: DellaParams) -> Result:
        """Write the merged model; the report is that of `sum`.

        Raises:
            UsageError: the models do not belong together, or the weights do not fit.
            DataError: a file is broken; the message names the tensor.
        """
        from modelgrove_kernels.task_vectors import drop, elected_mean, keep_by_rank

        def rule(parts: Parts, updates: Sequence[Tensor]) -> Tensor:
            generator = parts.generator()
            thinned = [
                drop(update, keep_by_rank(update, params.density, params.epsilon), generator) for update in updates
            ]
            return elected_mean(thinned, parts.weights)

        return merge(context, by_entries(self.name, rule, params), params)
