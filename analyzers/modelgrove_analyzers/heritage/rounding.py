"""The ways in which a copy of a model loses precision: casts to named types, and uniform grids.

A cast is recognised exactly: every value of the copy is the rounded value of the original. A
grid (int8, int4, whatever the file format) is recognised from the values alone: in each group
they are whole multiples of one step, and every original value lies within half a step.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

MANTISSA = {"F64": 52, "F32": 23, "F16": 10, "BF16": 7, "F8_E4M3": 3, "F8_E5M2": 2}
"""Stored bits of the mantissa."""
_LOWEST_EXPONENT = {"F64": -1022, "F32": -126, "F16": -14, "BF16": -126, "F8_E4M3": -6, "F8_E5M2": -14}
_LEVELS = 256
"""A grid has at most as many values in a group: 8 bits."""
_GROUPS = (256, 128, 64, 32, 16)
_DIVISORS = 32
_PROBED = 8
_WHOLE = 0.05
"""How far from a whole number of steps a value of a grid may be."""


@dataclass(frozen=True)
class Rounding:
    """Casts in order, to the nearest value, ties to even; `dtype` is the last one, as safetensors writes it."""

    name: str
    dtype: str
    casts: tuple[torch.dtype, ...]

    def apply(self, values: Tensor) -> Tensor:
        """What becomes of `values`, in float32."""
        values = values.float()
        for dtype in self.casts:
            values = values.to(dtype).float()
        return values


_HALF, _BRAIN = torch.float16, torch.bfloat16
ROUNDINGS = (
    Rounding("fp32", "F32", ()),
    Rounding("fp16", "F16", (_HALF,)),
    Rounding("bf16", "BF16", (_BRAIN,)),
    Rounding("bf16 by way of fp16", "BF16", (_HALF, _BRAIN)),
    Rounding("fp16 by way of bf16", "F16", (_BRAIN, _HALF)),
    Rounding("fp8 e4m3", "F8_E4M3", (torch.float8_e4m3fn,)),
    Rounding("fp8 e4m3 by way of fp16", "F8_E4M3", (_HALF, torch.float8_e4m3fn)),
    Rounding("fp8 e4m3 by way of bf16", "F8_E4M3", (_BRAIN, torch.float8_e4m3fn)),
    Rounding("fp8 e5m2", "F8_E5M2", (torch.float8_e5m2,)),
    Rounding("fp8 e5m2 by way of fp16", "F8_E5M2", (_HALF, torch.float8_e5m2)),
)


def precision(values: Tensor) -> str:
    """The coarsest type that holds all `values` exactly, whatever type they are stored in."""
    for dtype, cast in (
        ("F8_E5M2", torch.float8_e5m2),
        ("F8_E4M3", torch.float8_e4m3fn),
        ("BF16", _BRAIN),
        ("F16", _HALF),
    ):
        if bool((values.to(cast).to(values.dtype) == values).all()):
            return dtype
    return "F32" if bool((values.float().to(values.dtype) == values).all()) else "F64"


def spacing(values: Tensor, dtype: str) -> Tensor:
    """The distance between neighbouring numbers of `dtype` at each value, float64."""
    _, exponent = torch.frexp(values.double())
    exponent = (exponent - 1).masked_fill(values == 0, -(1 << 20)).clamp_min(_LOWEST_EXPONENT[dtype])
    return torch.exp2((exponent - MANTISSA[dtype]).double())


def rounding_variance(values: Tensor, dtype: str) -> Tensor:
    """Variance of the error that storing each value as `dtype` leaves, if it is uniform in a step; float64."""
    return spacing(values, dtype).square() / 12


@dataclass(frozen=True)
class GridFit:
    """How a tensor lies on the grid of another: share of elements within half a step, the largest distance in steps."""

    group: int
    levels: int
    """The most values that a group can take, from its lowest to its highest."""
    within: float
    largest: float


def fit_grid(original: Tensor, copy: Tensor, dtype: str) -> GridFit | None:
    """Compare `original` with the grid that `copy` (same shape, stored as `dtype`) lies on; None if it is on none.

    Grids are the whole multiples of one step in each group of a row; the widest group that fits
    is taken.
    """
    columns = copy[0].numel()
    for width in (columns, *(group for group in _GROUPS if group < columns)):
        step = _steps(_grouped(copy.double(), width), dtype)
        if step is not None:
            return measure_grid(original.double(), copy.double(), width, step, dtype)
    return None


def lies_on_grid(values: Tensor, dtype: str) -> bool:
    """Whether a matrix looks like the values of an integer grid, judged by its first rows."""
    rows = values[:_PROBED].double()
    widths = (rows[0].numel(), *_GROUPS)
    return any(_steps(_grouped(rows, width), dtype) is not None for width in widths if width <= rows[0].numel())


def measure_grid(original: Tensor, copy: Tensor, width: int, step: Tensor, dtype: str) -> GridFit:
    """How far `original` lies from `copy`, in steps; `step` is (groups, 1), groups of `width` neighbours in a row.

    Values beyond the ends of a group's grid count as within: quantizers clip them. `dtype` is how
    the copy's values are stored, whose own error is forgiven.
    """
    x, y = _grouped(original, width), _grouped(copy, width)
    slack = y.abs() * _relative_error(dtype)
    distance = (((x - y).abs() - slack).clamp_min(0) / step).masked_fill(_beyond(x, y), 0.0)
    levels = int(((y.amax(1) - y.amin(1)) / step[:, 0]).round().max()) + 1
    padding = x.numel() - original.numel()
    within = (int((distance <= 0.501).sum()) - padding) / original.numel()
    return GridFit(width, levels, within, float(distance.max()))


def _grouped(values: Tensor, width: int) -> Tensor:
    """Groups of `width` neighbours in a row, (n, width); the last group of a row is filled with zeros."""
    rows = values.reshape(len(values), -1)
    return torch.nn.functional.pad(rows, (0, -rows.shape[1] % width)).reshape(-1, width)


def _steps(values: Tensor, dtype: str) -> Tensor | None:
    """The step of each row of `values` (n, width) as (n, 1), or None if a row is no multiple of any; zeros fit all."""
    filled = values.any(1)
    rows = values[filled]
    if not len(rows) or _divisors(rows[:_PROBED], dtype) is None:
        return None  # most tensors are on no grid, and a few rows show it
    divisors = _divisors(rows, dtype)
    if divisors is None:
        return None
    steps = torch.ones((len(values), 1), dtype=values.dtype)
    steps[filled] = _refined(rows, _smallest(rows) / divisors)
    return steps


def _divisors(rows: Tensor, dtype: str) -> Tensor | None:
    """Into how many steps the smallest value of each row falls, (n, 1), or None if a row fits no number.

    That value is a whole number of steps, and rarely a large one. Values may be off by the error
    of their type, and by that of the step.
    """
    units = rows / _smallest(rows)
    slack, span = 2 * units.abs() * _relative_error(dtype), units.amax(1) - units.amin(1)
    found, left = torch.zeros(len(rows), dtype=rows.dtype), torch.arange(len(rows))
    for divisor in range(1, _DIVISORS + 1):
        places = units[left] * divisor
        off = (places - places.round()).abs() - slack[left] * divisor
        fits = (off.amax(1) <= _WHOLE) & (span[left] * divisor < _LEVELS)
        found[left[fits]] = divisor
        # More divisors only make the span wider: a row that is too wide now stays so.
        if bool((~fits & (span[left] * (divisor + 1) >= _LEVELS)).any()):
            return None
        left = left[~fits]
        if not len(left):
            return found.unsqueeze(1)
    return None


def _smallest(rows: Tensor) -> Tensor:
    """The smallest magnitude other than zero in each row, (n, 1)."""
    magnitude = rows.abs()
    return magnitude.masked_fill(magnitude == 0, torch.inf).amin(1, keepdim=True)


def _refined(rows: Tensor, steps: Tensor) -> Tensor:
    """The steps (n, 1) by least squares over all values of their rows."""
    places = (rows / steps).round()
    return (rows * places).sum(1, keepdim=True) / places.square().sum(1, keepdim=True)


def _relative_error(dtype: str) -> float:
    return 2.0 ** -(MANTISSA[dtype] + 1)


def _beyond(original: Tensor, grouped: Tensor) -> Tensor:
    low, high = grouped.amin(1, keepdim=True), grouped.amax(1, keepdim=True)
    return ((grouped == low) & (original < low)) | ((grouped == high) & (original > high))
