"""Q-Diffusion (Li et al., ICCV 2023, arXiv 2302.04304): weights learned block by block, shortcuts split.

What a denoiser computes changes over its steps, so weights and ranges are fitted to inputs from all of them, drawn
evenly: the model itself paints, no data set is needed ("timestep-aware calibration"). Rounding is learned
for a whole block at once, after BRECQ. Where an up-block joins hidden states and skipped ones, the two
have very different ranges, so each has a range of activations of its own, and no group of weights reaches from one into
the other ("split shortcut quantization").

Not of the paper: learning may start from GPTQ's codes, each of which may then move one step towards its weight.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from math import gcd
from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import Field

from modelgrove_hub.contracts import API, Context, InputModel, Kind, LazyTensor, Params, Result
from modelgrove_hub.errors import DataError
from modelgrove_plugins.compress.activations import with_ranges
from modelgrove_plugins.compress.calibrating import Calibration, Rehearsal
from modelgrove_plugins.compress.packed import Stored, axes_of, matrix_of, pack, pack_as
from modelgrove_plugins.compress.reconstructing import LearnedParams, learned
from modelgrove_plugins.compress.streaming import compress

if TYPE_CHECKING:
    from torch import Tensor

    from modelgrove_kernels.calibration import LayerInputs
    from modelgrove_kernels.packing import Packed
    from modelgrove_kernels.reconstruction import LearnedRounding

Splits = Mapping[str, tuple[int, ...]]
"""Name of a layer's weight → the channels of each tensor that was joined to make its input."""

_ALIGNED = 8
"""Kernels compute on groups that are a multiple of this."""
_OFF, _SLOW = 0.3, 0.05
"""Where learning starts between GPTQ's code and the next, and its rate: at a higher one GPTQ's choices are lost."""


class QDiffusionParams(LearnedParams):
    """How coarsely weights and activations are rounded."""

    bits: Literal[8, 4] = Field(4, description="Bits of a weight: 8 (a scale a row) or 4 (a scale a group).")
    group_size: Literal[32, 64, 128] = Field(64, description="Inputs that share a scale at 4 bits: 32, 64 or 128.")
    start: Literal["nearest", "gptq"] = Field(
        "nearest", description="Learn between a weight's two neighbours (the paper), or beside what GPTQ made of it."
    )
    activation_bits: Literal[16, 8, 6, 4] = Field(
        8, description="Bits of a layer's inputs, rounded to stored ranges; 16: they are not rounded."
    )


class QDiffusion:
    """Round a denoiser's weights up or down so that its blocks answer as before; activations have stored ranges."""

    name: ClassVar[str] = "q-diffusion"
    kind: ClassVar[Kind] = Kind.COMPRESSOR
    api: ClassVar[int] = API
    summary: ClassVar[str] = "Q-Diffusion: learned rounding of whole blocks over all steps, ranges split at shortcuts."
    paper: ClassVar[str] = "Li et al., Q-Diffusion (ICCV 2023, arXiv 2302.04304)"
    Params: ClassVar[type[Params]] = QDiffusionParams

    def run(self, context: Context, params: QDiffusionParams) -> Result:
        """Paint for the ranges, paint again and learn block by block; each layer's report says where it was split.

        Layers whose inputs were not seen (a text encoder's, say) are rounded to nearest, their activations are not.

        Raises:
            UsageError: the model cannot paint, has nothing to quantize, or is an adapter or quantized already.
            DataError: a weight or a layer's input is NaN or infinite; the message names it.
        """
        model = context.inputs[0]
        layers = prepared(context, model, params, joined(context, model, params))
        learn(context, model, params, layers)

        def quantize(tensor: LazyTensor) -> Stored | None:
            return rounded(tensor, layers.get(tensor.name), params) if params.takes(tensor) else None

        tag = f"int{params.bits}"
        return compress(context, self.name, params.recorded(), quantize, tag, fidelity=params.fidelity)


@dataclass
class Layer:
    """A layer of the denoiser: codes of its weight, and the ranges of its inputs."""

    codes: Packed
    ranges: Tensor | None = None
    """(1, groups, 2); None where inputs were not seen or are not rounded."""
    sizes: Sequence[int] = ()
    """Channels of each tensor that was joined to make its input; none if it was not."""


def joined(context: Context, model: InputModel, params: QDiffusionParams) -> Splits:
    """The denoiser's layers whose input is joined of several, as one call of it shows.

    Raises:
        UsageError: the model cannot paint, or has no denoiser.
    """
    from modelgrove_kernels.concatenation import concatenated

    rehearsal = Rehearsal(context, model, params.model_copy(update={"pictures": 1, "steps": 1}))
    with concatenated(rehearsal.network) as found:
        rehearsal.paint()
    return {f"{rehearsal.component}/{path}.weight": sizes for path, sizes in found.items()}


def prepared(
    context: Context, model: InputModel, params: QDiffusionParams, splits: Splits, besides: Collection[str] = ()
) -> dict[str, Layer]:
    """The denoiser's layers that were seen, by the names of their weights, but not those in `besides`.

    Raises:
        UsageError: the model cannot paint, or has no denoiser.
        DataError: a weight or a layer's input is NaN or infinite; the message names it.
    """
    calibration, layers = Calibration(context, model, params), {}
    for tensor in model.tensors():
        inputs = calibration.take(tensor.name) if params.takes(tensor) else None
        if inputs is None or tensor.name in besides:
            continue
        sizes = splits.get(tensor.name, ())
        codes = start_for(tensor.name, matrix_of(tensor.read()).float(), sizes, params, inputs)
        layers[tensor.name] = Layer(codes, _ranges(tensor, inputs, sizes, params), sizes)
    return layers


