"""Model Stock: fine-tunes of one base on one task, averaged and moved towards the base by how much they disagree.

t = N·cos θ / (1 + (N−1)·cos θ), θ the mean angle between updates of a module: what they have in common is taken for the
task, the rest for noise of training. Unrelated updates have cos θ ≈ 0 and cancel nearly; the report warns of it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from modelgrove_hub.contracts import API, Context, Kind, Params, Result
from modelgrove_plugins.merge.merging import merge
from modelgrove_plugins.merge.methods import Method, Parts
from modelgrove_plugins.merge.params import MergeParams

if TYPE_CHECKING:
    from torch import Tensor


class ModelStock:
    """Average fine-tunes of the same thing, as far as they agree."""

    name: ClassVar[str] = "model-stock"
    kind: ClassVar[Kind] = Kind.MERGER
    api: ClassVar[int] = API
    summary: ClassVar[str] = "Averages models that learned the same, and keeps of each module what they agree on."
    paper: ClassVar[str] = "Jang et al., Model Stock (ECCV 2024)"
    Params: ClassVar[type[Params]] = MergeParams

    def run(self, context: Context, params: MergeParams) -> Result:
        """Write the merged model; the report is that of `sum`, and says what is left of each.

        Raises:
            UsageError: the models do not belong together, or the weights do not fit.
            DataError: a file is broken; the message names the tensor.
        """
        return merge(context, Method(self.name, _rule), params)


def _rule(parts: Parts) -> list[Tensor]:
    from modelgrove_kernels.task_vectors import stock_ratio

    pairs = zip(parts.weights, parts.updates, strict=True)
    scaled = [weight * update for weight, update in pairs]
    # A model that leaves the module alone says nothing about it, as an adapter that has no such module.
    present = [update for update in scaled if bool(update.any())]
    share = stock_ratio(present) / max(1, len(present))
    return [share * update for update in parts.updates]
