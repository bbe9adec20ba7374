"""GPTQ (Frantar et al., arXiv 2210.17323): rounding in which later columns make up for what earlier ones lost.

The layers' inputs are measured while the model itself paints; no data set is needed. Files are those of `rtn`, so
everything that reads or runs these runs GPTQ's. The arithmetic is in kernels/gptq.py.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import Field

from modelgrove_hub.contracts import API, Context, Kind, LazyTensor, Params, Result
from modelgrove_plugins.compress.calibrating import CalibratedParams, Calibration
from modelgrove_plugins.compress.packed import Stored, matrix_of, pack, predict_rounded
from modelgrove_plugins.compress.streaming import compress

if TYPE_CHECKING:
    from modelgrove_hub.formats.quantized import Activations, PackedTensor
    from modelgrove_kernels.calibration import LayerInputs


class GptqParams(CalibratedParams):
    """How coarsely weights are rounded."""

    bits: Literal[8, 4, 3, 2] = Field(4, description="Bits of a weight: 8, 4, 3 or 2.")
    group_size: Literal[32, 64, 128] = Field(
        64, description="Inputs that share a scale at 4 bits and below: 32, 64 or 128."
    )

    @property
    def group(self) -> int | None:
        """The group width, or None for one scale a row."""
        return None if self.bits == 8 else self.group_size


class Gptq:
    """Round the weights of a denoiser so that its layers' outputs, not its weights, change least."""

    name: ClassVar[str] = "gptq"
    kind: ClassVar[Kind] = Kind.COMPRESSOR
    api: ClassVar[int] = API
    summary: ClassVar[str] = "GPTQ, 8 to 2 bits: calibrated on the model's own pictures, in the files of rtn."
    paper: ClassVar[str] = "Frantar et al., GPTQ (arXiv 2210.17323)"
    Params: ClassVar[type[Params]] = GptqParams

    def choose(self, tensor: LazyTensor, params: GptqParams) -> PackedTensor | None:
        """What `run` will make of a tensor."""
        return predict_rounded(tensor, params.bits, params.group) if params.takes(tensor) else None

    def run(self, context: Context, params: GptqParams) -> Result:
        """Paint, then round; each layer's report has the output error on the calibration set, and that of rtn.

        Layers whose inputs were not seen (a text encoder's, say) are rounded to nearest.

        Raises:
            UsageError: the model cannot paint, has nothing to quantize, or is an adapter or quantized already.
            DataError: a weight is NaN or infinite; the message names it.
        """
        calibration = Calibration(context, context.inputs[0], params)

        def quantize(tensor: LazyTensor) -> Stored | None:
            if not params.takes(tensor):
                return None
            return rounded(tensor, calibration.take(tensor.name), params.bits, params.group)

        tag = f"int{params.bits}"
        return compress(context, self.name, params.recorded(), quantize, tag, fidelity=params.fidelity)


def rounded(
    tensor: LazyTensor, inputs: LayerInputs | None, bits: int, group: int | None, activations: Activations | None = None
) -> Stored:
    """A tensor rounded by GPTQ, or to nearest where its layer's inputs are None.

    `activations` are for the manifest; the rounding of inputs does not change that of weights.

    Raises:
        ValueError: a weight is not finite.
    """
    from modelgrove_kernels.calibration import output_error
    from modelgrove_kernels.layouts import layout_of, restore

    values = tensor.read()
    if inputs is None:
        return pack(values, bits, group, activations)
    matrix = matrix_of(values).float()
    packed, nearest = (pack(values, bits, group, activations, gram) for gram in (inputs.gram, None))
    errors: dict[str, Any] = {}
    for name, one in (("output_error", packed), ("output_error_rtn", nearest)):
        difference = restore(layout_of(one.entry), one.parts) - matrix
        errors[name] = float(f"{output_error(difference, matrix, inputs.gram):.3e}")
    return replace(packed, remarks=errors)