def learn(
    context: Context, model: InputModel, params: QDiffusionParams, layers: dict[str, Layer],
    besides: Collection[str] = (),
) -> None:  # fmt: skip
    """Round the denoiser's weights as their blocks want, but not those in `besides`; `layers` get the new codes.

    Raises:
        UsageError: the model cannot paint, or has no denoiser.
        DataError: a weight is NaN or infinite; the message names it.
    """
    exact: dict[str, Tensor] = {}

    def relax(name: str, weight: Tensor) -> LearnedRounding | None:
        if name in besides:
            return None
        exact[name] = matrix_of(weight)
        layer = layers.setdefault(name, Layer(start_for(name, exact[name], (), params)))
        return relaxed(weight, layer.codes, params)

    for name, weight in learned(context, model, params, relax):
        layers[name].codes = decided(weight, exact.pop(name), layers[name].codes)


def start_for(
    name: str, matrix: Tensor, sizes: Sequence[int], params: QDiffusionParams, inputs: LayerInputs | None = None
) -> Packed:
    """Codes of a weight (rows, columns) before it is learned; its input is joined of `sizes` channels.

    Raises:
        DataError: the weight, called `name`, or its layer's input is NaN or infinite.
    """
    from modelgrove_kernels.gptq import gptq
    from modelgrove_kernels.packing import quantize

    try:
        nearest = quantize(matrix, params.bits, group_for(sizes, params))
        return nearest if params.start == "nearest" or inputs is None else gptq(matrix, inputs.gram, nearest)
    except ValueError as error:
        raise DataError(f"tensor {name}: {error}") from error


def relaxed(weight: Tensor, start: Packed, params: QDiffusionParams) -> LearnedRounding:
    """A weight in its layer's shape, to be rounded to one of two steps on the grid of `start`.

    They are those it lies between; or the code of `start` and the next one towards the weight.
    """
    import torch

    from modelgrove_kernels.packing import dequantize, grid_of, unfold
    from modelgrove_kernels.reconstruction import LearnedRounding

    scales, low, high = grid_of(start)
    matrix = matrix_of(weight) / scales
    if params.start == "nearest":
        place, below, rate = matrix, matrix.floor().clamp(low, high - 1), LearnedRounding.RATE
    else:
        code = (dequantize(start) / scales).round()
        up = ((matrix >= code) & (code < high)) | (code <= low)
        place, below, rate = code + torch.where(up, _OFF, -_OFF), torch.where(up, code, code - 1), _SLOW
    placed, lower, upper = (unfold(x * scales, weight.shape, axes_of(weight)) for x in (place, below, below + 1))
    return LearnedRounding(placed, lower, upper, rate)


def decided(weight: LearnedRounding, exact: Tensor, grid: Packed) -> Packed:
    """The choices of a learned weight as codes on `grid`, for the matrix `exact`."""
    from modelgrove_kernels.packing import grid_of, with_steps

    return with_steps(grid, (matrix_of(weight.decided()) / grid_of(grid)[0]).round(), exact)


def group_for(sizes: Sequence[int], params: QDiffusionParams) -> int | None:
    """The group width of a weight whose input is joined of `sizes` channels; None is one scale a row.

    The widest multiple of 8 up to the wanted width that divides every part, so that no scale is shared across; where
    there is none, or a row has one scale, the weight is rounded as any other.
    """
    if params.bits == 8:
        return None
    shared = gcd(*sizes)
    widths = range(params.group_size, 0, -_ALIGNED)
    return next((width for width in widths if sizes and shared % width == 0), params.group_size)


def rounded(tensor: LazyTensor, layer: Layer | None, params: QDiffusionParams) -> Stored:
    """A tensor with the codes of its layer, or rounded to nearest where it has none.

    Raises:
        ValueError: a weight is NaN or infinite.
    """
    import torch

    values = tensor.read()
    if layer is None:
        return pack(values, params.bits, group_for((), params))
    stored = pack_as(values, layer.codes, {"split": list(layer.sizes)} if layer.sizes else None)
    if layer.ranges is None:
        return stored
    channels = torch.arange(len(layer.sizes)).repeat_interleave(torch.tensor(layer.sizes)) if layer.sizes else None
    return with_ranges(stored, params.activation_bits, layer.ranges, channels)


def _ranges(
    tensor: LazyTensor, inputs: LayerInputs, sizes: Sequence[int], params: QDiffusionParams
) -> Tensor | None:  # fmt: skip
    """The best range of each joined part.

    Raises:
        DataError: an input is NaN or infinite; the message names its layer's weight.
    """
    import torch

    from modelgrove_kernels.ranges import best_range

    if params.activation_bits == 16:
        return None
    taps = inputs.sample.view(len(inputs.sample), -1, tensor.shape[1])
    parts = torch.split(taps, list(sizes) or tensor.shape[1], dim=-1)
    try:
        return torch.tensor([[best_range(part, params.activation_bits) for part in parts]])
    except ValueError as error:
        raise DataError(f"tensor {tensor.name}: {error}") from error
