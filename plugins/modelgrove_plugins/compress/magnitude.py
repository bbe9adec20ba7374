"""Magnitude pruning: the smallest weights of each layer become zero.

"Efficient pruning of text-to-image models" (arXiv 2411.15113) finds that it loses less than cleverer criteria on
Stable Diffusion 2; on the zoo's base that holds from 70 %, below `wanda` loses a little less (docs/compression.md).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from modelgrove_hub.contracts import API, Context, Kind, LazyTensor, Params, Result
from modelgrove_plugins.compress.packed import matrix_of
from modelgrove_plugins.compress.pruning import SPARSITY, keep, largest
from modelgrove_plugins.compress.streaming import compress
from modelgrove_plugins.compress.targets import CompressorParams

if TYPE_CHECKING:
    from modelgrove_plugins.compress.packed import Stored


class MagnitudeParams(CompressorParams):
    """How many weights go."""

    sparsity: float = SPARSITY


class Magnitude:
    """Drop the weights of least |w| in each layer."""

    name: ClassVar[str] = "magnitude"
    kind: ClassVar[Kind] = Kind.COMPRESSOR
    api: ClassVar[int] = API
    summary: ClassVar[str] = "Prune the smallest weights of each layer; nothing is calibrated."
    paper: ClassVar[str] = "Ramesh & Zhao, Efficient Pruning of Text-to-Image Models (arXiv 2411.15113)"
    Params: ClassVar[type[Params]] = MagnitudeParams

    def run(self, context: Context, params: MagnitudeParams) -> Result:
        """Write the pruned model; a weight takes a bit, and its value if it stays.

        Raises:
            UsageError: there is nothing to prune, or the model is an adapter or packed already.
            DataError: a weight is NaN or infinite; the message names it.
        """

        def prune(tensor: LazyTensor) -> Stored | None:
            if not params.takes(tensor):
                return None
            values = tensor.read()
            matrix = matrix_of(values)
            return keep(values, largest(matrix.abs().float().view(1, -1), params.sparsity).view(matrix.shape))

        tag = f"sparse{round(100 * params.sparsity)}"
        return compress(context, self.name, params.recorded(), prune, tag, fidelity=params.fidelity)
