"""TIES: trim every update to its largest entries, elect a sign for each entry, average those that agree.

Strengths stay strengths: twice the weights is twice the result, and a model whose weight goes to zero fades out
(kernels/task_vectors.py, `elected_mean`). For equal weights that is the paper's mean and peft's; mergekit's weighted
mean, which ignores a common factor of the weights, times that factor.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, ClassVar

from pydantic import Field

from modelgrove_hub.contracts import API, Context, Kind, Params, Result
from modelgrove_plugins.merge.entries import SPACE, EntryParams, Space, by_entries
from modelgrove_plugins.merge.merging import merge
from modelgrove_plugins.merge.methods import Parts

if TYPE_CHECKING:
    from torch import Tensor


class TiesParams(EntryParams):
    """The choices of methods that look at entries, with the paper's density."""

    density: float = Field(
        0.2, gt=0, le=1, description="The share of entries, the largest, that is kept of each model."
    )
    space: Space = Field("core", description=SPACE)


class Ties:
    """Let models settle entry by entry who is heard."""

    name: ClassVar[str] = "ties"
    kind: ClassVar[Kind] = Kind.MERGER
    api: ClassVar[int] = API
    summary: ClassVar[str] = "Keeps each model's largest changes, and where they disagree only one sign."
    paper: ClassVar[str] = (
        "Yadav et al., TIES-Merging (NeurIPS 2023); core: Panariello et al., Core Space (NeurIPS 2025)"
    )
    Params: ClassVar[type[Params]] = TiesParams

    def run(self, context: Context, params: TiesParams) -> Result:
        """Write the merged model; the report is that of `sum`.

        Raises:
            UsageError: the models do not belong together, or the weights do not fit.
            DataError: a file is broken; the message names the tensor.
        """
        from modelgrove_kernels.task_vectors import elected_mean, trim

        def rule(parts: Parts, updates: Sequence[Tensor]) -> Tensor:
            return elected_mean([trim(update, params.density) for update in updates], parts.weights)

        return merge(context, by_entries(self.name, rule, params), params)
