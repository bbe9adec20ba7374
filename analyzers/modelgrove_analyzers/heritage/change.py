"""How one tensor became another: relative change, direction, and the rank of the difference."""

from __future__ import annotations

from dataclasses import dataclass
from math import isfinite, prod

import torch
from torch import Tensor

from modelgrove_analyzers.heritage.rounding import rounding_variance

_SKETCH = 192
"""Columns of the randomized sketch: ranks up to about that are counted in matrices too large for an exact SVD."""
_SPARE = 16
_MARGIN = 1.5


@dataclass(frozen=True)
class Change:
    """What became of one tensor.

    `rank` is None where it was not counted: quantized files, and vectors that moved by more than rounding.
    """

    name: str
    shape: tuple[int, ...]
    norm: float
    relative: float
    """‖B − A‖ / ‖A‖; 1 if A is zero and B is not, or if either holds values that are no numbers."""
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
        return min(self.shape[0], prod(self.shape[1:]))


def measure(name: str, before: Tensor, after: Tensor, dtypes: tuple[str, str] | None, exact_to: int) -> Change:
    """Compare two tensors of one shape; `dtypes` are the stored ones, None if rank is not to be counted.

    Convolutions are matrices of (out, in · height · width).
    """
    shape, a, b = tuple(before.shape), before.double(), after.double()
    delta = b - a
    norm, other, moved = (float(x.norm()) for x in (a, b, delta))
    if not isfinite(norm + other):
        same = torch.equal(before.nan_to_num(), after.nan_to_num())
        return Change(name, shape, 0.0, 0.0 if same else 1.0, float(same))
    relative = moved / (norm or other) if moved else 0.0
    cosine = float((a * b).sum()) / (norm * other) if norm and other else float(norm == other)
    if dtypes is None or not moved:
        return Change(name, shape, norm, relative, cosine, None if dtypes is None else 0)
    rows = len(delta) if before.ndim >= 2 else 1
    floor = noise_floor((a.reshape(rows, -1), b.reshape(rows, -1)), dtypes)
    if before.ndim < 2:
        return Change(name, shape, norm, relative, cosine, 0 if moved <= floor else None)
    rank, at_least = count_rank(delta.reshape(rows, -1), floor, exact_to)
    return Change(name, shape, norm, relative, cosine, rank, at_least)


def noise_floor(matrices: tuple[Tensor, Tensor], dtypes: tuple[str, str]) -> float:
    """The largest singular value that rounding alone gives the difference of two stored matrices.

    A matrix of independent errors has a spectral norm of about (largest norm of a row's
    deviations) + (largest norm of a column's): Bandeira & van Handel, arXiv 1408.6185, theorem
    1.1. Each side adds its own errors, and `_MARGIN` leaves room for the arithmetic of whoever
    made the change.
    """
    first, second = (rounding_variance(matrix, dtype) for matrix, dtype in zip(matrices, dtypes, strict=True))
    variance = first + second
    return _MARGIN * (float(variance.sum(0).max().sqrt()) + float(variance.sum(1).max().sqrt()))


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
