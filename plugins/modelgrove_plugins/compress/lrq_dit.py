"""LRQ-DiT (Yang et al., arXiv 2508.03485): logarithmic levels for weights, and a rotation for outliers of their inputs.

Twin-log quantization (section 4.1) lays its levels dense where weights are; the adaptive rotation scheme (section 4.2)
spreads what stands out in a layer's inputs, which are measured while the model itself paints. Each row has a table of
its own: 2^bits float16 values, so that the step and zero point of either sign are the row's, as published. The
arithmetic is in kernels/twinlog.py and kernels/spreading.py.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import Field

from modelgrove_hub.contracts import API, Context, Kind, LazyTensor, Params, Result
from modelgrove_hub.formats.quantized import Activations
from modelgrove_plugins.compress.calibrating import CalibratedParams, Calibration
from modelgrove_plugins.compress.packed import Stored, describe, matrix_of
from modelgrove_plugins.compress.streaming import compress

if TYPE_CHECKING:
    import torch

    from modelgrove_kernels.calibration import LayerInputs


class LrqDitParams(CalibratedParams):
    """How coarsely weights and inputs are rounded, and how inputs are rotated."""

    bits: Literal[4, 3] = Field(4, description="Bits of a weight: 4 or 3.")
    activation_bits: Literal[8, 6, 4] | None = Field(
        8, description="Bits of a linear layer's inputs (a convolution's have 8); null: not rounded."
    )
    rotation: Literal["auto", "none"] = Field(
        "auto", description="auto: the layers' inputs decide, for which the model paints; none: weights alone."
    )
    block: Literal[16, 32, 64, 128] = Field(32, description="Inputs that share a rotation made for their outliers.")

    def activations(self, linear: bool) -> Activations | None:
        """Each input of a layer has a scale of its own."""
        return None if self.activation_bits is None else Activations(bits=self.activation_bits if linear else 8)


class LrqDit:
    """Round weights to logarithmic levels, and rotate the inputs of linear layers so that none stands out."""

    name: ClassVar[str] = "lrq-dit"
    kind: ClassVar[Kind] = Kind.COMPRESSOR
    api: ClassVar[int] = API
    summary: ClassVar[str] = "LRQ-DiT: twin-log weights of 3 or 4 bits, inputs rotated as their outliers ask for."
    paper: ClassVar[str] = "Yang et al., LRQ-DiT (arXiv 2508.03485)"
    Params: ClassVar[type[Params]] = LrqDitParams

    def run(self, context: Context, params: LrqDitParams) -> Result:
        """Paint if rotations are wanted, then round; layers report their error beside that of equal steps a row.

        Convolutions, and layers whose inputs were not seen (a text encoder's, say), are not rotated.

        Raises:
            UsageError: the model cannot paint, has nothing to quantize, or is an adapter or quantized already.
            DataError: a weight or a layer's input is NaN or infinite; the message names it.
        """
        calibration = Calibration(context, context.inputs[0], params) if params.rotation == "auto" else None

        def quantize(tensor: LazyTensor) -> Stored | None:
            if not params.takes(tensor):
                return None
            inputs = calibration.take(tensor.name) if calibration else None
            return _rounded(tensor, inputs, params, context.generator())

        tag = f"lut{params.bits}"
        return compress(context, self.name, params.recorded(), quantize, tag, fidelity=params.fidelity)


def _rounded(
    tensor: LazyTensor, inputs: LayerInputs | None, params: LrqDitParams, generator: torch.Generator
) -> Stored:
    from modelgrove_kernels.calibration import output_error
    from modelgrove_kernels.layouts import Layout, layout_of, restore, transform
    from modelgrove_kernels.spreading import Spread, adaptive, fluctuation
    from modelgrove_kernels.twinlog import twin_log_parts, uniform_error

    values = tensor.read()
    matrix = matrix_of(values).float()
    columns = matrix.shape[1]
    linear = values.ndim == 2
    spread = adaptive(inputs, params.block, generator) if inputs is not None and linear else Spread()
    layout = Layout("lut", columns, params.bits, columns, rotation=spread.rotation, block=spread.block)
    parts = {**twin_log_parts(transform(matrix, layout, spread.parts), params.bits), **spread.parts}
    stored = describe(
        values, parts, layout="lut", bits=params.bits, group=columns, tables="row", rotation=spread.rotation,
        block=spread.block, activations=params.activations(linear),
    )  # fmt: skip
    remarks: dict[str, Any] = {"error_uniform": _short(uniform_error(matrix, params.bits))}
    if inputs is not None:
        lost = restore(layout_of(stored.entry), parts) - matrix
        remarks |= {
            "fluctuation": _short(fluctuation(inputs)),
            "output_error": _short(output_error(lost, matrix, inputs.gram)),
        }
    return replace(stored, remarks=remarks)


def _short(value: float) -> float:
    return float(f"{value:.3e}")
