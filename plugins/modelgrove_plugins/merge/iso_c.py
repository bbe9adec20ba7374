"""Iso-C: the sum of the updates with all its singular values replaced by their mean.

Directions that one model alone needs are as strong then as those that many share. The mean is taken over the directions
that the sum has: of R summed ranks at most R, where a full fine-tune has all.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from modelgrove_hub.contracts import API, Context, Kind, Params, Result
from modelgrove_plugins.merge.merging import merge
from modelgrove_plugins.merge.methods import Method, Parts
from modelgrove_plugins.merge.params import MergeParams

if TYPE_CHECKING:
    from torch import Tensor


class IsoC:
    """Flatten the spectrum of the sum."""

    name: ClassVar[str] = "iso-c"
    kind: ClassVar[Kind] = Kind.MERGER
    api: ClassVar[int] = API
    summary: ClassVar[str] = "The sum with a flat spectrum: every direction gets the same strength."
    paper: ClassVar[str] = "Marczak et al., No Task Left Behind: Isotropic Model Merging (ICML 2025), Iso-C"
    Params: ClassVar[type[Params]] = MergeParams

    def run(self, context: Context, params: MergeParams) -> Result:
        """Write the merged model; the report is that of `sum`.

        Raises:
            UsageError: the models do not belong together, or the weights do not fit.
            DataError: a file is broken; the message names the tensor.
        """
        return merge(context, Method(self.name, _flattened, spectral=True), params)


def _flattened(parts: Parts) -> Tensor:
    from modelgrove_kernels.subspace import directions

    form = directions(parts.total())
    if not form.rank:
        return parts.total()
    flat: Tensor = form.S.mean() * (form.U @ form.V.T)
    return flat
