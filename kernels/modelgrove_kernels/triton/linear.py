"""The second kernel: int8 dot products of rounded activations with 4-bit weights, group by group.

    y[m, n] = a[m] · Σ_g w_scale[n, g] · Σ_{k∈g} code_a[m, k] · w[n, k]  +  Σ_r hidden[m, r] · up[n, r]  +  bias[n]

with w = code - zero (`linear_w4a8`) or w = table[code] (`linear_lut4`), both exact in int8, so that the sums over a
group are exact in int32. The up projection and the bias are added before a tile is stored, as in SVDQuant, arXiv
2411.05007, section 4.2. Speed on a GPU is unmeasured.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from modelgrove_kernels.triton.activations import Activations, block_of_ranks, quantize_rows, store_tile, tile

BLOCK_N = 64
"""Outputs that one program computes."""
FEWEST_K, MOST_K = 32, 128
"""Columns of one step: no fewer than an int8 matrix instruction takes, no more than the registers hold."""
LEVELS = tl.constexpr(16)


def linear_w4a8(
    x: Tensor,
    codes: Tensor,
    scales: Tensor,
    zeros: Tensor,
    group: int,
    smooth: Tensor | None = None,
    down: Tensor | None = None,
    up: Tensor | None = None,
    bias: Tensor | None = None,
) -> Tensor:
    """y (…, N) float32 of x (…, K) and w = (code - zero) · scale.

    `codes` uint8 (N, padded / 2), the even column in the low nibble; `scales` floating point and `zeros` uint8
    (N, groups), padded = groups · `group` ≥ K; `smooth` (K,), `down` (r, K), `up` (N, r), `bias` (N,). A row of x that
    is not finite gives a row of NaN.
    """
    rows = quantize_rows(x.flatten(0, -2), smooth, down)
    return _launch(rows, codes, scales, zeros, group, up, bias, look_up=False).view(*x.shape[:-1], len(codes))


def linear_lut4(
    x: Tensor,
    codes: Tensor,
    scales: Tensor,
    table: Tensor,
    group: int,
    smooth: Tensor | None = None,
    down: Tensor | None = None,
    up: Tensor | None = None,
    bias: Tensor | None = None,
) -> Tensor:
    """y (…, N) float32 of x (…, K) and w = table[code] · scale, `table` int8 (1 | N, 16): one for all rows or one each.

    The rest is as in `linear_w4a8`.
    """
    rows = quantize_rows(x.flatten(0, -2), smooth, down)
    return _launch(rows, codes, scales, table, group, up, bias, look_up=True).view(*x.shape[:-1], len(codes))


def _launch(
    rows: Activations,
    codes: Tensor,
    scales: Tensor,
    levels: Tensor,
    group: int,
    up: Tensor | None,
    bias: Tensor | None,
    look_up: bool,
) -> Tensor:
    (m, columns), (n, groups) = rows.codes.shape, scales.shape
    y = torch.empty((m, n), dtype=torch.float32, device=codes.device)
    if not y.numel():
        return y
    rank = rows.hidden.shape[1]
    block_m = 16 if m <= 16 else 64
    _linear[(triton.cdiv(m, block_m), triton.cdiv(n, BLOCK_N))](
        *rows,
        codes.contiguous(),
        scales.contiguous(),
        levels.contiguous(),
        y if up is None else up.contiguous(),
        y if bias is None else bias.contiguous(),
        y,
        m,
        n,
        columns,
        groups,
        rank,
        LEVELS if len(levels) > 1 else 0,
        LOOK_UP=look_up,
        BIASED=bias is not None,
        GROUP=group,
        BLOCK_M=block_m,
        BLOCK_N=BLOCK_N,
        BLOCK_K=min(MOST_K, max(FEWEST_K, triton.next_power_of_2(group))),
        BLOCK_R=block_of_ranks(rank),
    )
    return y


@triton.jit  # type: ignore[untyped-decorator]  # triton has no types
def _linear(
    activations: tl.tensor,
    row_scales: tl.tensor,
    hidden: tl.tensor,
    codes: tl.tensor,
    scales: tl.tensor,
    levels: tl.tensor,
    up: tl.tensor,
    bias: tl.tensor,
    y: tl.tensor,
    m: tl.tensor,
    n: tl.tensor,
    columns: tl.tensor,
    groups: tl.tensor,
    rank: tl.tensor,
    table_stride: tl.tensor,
    LOOK_UP: tl.constexpr,
    BIASED: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_R: tl.constexpr,
) -> None:
    """One tile of y. `levels` are the zero points, or the table with its rows `table_stride` apart, 0 for a single one."""
    rows = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    outputs = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    total = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for group in range(groups):
        sums = tl.zeros((BLOCK_M, BLOCK_N), tl.int32)
        for start in range(0, GROUP, BLOCK_K):
            code = _codes(codes, outputs, group, start, n, groups, GROUP, BLOCK_K)
            if LOOK_UP:
                weight = tl.load(levels + outputs[:, None] * table_stride + code, mask=(outputs < n)[:, None], other=0)
            else:
                zero = tl.load(levels + outputs.to(tl.int64) * groups + group, mask=outputs < n, other=0)
                weight = code.to(tl.int8) - zero.to(tl.int8)[:, None]
            place = start + tl.arange(0, BLOCK_K)
            # Columns past the group are those past the matrix to `tile`: what the codes say there does not count.
            column = tl.where(place < GROUP, group * GROUP + place, columns)
            rounded = tile(activations, rows, column, m, columns)
            sums = tl.dot(rounded, tl.trans(weight), sums, out_dtype=tl.int32)
        scale = tl.load(scales + outputs.to(tl.int64) * groups + group, mask=outputs < n, other=0.0)
        total += sums.to(tl.float32) * scale.to(tl.float32)[None, :]
    total *= tl.load(row_scales + rows, mask=rows < m, other=0.0)[:, None]
    if BLOCK_R:
        ranks = tl.arange(0, BLOCK_R)
        factor = tile(up, outputs, ranks, n, rank).to(tl.float32)
        total = tl.dot(tile(hidden, rows, ranks, m, rank), tl.trans(factor), total, input_precision="ieee")
    if BIASED:
        total += tl.load(bias + outputs, mask=outputs < n, other=0.0).to(tl.float32)[None, :]
    store_tile(y, total, rows, outputs, m, n)


@triton.jit  # type: ignore[untyped-decorator]  # triton has no types
def _codes(
    codes: tl.tensor,
    outputs: tl.tensor,
    group: tl.tensor,
    start: tl.tensor,
    n: tl.tensor,
    groups: tl.tensor,
    GROUP: tl.constexpr,
    BLOCK_K: tl.constexpr,
) -> tl.tensor:
    """uint8 (BLOCK_N, BLOCK_K): the codes of a group from its column `start` on, 0 past the last group."""
    pair = group * (GROUP // 2) + start // 2 + tl.arange(0, BLOCK_K // 2)
    pairs = tile(codes, outputs, pair, n, groups * (GROUP // 2))
    return tl.interleave(pairs & 15, pairs >> 4)
