"""Floating point of 8 or 4 bits (Chen et al., arXiv 2408.06995): the split into exponent and mantissa is searched for.

Each tensor has its own split, each row or group its own bias, by the least squared error. Rounding up or down is then
learned block by block, on what the denoiser's blocks are given while the model itself paints; without `--iterations`
weights take the nearest value. The arithmetic is in kernels/floating.py and kernels/reconstruction.py.
"""

from __future__ import annotations

from dataclasses import replace
from math import prod
from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import Field

from modelgrove_hub.contracts import API, Context, Kind, LazyTensor, Params, Result
from modelgrove_hub.errors import DataError
from modelgrove_hub.formats.quantized import Activations
from modelgrove_plugins.compress.packed import Stored, axes_of, describe, matrix_of, predict
from modelgrove_plugins.compress.reconstructing import LearnedParams, learned
from modelgrove_plugins.compress.streaming import compress

if TYPE_CHECKING:
    from torch import Tensor

    from modelgrove_hub.formats.quantized import PackedTensor
    from modelgrove_kernels.floating import FloatGrid
    from modelgrove_kernels.reconstruction import LearnedRounding


class FpParams(LearnedParams):
    """How coarse the grid is, and how long rounding is learned."""

    bits: Literal[8, 4] = Field(4, description="Bits of a weight: 8 or 4.")
    group_size: Literal[16, 32, 64, 128] | None = Field(
        None, description="Inputs that share a bias: 16, 32, 64 or 128; unset: one a row."
    )
    activation_format: Literal["e2m5", "e3m4", "e4m3", "e5m2"] | None = Field(
        None, description="Format of a layer's inputs, each scaled by its own maximum; unset: they are not rounded."
    )

    @property
    def activations(self) -> Activations | None:
        """Of all layers."""
        return None if self.activation_format is None else Activations(bits=8, exponent=int(self.activation_format[1]))


class Fp:
    """Round weights to floating-point numbers of few bits, up or down so that blocks answer as before."""

    name: ClassVar[str] = "fp"
    kind: ClassVar[Kind] = Kind.COMPRESSOR
    api: ClassVar[int] = API
    summary: ClassVar[str] = "FP8 and FP4 weights: exponent bits and bias by search, rounding learned block by block."
    paper: ClassVar[str] = "Chen et al., Low-Bitwidth Floating Point Quantization (arXiv 2408.06995)"
    Params: ClassVar[type[Params]] = FpParams

    def choose(self, tensor: LazyTensor, params: FpParams) -> PackedTensor | None:
        """What `run` will make of a tensor; its split is not known yet."""
        if not params.takes(tensor):
            return None
        return predict(
            tensor,
            layout="lut",
            bits=params.bits,
            group=_width(prod(tensor.shape[1:]), params),
            activations=params.activations,
        )

    def run(self, context: Context, params: FpParams) -> Result:
        """Learn block by block, then write; each layer's report has its format, e2m1 say.

        Layers outside the denoiser (a text encoder's, say) are rounded to nearest.

        Raises:
            UsageError: the model cannot paint, has nothing to quantize, or is an adapter or quantized already.
            DataError: a weight is NaN or infinite; the message names it.
        """
        grids: dict[str, FloatGrid] = {}
        found: dict[str, dict[str, Tensor]] = {}

        def relax(name: str, weight: Tensor) -> LearnedRounding:
            grids[name] = _grid(name, weight, params)
            return _between(weight, grids[name])

        if params.iterations:
            for name, weight in learned(context, context.inputs[0], params, relax):
                found[name] = grids[name].parts(matrix_of(weight.decided()))

        def quantize(tensor: LazyTensor) -> Stored | None:
            if not params.takes(tensor):
                return None
            values = tensor.read()
            grid = grids.pop(tensor.name, None) or _grid(tensor.name, values, params)
            parts = found.pop(tensor.name, None) or grid.parts()
            stored = describe(
                values, parts, layout="lut", bits=params.bits, group=grid.width, activations=params.activations
            )
            return replace(stored, remarks={"format": grid.name})

        return compress(context, self.name, params.recorded(), quantize, f"fp{params.bits}", fidelity=params.fidelity)


def _width(columns: int, params: FpParams) -> int:
    return min(columns, params.group_size or columns)


def _grid(name: str, weight: Tensor, params: FpParams) -> FloatGrid:
    from modelgrove_kernels.floating import FloatGrid

    matrix = matrix_of(weight)
    try:
        return FloatGrid(matrix, params.bits, _width(matrix.shape[1], params))
    except ValueError as error:
        raise DataError(f"tensor {name}: {error}") from error


def _between(weight: Tensor, grid: FloatGrid) -> LearnedRounding:
    """A weight in its layer's shape, to be rounded to one of its two neighbours on `grid`."""
    from modelgrove_kernels.packing import unfold
    from modelgrove_kernels.reconstruction import LearnedRounding

    lower, upper = (unfold(values, weight.shape, axes_of(weight)) for values in grid.neighbours())
    return LearnedRounding(weight, lower, upper)
