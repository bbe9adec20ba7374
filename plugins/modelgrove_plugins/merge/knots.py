"""KnOTS: the updates side by side have one singular value decomposition; their right parts are merged by TIES.

[X₁ … X_N] = U·S·[V₁ᵀ … V_Nᵀ]: all updates write along the same U, so that the rows of the Vᵢᵀ, each in the module's own
input coordinates, say how each model uses a direction, and can be compared entry by entry. The result is
U·S·ties(V₁ᵀ … V_Nᵀ), of a rank no larger than the summed ones.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from pydantic import Field

from modelgrove_hub.contracts import API, Context, Kind, Params, Result
from modelgrove_plugins.merge.merging import merge
from modelgrove_plugins.merge.methods import Method, Parts
from modelgrove_plugins.merge.params import MergeParams

if TYPE_CHECKING:
    from torch import Tensor

_PRESENT = 1e-5
"""Singular values below this share of the largest are rounding."""


class KnotsParams(MergeParams):
    """The choices of all mergers, and of TIES."""

    density: float = Field(0.3, gt=0, le=1, description="The share of entries that TIES keeps of each right part.")


class Knots:
    """Align updates by a common decomposition, then merge what is left to compare."""

    name: ClassVar[str] = "knots"
    kind: ClassVar[Kind] = Kind.MERGER
    api: ClassVar[int] = API
    summary: ClassVar[str] = "Updates aligned along common output directions, and merged there by TIES."
    paper: ClassVar[str] = "Stoica et al., Model merging with SVD to tie the Knots (ICLR 2025)"
    Params: ClassVar[type[Params]] = KnotsParams

    def run(self, context: Context, params: KnotsParams) -> Result:
        """Write the merged model; the report is that of `sum`.

        Raises:
            UsageError: the models do not belong together, or the weights do not fit.
            DataError: a file is broken; the message names the tensor.
        """

        def rule(parts: Parts) -> Tensor:
            return _tied(parts, params.density)

        return merge(context, Method(self.name, rule, space="outputs", spectral=True), params)


def _tied(parts: Parts, density: float) -> Tensor:
    import torch

    from modelgrove_kernels.task_vectors import elected_mean, trim

    # U and S² are the eigenvectors and eigenvalues of Σ XᵢXᵢᵀ: the long side is never decomposed.
    doubles = [update.double() for update in parts.updates]
    squares, U = torch.linalg.eigh(torch.stack([X @ X.T for X in doubles]).sum(0))
    S = squares.clamp_min(0).sqrt()
    present = S.gt(_PRESENT * float(S.max()))
    U, S = U[:, present], S[present]
    rights = [((U.T @ X) / S[:, None]).float() for X in doubles]
    if not len(S):
        return torch.zeros_like(parts.updates[0])
    merged = elected_mean([trim(right, density) for right in rights], parts.weights)
    result: Tensor = ((U * S) @ merged.double()).float()
    return result
