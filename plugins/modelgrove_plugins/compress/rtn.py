"""Round-to-nearest quantization, 8 to 2 bits: the plain baseline that every other compressor must beat.

int8 is symmetric with one scale an output channel or group; int4 is asymmetric with a scale and a zero point a group;
3 and 2 bits are steps of a scale, one of them more on the side of the largest weight. Nothing is calibrated. The
arithmetic is in kernels/packing.py and kernels/uniform.py.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import Field

from modelgrove_hub.contracts import API, Context, Kind, LazyTensor, Params, Result
from modelgrove_hub.formats.quantized import Activations
from modelgrove_plugins.compress.packed import pack, predict_rounded
from modelgrove_plugins.compress.streaming import compress
from modelgrove_plugins.compress.targets import CompressorParams

if TYPE_CHECKING:
    from modelgrove_hub.formats.quantized import PackedTensor
    from modelgrove_plugins.compress.packed import Stored


class RtnParams(CompressorParams):
    """How coarsely weights are rounded."""

    bits: Literal[8, 4, 3, 2] = Field(8, description="Bits of a weight: 8, 4, 3 or 2.")
    granularity: Literal["auto", "channel", "group"] = Field(
        "auto", description="What shares a scale: an output channel, or a group of inputs; auto: channel at 8 bits."
    )
    group_size: Literal[32, 64, 128] = Field(64, description="Inputs in a group: 32, 64 or 128.")
    activation_bits: Literal[8, 6, 4] | None = Field(
        None, description="Bits of a layer's inputs, for the comparison and whoever runs the file; unset: not rounded."
    )

    @property
    def activations(self) -> Activations | None:
        """Each input of a layer has a scale of its own; at 4 bits each group of it."""
        if self.activation_bits is None:
            return None
        return Activations(bits=self.activation_bits, width=self.group_size if self.activation_bits == 4 else 0)

    @property
    def group(self) -> int | None:
        """The group width, or None for one scale a row."""
        channel = self.granularity == "channel" or (self.granularity == "auto" and self.bits == 8)
        return None if channel else self.group_size


class Rtn:
    """Round the weights of linear layers and convolutions to the nearest level."""

    name: ClassVar[str] = "rtn"
    kind: ClassVar[Kind] = Kind.COMPRESSOR
    api: ClassVar[int] = API
    summary: ClassVar[str] = "Round to nearest, 8 to 2 bits, uncalibrated: fast, and the baseline for all others."
    paper: ClassVar[str] = ""
    Params: ClassVar[type[Params]] = RtnParams

    def choose(self, tensor: LazyTensor, params: RtnParams) -> PackedTensor | None:
        """What `run` will make of a tensor."""
        if not params.takes(tensor):
            return None
        return predict_rounded(tensor, params.bits, params.group, activations=params.activations)

    def run(self, context: Context, params: RtnParams) -> Result:
        """Write the packed model beside its other files; report true bytes and every layer's SQNR.

        Raises:
            UsageError: there is nothing to quantize, or the model is an adapter or quantized already.
            DataError: there are no safetensors weights, or one is NaN or infinite; the message names it.
        """

        def quantize(tensor: LazyTensor) -> Stored | None:
            if not params.takes(tensor):
                return None
            return pack(tensor.read(), params.bits, params.group, activations=params.activations)

        tag = f"int{params.bits}"
        return compress(context, self.name, params.recorded(), quantize, tag, fidelity=params.fidelity)
