"""How one tensor became another: relative change, direction, and the rank of the difference."""

from __future__ import annotations

from dataclasses import dataclass
from math import sqrt

import torch
from torch import Tensor

from modelgrove_analyzers.heritage.rounding import rounding_noise

_SKETCH = 192
"""Columns of the randomized sketch: ranks up to about that are counted in matrices too large for an exact SVD."""
_SPARE = 16


@dataclass(frozen=True)
class Change:
    """What became of one tensor. `rank` is None where it was not counted (vectors, quantized files)."""

    name: str
    shape: tuple[int, ...]
    norm: float
    relative: float
    """‖B − A‖ / ‖A‖; infinite if A is zero and B is not."""
    cosine: float
    rank: int | None = None
    at_least: bool = False
    """The rank is this or more: the sketch of a large matrix holds no more."""

    @property
    def changed(self) -> bool:
        """Whether any value is different."""
        return self.relative > 0

    @property
    def side(self) -> int:
        """The highest rank possible."""
        rows = self.shape[0]
        columns = 1
        for size in self.shape[1:]:
            columns *= size
        return min(rows, columns)


def measure(name: str, before: Tensor, after: Tensor, dtypes: tuple[str, str] | None, exact_to: int) -> Change:
    """Compare two tensors of one shape; `dtypes` are the stored ones, None if rank is not to be counted.

    Convolutions are matrices of (out, in · height · width).
    """
    a, b = before.double(), after.double()
    delta = b - a
    norm, other, moved = (float(x.norm()) for x in (a, b, delta))
    relative = moved / norm if norm else (float("inf") if moved else 0.0)
    cosine = float((a * b).sum()) / (norm * other) if norm and other else float(norm == other)
    shape = tuple(before.shape)
    if dtypes is None or before.ndim < 2 or not moved or not delta.numel():
        return Change(name, shape, norm, relative, cosine, 0 if dtypes and before.ndim >= 2 else None)
    floor = noise_floor((a, b), dtypes, shape)
    rank, at_least = count_rank(delta.reshape(len(delta), -1), floor, exact_to)
    return Change(name, shape, norm, relative, cosine, rank, at_least)


def noise_floor(tensors: tuple[Tensor, Tensor], dtypes: tuple[str, str], shape: tuple[int, ...]) -> float:
    """The largest singular value that rounding alone gives a difference of two stored matrices.

    An m × n matrix of independent errors with deviation σ has spectral norm about σ(√m + √n)
    (Vershynin, High-Dimensional Probability, theorem 7.3.1); each side adds its own errors.
    """
    rows = shape[0]
    columns = tensors[0].numel() // rows
    variance = sum(rounding_noise(tensor, dtype) ** 2 for tensor, dtype in zip(tensors, dtypes, strict=True))
    return sqrt(variance) * (sqrt(rows) + sqrt(columns))


def count_rank(delta: Tensor, floor: float, exact_to: int) -> tuple[int, bool]:
    """Singular values of `delta` (m, n) above `floor`, and whether there may be more.

    Exact (from the Gram matrix in float64) when the smaller side is at most `exact_to`,
    otherwise from a randomized sketch (Halko, Martinsson & Tropp, arXiv 0909.4061, algorithm 4.4).
    """
    delta = delta if delta.shape[0] <= delta.shape[1] else delta.T
    if delta.shape[0] <= exact_to:
        values = torch.linalg.eigvalsh(delta @ delta.T).clamp_min(0).sqrt()
        # Squaring costs half of the digits: what lies below is not measured, whatever the floor.
        floor = max(floor, float(values.max()) * 1e-7)
        return int((values > floor).sum()), False
    generator = torch.Generator().manual_seed(0)
    test = torch.randn((delta.shape[1], _SKETCH + _SPARE), generator=generator, dtype=delta.dtype)
    basis = torch.linalg.qr(delta @ test).Q
    basis = torch.linalg.qr(delta @ (delta.T @ basis)).Q
    rank = int((torch.linalg.svdvals(basis.T @ delta) > floor).sum())
    return min(rank, _SKETCH), rank >= _SKETCH
