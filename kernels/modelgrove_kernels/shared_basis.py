"""A shared orthogonal basis for each input width: adapters trained in disjoint columns never read each other's inputs.

Orthogonal Adaptation (Po et al., arXiv 2312.02432) freezes the input factor of an update A Bᵀ to r columns of one
orthogonal matrix O of the layer's input width, and trains A alone. Of two updates without a common column, BᵢᵀBⱼ = 0.
O depends on the width and a seed, so nobody needs a file. In LoRA's terms Bᵀ is `down` (r, width).
"""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

MAX_ELEMENTS = 2**27
"""Of the part of O that is computed: 1 GiB in float64."""


class Fit(NamedTuple):
    """How a down factor lies to the columns C of its basis."""

    rows: float
    """‖down − s·Cᵀ‖ / ‖down‖ for the best scale s: 0 if the rows are the columns themselves."""
    span: float
    """‖down − down·C·Cᵀ‖ / ‖down‖: 0 if it reads nothing but the columns, whatever its rows are made of."""


class Found(NamedTuple):
    """The columns that a down factor reads most."""

    columns: tuple[int, ...]
    outside: float
    """‖down‖ outside them, over ‖down‖: 0 if it reads these columns alone, near 1 if it knows nothing of the basis."""


def basis(width: int, seed: int, count: int) -> Tensor:
    """The first `count` columns of O, (width, count) float32, orthonormal. Do not change it: it is kept.

    O is the orthogonal factor of a seeded Gaussian matrix in float64, with signs that make the other factor's diagonal
    positive, and so uniformly distributed. Its first columns depend on the first columns of the Gaussian alone, which
    come from NumPy's frozen MT19937 stream: the same on every machine and with every version, but for rounding.

    Raises:
        ValueError: there is no such basis: count > width, a number below its least, or a seed of more than 32 bits.
    """
    if not (1 <= count <= width and 0 <= seed < 2**32):
        raise ValueError(f"no basis of width {width}, seed {seed} has {count} columns: 1 to width, and 32 bits of seed")
    if width * count > MAX_ELEMENTS:
        raise ValueError(f"{count} columns of width {width} are more than {MAX_ELEMENTS} numbers")
    return _basis(width, seed, count)


@lru_cache(maxsize=16)
def _basis(width: int, seed: int, count: int) -> Tensor:
    gaussian = np.random.RandomState([seed, width]).standard_normal((count, width))
    orthogonal, triangle = torch.linalg.qr(torch.from_numpy(gaussian).T)
    signs = torch.where(triangle.diagonal() < 0, -1.0, 1.0)
    signed: Tensor = orthogonal * signs
    return signed.float()


def columns(width: int, seed: int, start: int, count: int) -> Tensor:
    """O[:, start : start + count], (width, count) float32. Raises what `basis` raises."""
    if start < 0 or count < 1:
        raise ValueError(f"{count} columns from {start} on: a range starts at 0 or later and has one column or more")
    return basis(width, seed, start + count)[:, start:]


def fit(down: Tensor, own: Tensor) -> Fit:
    """How far `down` (r, width) is from the columns `own` (width, n); both numbers are 0 for a factor of zeros."""
    rows, size = down.double(), down.double().norm().item()
    if size == 0:
        return Fit(0.0, 0.0)
    wanted = own.double().T
    inside = rows @ wanted.T @ wanted
    span = (rows - inside).norm().item() / size
    if len(rows) > len(wanted):  # more rows than columns: some are none of them
        return Fit(1.0, span)
    wanted = wanted[: len(rows)]
    scale = (rows * wanted).sum() / wanted.square().sum()
    return Fit((rows - scale * wanted).norm().item() / size, span)


def find_columns(down: Tensor, whole: Tensor, tolerance: float) -> Found:
    """Which columns of `whole` (width, n) `down` (r, width) reads: at most r, those that hold most of its norm.

    Columns that hold less than `tolerance` of the norm are left out.
    """
    rows = down.double()
    energy = (rows @ whole.double()).square().sum(0)
    total = rows.square().sum()
    if total == 0:
        return Found((), 0.0)
    most = energy.topk(min(len(rows), len(energy)))
    kept = most.indices[most.values > tolerance**2 * total]
    rest = (1 - energy[kept].sum() / total).clamp(min=0)
    return Found(tuple(sorted(kept.tolist())), rest.sqrt().item())
