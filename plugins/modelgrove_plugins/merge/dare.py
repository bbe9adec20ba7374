"""DARE: drop entries of every update at random and divide the others by the share that was kept, then sum.

The sum is right on average, and models collide in fewer entries; what it adds is noise of √(1/density − 1) times the
update's norm. `--elect` lets the remaining entries settle their signs as TIES does.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, ClassVar

from pydantic import Field

from modelgrove_hub.contracts import API, Context, Kind, Params, Result
from modelgrove_plugins.merge.entries import EntryParams, by_entries
from modelgrove_plugins.merge.merging import merge
from modelgrove_plugins.merge.methods import Parts

if TYPE_CHECKING:
    from torch import Tensor


class DareParams(EntryParams):
    """The choices of methods that look at entries, and how the remaining ones are merged."""

    elect: bool = Field(False, description="Settle signs as TIES does, and average instead of adding.")


class Dare:
    """Thin out every model's changes at random, then add them."""

    name: ClassVar[str] = "dare"
    kind: ClassVar[Kind] = Kind.MERGER
    api: ClassVar[int] = API
    summary: ClassVar[str] = "Drops changes at random and scales up the others, then sums or elects signs."
    paper: ClassVar[str] = "Yu et al., Language Models are Super Mario (ICML 2024)"
    Params: ClassVar[type[Params]] = DareParams

    def run(self, context: Context, params: DareParams) -> Result:
        """Write the merged model; the report is that of `sum`.

        Raises:
            UsageError: the models do not belong together, or the weights do not fit.
            DataError: a file is broken; the message names the tensor.
        """
        from modelgrove_kernels.task_vectors import drop, elected_mean

        def rule(parts: Parts, updates: Sequence[Tensor]) -> Tensor | list[Tensor]:
            generator = parts.generator()
            thinned = [drop(update, params.density, generator) for update in updates]
            return elected_mean(thinned, parts.weights) if params.elect else thinned

        return merge(context, by_entries(self.name, rule, params), params)
