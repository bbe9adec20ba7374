"""SVDQuant (Li et al., arXiv 2411.05007): 4-bit weights and inputs, with a branch of low rank for what stands out.

The layers' inputs are measured while the model itself paints. Convolutions have no branch, as in the paper: they are
rounded by GPTQ, with inputs of 8 bits. The arithmetic is in kernels/svdquant.py.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import Field

from modelgrove_hub.contracts import API, Context, Kind, LazyTensor, Params, Result
from modelgrove_hub.formats.quantized import Activations
from modelgrove_plugins.compress.calibrating import CalibratedParams, Calibration
from modelgrove_plugins.compress.gptq import rounded
from modelgrove_plugins.compress.packed import Stored, describe, packed_parts, predict, predict_rounded
from modelgrove_plugins.compress.streaming import compress
from modelgrove_plugins.compress.targets import DENOISERS

if TYPE_CHECKING:
    from modelgrove_hub.formats.quantized import PackedTensor
    from modelgrove_kernels.calibration import LayerInputs

_WHOLE = Activations(bits=8)
"""How the inputs of layers without a branch are rounded."""


class SvdQuantParams(CalibratedParams):
    """How much the branch holds, and how coarsely the rest is rounded."""

    rank: int = Field(32, ge=1, le=1024, description="Rank of the branch in 16 bits.")
    group_size: Literal[32, 64, 128] = Field(64, description="Inputs that share a scale: 32, 64 or 128.")
    activation_bits: Literal[4, 8] = Field(4, description="Bits of a layer's inputs: 4, as published, or 8.")

    @property
    def activations(self) -> Activations:
        """Of layers with a branch: at 4 bits each group of an input has a scale of its own, at 8 each input."""
        return Activations(bits=self.activation_bits, width=self.group_size if self.activation_bits == 4 else 0)


class SvdQuant:
    """Move the outliers of inputs and weights into a branch of low rank, and round what is left to 4 bits."""

    name: ClassVar[str] = "svdquant"
    kind: ClassVar[Kind] = Kind.COMPRESSOR
    api: ClassVar[int] = API
    summary: ClassVar[str] = "SVDQuant: int4 weights and inputs beside a 16-bit branch of low rank."
    paper: ClassVar[str] = "Li et al., SVDQuant (arXiv 2411.05007)"
    Params: ClassVar[type[Params]] = SvdQuantParams

    def choose(self, tensor: LazyTensor, params: SvdQuantParams) -> PackedTensor | None:
        """What `run` will make of a tensor, if its inputs are seen."""
        if not params.takes(tensor):
            return None
        plain = predict_rounded(tensor, 4, params.group_size, _WHOLE)
        if len(tensor.shape) != 2 or tensor.name.partition("/")[0] not in DENOISERS:
            return plain
        return predict(
            tensor, layout="int4", bits=4, group=plain.group, smooth=True, rank=min(params.rank, *tensor.shape),
            activations=params.activations,
        )  # fmt: skip

    def run(self, context: Context, params: SvdQuantParams) -> Result:
        """Paint, then split and round; layers report the smoothing strength α, and the error of outputs beside rtn's.

        Layers whose inputs were not seen (a text encoder's, say) are rounded to nearest.

        Raises:
            UsageError: the model cannot paint, has nothing to quantize, or is an adapter or quantized already.
            DataError: a weight is NaN or infinite; the message names it.
        """
        calibration = Calibration(context, context.inputs[0], params)

        def quantize(tensor: LazyTensor) -> Stored | None:
            if not params.takes(tensor):
                return None
            inputs = calibration.take(tensor.name)
            if inputs is None or len(tensor.shape) != 2:
                return rounded(tensor, inputs, 4, params.group_size, _WHOLE)
            return _split(tensor, inputs, params)

        return compress(context, self.name, params.recorded(), quantize, "int4", fidelity=params.fidelity)


def _split(tensor: LazyTensor, inputs: LayerInputs, params: SvdQuantParams) -> Stored:
    from modelgrove_kernels.emulation import ActivationRule
    from modelgrove_kernels.svdquant import nearest_error, svdquant

    weight = tensor.read()
    rule = ActivationRule(params.activations.bits, width=params.activations.width)
    found = svdquant(weight, inputs, params.group_size, params.rank, rule)
    nearest = nearest_error(weight, inputs, params.group_size, rule)
    parts = {**packed_parts(found.residual), "smooth": found.smooth, "up": found.up, "down": found.down}
    stored = describe(
        weight, parts, layout="int4", bits=4, group=found.residual.group, smooth=True, rank=found.up.shape[1],
        activations=params.activations,
    )  # fmt: skip
    remarks: dict[str, Any] = {
        "alpha": found.strength,
        "turns": found.rounds,
        "output_error": float(f"{found.error:.3e}"),
        "output_error_rtn": float(f"{nearest:.3e}"),
    }
    return Stored(stored.entry, parts, remarks)
