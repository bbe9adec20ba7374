"""Wanda (Sun et al., arXiv 2306.11695): weights go by |w| · ‖x‖, compared within each output.

‖x‖ is the norm of the input that a weight multiplies (equation 1), measured while the model itself paints. It is one of
the criteria that "Efficient pruning of text-to-image models" (arXiv 2411.15113) sets against magnitude.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar

from pydantic import Field

from modelgrove_hub.contracts import API, Context, Kind, LazyTensor, Params, Result
from modelgrove_hub.errors import UsageError
from modelgrove_plugins.compress.calibrating import CalibratedParams, Calibration
from modelgrove_plugins.compress.packed import Stored, matrix_of
from modelgrove_plugins.compress.pruning import (
    AUTO,
    SPARSITY,
    Sparsity,
    check_components,
    keep,
    largest,
    share_for,
    shares_of,
)
from modelgrove_plugins.compress.streaming import compress
from modelgrove_plugins.compress.targets import DENOISERS

if TYPE_CHECKING:
    from modelgrove_kernels.calibration import LayerInputs


class WandaParams(CalibratedParams):
    """How many weights go."""

    sparsity: Sparsity = Field("0.3", description=SPARSITY)


class Wanda:
    """Drop the weights that move their output least."""

    name: ClassVar[str] = "wanda"
    kind: ClassVar[Kind] = Kind.COMPRESSOR
    api: ClassVar[int] = API
    summary: ClassVar[str] = "Prune weights by their size times that of their input, on the model's own pictures."
    paper: ClassVar[str] = "Sun et al., Wanda (arXiv 2306.11695); Ramesh & Zhao (arXiv 2411.15113)"
    Params: ClassVar[type[Params]] = WandaParams

    def run(self, context: Context, params: WandaParams) -> Result:
        """Paint, then prune; each layer's report has the output error on the calibration set, and that of magnitude.

        Layers whose inputs were not seen (a text encoder's, say) are kept whole.

        Raises:
            UsageError: a component that `sparsity` names is none of the model's, or no denoiser; the model cannot
                paint, has nothing to prune, or is an adapter or packed already.
            DataError: a weight is NaN or infinite; the message names it.
        """
        shares = _shares(params.sparsity)
        check_components(shares, context.inputs[0])
        calibration = Calibration(context, context.inputs[0], params)

        def prune(tensor: LazyTensor) -> Stored | None:
            share, inputs = share_for(shares, tensor.name), calibration.take(tensor.name)
            return _pruned(tensor, inputs, share) if inputs is not None and share else None

        tag = f"sparse{round(100 * max(shares.values()))}"
        return compress(context, self.name, params.recorded(), prune, tag, fidelity=params.fidelity)


def _shares(sparsity: str) -> dict[str, float]:
    if sparsity == AUTO:
        raise UsageError("sparsity auto is of compressor.magnitude alone: wanda takes numbers")
    shares = shares_of(sparsity)
    for name in shares.keys() - {"", *DENOISERS}:
        raise UsageError(f"sparsity: wanda sees the inputs of a denoiser only; prune {name} with compressor.magnitude")
    return shares


def _pruned(tensor: LazyTensor, inputs: LayerInputs, sparsity: float) -> Stored:
    from modelgrove_kernels.calibration import output_error

    values = tensor.read()
    matrix = matrix_of(values).float()
    norms = inputs.gram.diagonal().clamp_min(0).sqrt()
    mask = largest(matrix.abs() * norms, sparsity)
    plain = largest(matrix.abs().view(1, -1), sparsity).view(matrix.shape)
    errors: dict[str, Any] = {
        name: float(f"{output_error(matrix * ~kept, matrix, inputs.gram):.3e}")
        for name, kept in (("output_error", mask), ("output_error_magnitude", plain))
    }
    return keep(values, mask, errors)
