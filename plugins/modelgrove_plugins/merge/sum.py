"""The exact weighted sum of LoRAs: Σ wᵢ·Bᵢ·Aᵢ, computed in the small core of the stacked factors.

Adding the A's and the B's separately, as common tools do by default, differs from the sum by √(N-1)
in relative error for N unrelated adapters; the dense SVD that others use costs some sixty times as
much as the QR and the small SVD here (kernels/core_space.py). Of checkpoints it is task arithmetic:
the base and Σ wᵢ·(Wᵢ − W₀), or without a base their weighted average.
"""

from __future__ import annotations

from typing import ClassVar

from modelgrove_hub.contracts import API, Context, Kind, Params, Result
from modelgrove_plugins.merge.merging import merge
from modelgrove_plugins.merge.methods import Method
from modelgrove_plugins.merge.params import MergeParams


class Sum:
    """Add models with weights, without any error but rounding and the truncation that is asked for."""

    name: ClassVar[str] = "sum"
    kind: ClassVar[Kind] = Kind.MERGER
    api: ClassVar[int] = API
    summary: ClassVar[str] = "The exact weighted sum of LoRAs of any ranks and namings, or of checkpoints."
    paper: ClassVar[str] = (
        "Panariello et al., Accurate and Efficient Low-Rank Model Merging in Core Space (NeurIPS 2025); "
        "Ilharco et al., Editing Models with Task Arithmetic (ICLR 2023)"
    )
    Params: ClassVar[type[Params]] = MergeParams

    def run(self, context: Context, params: MergeParams) -> Result:
        """Write the merged model; report coverage, crosstalk of every pair, ranks and errors.

        Raises:
            UsageError: the models do not belong together, or the weights do not fit.
            DataError: a file is broken; the message names the tensor.
        """
        return merge(context, Method(self.name, whole=True), params)
