"""DGQ (Ryu, Park and Shim, ICLR 2025, arXiv 2501.04304): activations below 8 bits, grouped where their outliers are.

Outliers decide what a text-to-image model paints, and in each layer they belong to some channels or to some pixels. A
layer whose channels differ more than its pixels gets groups of like channels with a range each, the others a scale for
each pixel. Attention to a caption is rounded to powers of two, scaled by each prompt, the first token's
peak kept apart. Weights are rounded to nearest: the method needs no tuning of them.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import Field

from modelgrove_hub.contracts import API, Context, InputModel, Kind, LazyTensor, Params, Result
from modelgrove_hub.formats.quantized import Activations, AttentionMap
from modelgrove_plugins.compress.activations import with_activations, with_ranges
from modelgrove_plugins.compress.calibrating import CalibratedParams, Calibration, Rehearsal
from modelgrove_plugins.compress.packed import Stored, pack
from modelgrove_plugins.compress.streaming import compress

if TYPE_CHECKING:
    from modelgrove_kernels.calibration import LayerInputs

_WATCHED = 4
"""Pictures whose attention is looked at."""
_WHOLE = 8
"""Bits from which a group's range is all that was seen, as in the paper; with fewer, the one that loses least: on the
zoo's base that was 1.1 (6 bits) and 2.8 times (4 bits) less error, but a third more at 8."""


class DgqParams(CalibratedParams):
    """How coarsely weights and activations are rounded."""

    bits: Literal[8, 4] = Field(4, description="Bits of a weight: 8 (a scale a row) or 4 (a scale a group).")
    group_size: Literal[32, 64, 128] = Field(64, description="Inputs that share a scale at 4 bits: 32, 64 or 128.")
    activation_bits: Literal[8, 6, 4] = Field(6, description="Bits of a layer's inputs: 8, 6 or 4.")
    groups: int = Field(8, ge=1, le=256, description="Groups of channels with a range each, where outliers are there.")
    attention: bool = Field(True, description="Whether attention to the caption is rounded, to as many bits.")

    @property
    def group(self) -> int | None:
        """The group width of weights, or None for one scale a row."""
        return None if self.bits == 8 else self.group_size


class Dgq:
    """Round activations in groups of channels or pixel by pixel, and attention to powers of two."""

    name: ClassVar[str] = "dgq"
    kind: ClassVar[Kind] = Kind.COMPRESSOR
    api: ClassVar[int] = API
    summary: ClassVar[str] = (
        "DGQ: activations below 8 bits in groups of channels or by pixel, attention by powers of two."
    )
    paper: ClassVar[str] = "Ryu et al., DGQ (ICLR 2025, arXiv 2501.04304)"
    Params: ClassVar[type[Params]] = DgqParams

    def run(self, context: Context, params: DgqParams) -> Result:
        """Paint, then round; each layer's report has the axis that was chosen, and how far channels and pixels differ.

        The report's `attention` says how many cross-attentions are rounded, and in how many the first token is apart.

        Raises:
            UsageError: the model cannot paint, has nothing to quantize, or is an adapter or quantized already.
            DataError: a weight or a layer's input is NaN or infinite; the message names it.
        """
        model = context.inputs[0]
        maps = _attention(context, model, params) if params.attention else {}
        calibration = Calibration(context, model, params)

        def quantize(tensor: LazyTensor) -> Stored | None:
            if not params.takes(tensor):
                return None
            plain = pack(tensor.read(), params.bits, params.group)
            inputs = calibration.take(tensor.name)
            stored = plain if inputs is None else grouped(plain, inputs, params)
            return _with_attention(stored, maps.get(tensor.name))

        result = compress(
            context, self.name, params.recorded(), quantize, f"int{params.bits}", fidelity=params.fidelity
        )  # fmt: skip
        said: dict[str, Any] = {"layers": len(maps), "start": sum(one.start for one in maps.values())}
        if not maps:
            said = {"reason": "it was not wanted" if not params.attention else "no attention to a caption was seen"}
        return replace(result, report={**result.report, "attention": said})


def grouped(stored: Stored, inputs: LayerInputs, params: DgqParams) -> Stored:
    """A packed tensor whose layer rounds its inputs along the axis on which they differ most.

    In a convolution of more than one position each output sums over several pixels, which therefore share a scale: it
    has groups of channels always.

    Raises:
        ValueError: an input is NaN or infinite.
    """
    import torch

    from modelgrove_kernels.ranges import alike, best_range, channel_extremes, group_extremes, spreads

    if not bool(torch.isfinite(inputs.sample).all()):
        raise ValueError("the layer's inputs are NaN or infinite")
    count = stored.entry.channels
    by_channel, by_pixel = spreads(inputs.sample, count)
    remarks: dict[str, Any] = {"spread": {"channels": float(f"{by_channel:.3e}"), "pixels": float(f"{by_pixel:.3e}")}}
    if len(stored.entry.shape) == 2 and by_pixel >= by_channel:
        return with_activations(stored, Activations(bits=params.activation_bits), axis="pixels", **remarks)
    extremes = channel_extremes(inputs, count)
    places = alike(extremes, min(params.groups, count))
    ranges = group_extremes(extremes, places)
    if params.activation_bits < _WHOLE:
        cut = inputs.sample.view(-1, count)
        own = [cut[:, places == group] for group in range(len(ranges))]
        ranges = torch.tensor([best_range(values, params.activation_bits) for values in own])
    return with_ranges(stored, params.activation_bits, ranges[None], places, axis="channels", **remarks)


def _with_attention(stored: Stored, attention: AttentionMap | None) -> Stored:
    if attention is None:
        return stored
    return replace(stored, entry=stored.entry.model_copy(update={"attention": attention}))


def _attention(context: Context, model: InputModel, params: DgqParams) -> dict[str, AttentionMap]:
    """Names of the weights that make a cross-attention's values, and how its probabilities are to be rounded.

    The first token is kept apart where it is attended to more than any other, on the mean.
    """
    from modelgrove_plugins.compress.attention import watched_peaks

    few = params.model_copy(update={"pictures": min(params.pictures, _WATCHED), "steps": 2})
    rehearsal = Rehearsal(context, model, few)
    with watched_peaks(rehearsal.network) as peaks:
        rehearsal.paint()
    return {
        f"{rehearsal.component}/{path}.to_v.weight": AttentionMap(
            bits=params.activation_bits, start=all(int(mean.argmax()) == 0 for mean in means)
        )
        for path, means in peaks.items()
        if means
    }
