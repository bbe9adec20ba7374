"""Model Breadcrumbs: of every update the smallest entries and the very largest are dropped, the rest is summed."""

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


class BreadcrumbsParams(EntryParams):
    """The choices of methods that look at entries, and how many outliers there are."""

    outliers: float = Field(
        0.01, ge=0, lt=1, description="The share of entries, the largest, that is dropped, if density leaves room."
    )


class Breadcrumbs:
    """Take out of every model's changes what is too small to matter and too large to trust, then add them."""

    name: ClassVar[str] = "breadcrumbs"
    kind: ClassVar[Kind] = Kind.MERGER
    api: ClassVar[int] = API
    summary: ClassVar[str] = "Drops each model's smallest changes and its outliers, and sums the rest."
    paper: ClassVar[str] = "Davari & Belilovsky, Model Breadcrumbs (ECCV 2024)"
    Params: ClassVar[type[Params]] = BreadcrumbsParams

    def run(self, context: Context, params: BreadcrumbsParams) -> Result:
        """Write the merged model; the report is that of `sum`.

        Raises:
            UsageError: the models do not belong together, or the weights do not fit.
            DataError: a file is broken; the message names the tensor.
        """
        from modelgrove_kernels.task_vectors import trim

        def rule(_: Parts, updates: Sequence[Tensor]) -> list[Tensor]:
            return [trim(update, params.density, params.outliers) for update in updates]

        return merge(context, by_entries(self.name, rule, params), params)
