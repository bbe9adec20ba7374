"""The first kernel: smoothing, rounding of activations to int8 with one scale a token, and the down projection.

A row of x is read twice, once for its largest magnitude and its product with `down`, once to be rounded; the second
time it comes from the cache. What it computes is that of SVDQuant, arXiv 2411.05007, section 4.2 ("fuse the
down-projection with the quantization kernel"), with int8 activations instead of 4 bits. Speed on a GPU is unmeasured.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from modelgrove_kernels.matmul import PANEL

BLOCK_M, BLOCK_K = 16, 128
"""Rows and columns that one program holds at a time; fewer columns beside a branch of high rank."""
LARGEST_FACTOR = 4096
"""Elements of `down` that one program holds at a time."""
LARGEST_CODE = tl.constexpr(127.0)
_PANEL = tl.constexpr(PANEL)
INFINITY = tl.constexpr(float("inf"))
ROUNDER = tl.constexpr(12582912.0)
"""1.5 · 2²³: added to a small float32 and taken off again, it leaves the nearest whole number, the even one of two."""


class Activations(NamedTuple):
    """Rounded activations: x' ≈ codes · scales. `codes` int8 (m, K), `scales` float32 (m,), `hidden` float32 (m, r)."""

    codes: Tensor
    scales: Tensor
    hidden: Tensor


def quantize_rows(x: Tensor, smooth: Tensor | None = None, branch: Tensor | None = None, rank: int = 0) -> Activations:
    """x' = x / s rounded to int8 with a scale per row, and x' · downᵀ of the unrounded x'.

    x float32 (m, K), `smooth` s (K,), `branch` as `matmul.prepack_branch` makes it, of `rank` r with padding. A
    scale is max|x'| / 127, 1 where that is 0, and NaN for a row with a value that is not finite, whose codes are 0.
    """
    m, columns = x.shape
    x = x.contiguous()
    codes = torch.empty((m, columns), dtype=torch.int8, device=x.device)
    scales, hidden = (torch.empty(shape, dtype=torch.float32, device=x.device) for shape in ((m,), (m, rank)))
    block_r = max(16, triton.next_power_of_2(rank)) if rank else 0
    if m:
        _quantize_rows[(triton.cdiv(m, BLOCK_M),)](
            x,
            x if smooth is None else smooth,
            x if branch is None else branch,
            codes,
            scales,
            hidden,
            m,
            columns,
            rank,
            SMOOTHED=smooth is not None,
            BLOCK_M=BLOCK_M,
            BLOCK_K=max(16, min(BLOCK_K, LARGEST_FACTOR // block_r)) if rank else BLOCK_K,
            BLOCK_R=block_r,
        )
    return Activations(codes, scales, hidden)


@triton.jit  # type: ignore[untyped-decorator]  # triton has no types
def _quantize_rows(
    x: tl.tensor,
    smooth: tl.tensor,
    down: tl.tensor,
    codes: tl.tensor,
    scales: tl.tensor,
    hidden: tl.tensor,
    m: tl.tensor,
    columns: tl.tensor,
    rank: tl.tensor,
    SMOOTHED: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_R: tl.constexpr,
) -> None:
    rows = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    largest = tl.zeros((BLOCK_M,), tl.float32)
    if BLOCK_R:
        projected = tl.zeros((BLOCK_M, BLOCK_R), tl.float32)
    for start in range(0, columns, BLOCK_K):
        places = start + tl.arange(0, BLOCK_K)
        values = _smoothed(x, smooth, rows, places, m, columns, SMOOTHED)
        # Written so that NaN, for which every comparison is false, counts as infinite too.
        magnitudes = tl.where(tl.abs(values) < INFINITY, tl.abs(values), INFINITY)
        largest = tl.maximum(largest, tl.max(magnitudes, 1))
        if BLOCK_R:
            factor = _down(down, places, tl.arange(0, BLOCK_R), columns, rank)
            projected = tl.dot(values, factor, projected, input_precision="ieee")
    finite = largest < INFINITY
    scale = tl.div_rn(largest, LARGEST_CODE)
    scale = tl.where(scale > 0, scale, 1.0)
    tl.store(scales + rows, tl.where(finite, scale, float("nan")), mask=rows < m)
    if BLOCK_R:
        store_tile(hidden, projected, rows, tl.arange(0, BLOCK_R), m, rank)
    for start in range(0, columns, BLOCK_K):
        places = start + tl.arange(0, BLOCK_K)
        values = _smoothed(x, smooth, rows, places, m, columns, SMOOTHED)
        steps = _rounded(tl.where(finite[:, None], values, 0.0), scale)
        store_tile(codes, steps.to(tl.int8), rows, places, m, columns)


@triton.jit  # type: ignore[untyped-decorator]  # triton has no types
def tile(matrix: tl.tensor, rows: tl.tensor, places: tl.tensor, height: tl.tensor, width: tl.tensor) -> tl.tensor:
    """Those rows and columns of a contiguous matrix (height, width), 0 outside of it."""
    inside = (rows < height)[:, None] & (places < width)[None, :]
    return tl.load(matrix + rows.to(tl.int64)[:, None] * width + places[None, :], mask=inside, other=0)


@triton.jit  # type: ignore[untyped-decorator]  # triton has no types
def store_tile(
    matrix: tl.tensor, values: tl.tensor, rows: tl.tensor, places: tl.tensor, height: tl.tensor, width: tl.tensor
) -> None:
    """The inverse of `tile`."""
    inside = (rows < height)[:, None] & (places < width)[None, :]
    tl.store(matrix + rows.to(tl.int64)[:, None] * width + places[None, :], values, mask=inside)


@triton.jit  # type: ignore[untyped-decorator]  # triton has no types
def _smoothed(
    x: tl.tensor,
    smooth: tl.tensor,
    rows: tl.tensor,
    places: tl.tensor,
    m: tl.tensor,
    columns: tl.tensor,
    SMOOTHED: tl.constexpr,
) -> tl.tensor:
    """A tile of x / s, 0 outside of the matrix."""
    values = tile(x, rows, places, m, columns)
    if SMOOTHED:
        divisor = tl.load(smooth + places, mask=places < columns, other=1.0)
        values = tl.div_rn(values, tl.broadcast_to(divisor[None, :], values.shape))
    return values


@triton.jit  # type: ignore[untyped-decorator]  # triton has no types
def _down(down: tl.tensor, places: tl.tensor, ranks: tl.tensor, columns: tl.tensor, rank: tl.tensor) -> tl.tensor:
    """downᵀ (places, ranks), whose ranks lie PANEL by PANEL and the columns of each input together."""
    first = ranks // _PANEL * _PANEL
    together = tl.minimum(rank - first, _PANEL)
    inside = (places < columns)[:, None] & (ranks < rank)[None, :]
    return tl.load(down + first * columns + places[:, None] * together + (ranks - first), mask=inside, other=0.0)


@triton.jit  # type: ignore[untyped-decorator]  # triton has no types
def _rounded(values: tl.tensor, scale: tl.tensor) -> tl.tensor:
    """Whole numbers within ±127; the division is IEEE's, as a CPU's is: `/` is not on a GPU."""
    steps = tl.div_rn(values, tl.broadcast_to(scale[:, None], values.shape))
    steps = (steps + ROUNDER) - ROUNDER
    return tl.minimum(tl.maximum(steps, -LARGEST_CODE), LARGEST_CODE)
