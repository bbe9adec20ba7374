"""TSV-M: every update's leading singular directions, made orthonormal all together, with their singular values.

The directions of all updates are stacked and replaced by the nearest orthonormal set (Löwdin, the polar factor), on
both sides; energy stays, directions move. Where all do not fit, each of N updates of an (m, n) layer keeps
min(m, n) // N directions. Exact in the core of low-rank adapters.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from modelgrove_hub.contracts import API, Context, Kind, Params, Result
from modelgrove_plugins.merge.merging import merge
from modelgrove_plugins.merge.methods import Method, Parts
from modelgrove_plugins.merge.params import MergeParams

if TYPE_CHECKING:
    from torch import Tensor


class Tsv:
    """Make all singular directions orthonormal, then add with weights."""

    name: ClassVar[str] = "tsv"
    kind: ClassVar[Kind] = Kind.MERGER
    api: ClassVar[int] = API
    summary: ClassVar[str] = "Singular directions of all models made orthonormal, then summed: no energy is lost."
    paper: ClassVar[str] = "Gargiulo et al., Task Singular Vectors (CVPR 2025), TSV-M"
    Params: ClassVar[type[Params]] = MergeParams

    def run(self, context: Context, params: MergeParams) -> Result:
        """Write the merged model; report the overlaps before and after.

        Raises:
            UsageError: the models do not belong together, or the weights do not fit.
            DataError: a file is broken; the message names the tensor.
        """
        return merge(context, Method(self.name, _separated, spectral=True), params)


def _separated(parts: Parts) -> list[Tensor]:
    from modelgrove_kernels.subspace import directions, orthogonalise

    forms = parts.forms
    if parts.factors is None:
        room = min(parts.updates[0].shape) // len(parts.updates)
        forms = tuple(directions(update, max(room, 1)) for update in parts.updates)
    return [update.up @ update.down for update in orthogonalise(forms)]
