"""The second kernel: int8 dot products of rounded activations with 4-bit weights, block by block.

    y[m, n] = a[m] · Σ_g w_scale[n, g] · Σ_{k∈g} code_a[m, k] · w[n, k]  +  Σ_r hidden[m, r] · up[n, r]  +  bias[n]

with w = code - zero or w = table[code], both exact in int8, so that the sums over a block are exact in int32. The up
projection and the bias are added before a tile is stored, as in SVDQuant, arXiv 2411.05007, section 4.2. Weights are
read in the order of `matmul.prepack`, whose neighbours along k lie in 16 bytes. Speed on a GPU is unmeasured.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from modelgrove_kernels.matmul import PANEL, UNIT, blocking
from modelgrove_kernels.triton.activations import Activations, quantize_rows, store_tile, tile

BLOCK_N = 64
"""Outputs that one program computes: whole panels."""
BLOCKS_K = (32, 64, 128)
"""Inputs of one step: no fewer than an int8 matrix instruction takes, no more than the registers hold."""
BLOCK_R = 32
"""Ranks of one step of the up projection."""
_PANEL, _UNIT, _TABLE = tl.constexpr(PANEL), tl.constexpr(UNIT), tl.constexpr(16)


def linear(
    x: Tensor,
    weight: Tensor,
    rows: int,
    group: int,
    smooth: Tensor | None = None,
    branch: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    look_up: bool,
) -> Tensor:
    """What `modelgrove::linear_w4a8` or, with `look_up`, `modelgrove::linear_lut4a8` computes; arguments are theirs."""
    columns = x.shape[-1]
    rank = 0 if branch is None else branch.numel() // max(1, columns + triton.cdiv(rows, PANEL) * PANEL)
    activations = quantize_rows(x.reshape(-1, columns), smooth, branch, rank)
    y = x.new_empty((len(activations.codes), rows), dtype=torch.float32)
    if y.numel():
        _launch(activations, weight, group, branch, bias, y, look_up=look_up)
    return y.view(*x.shape[:-1], rows)


def _launch(
    activations: Activations,
    weight: Tensor,
    group: int,
    branch: Tensor | None,
    bias: Tensor | None,
    y: Tensor,
    *,
    look_up: bool,
) -> None:
    (m, rows), columns, rank = y.shape, activations.codes.shape[1], activations.hidden.shape[1]
    padded, width = blocking(group)
    block_m = 16 if m <= 16 else 64
    _linear[(triton.cdiv(m, block_m), triton.cdiv(rows, BLOCK_N))](
        *activations,
        weight,
        weight.view(torch.float32),
        y if branch is None else branch[rank * columns :],
        y if bias is None else bias,
        y,
        m,
        rows,
        columns,
        triton.cdiv(columns, group) * (padded // width),
        rank,
        LOOK_UP=look_up,
        BIASED=bias is not None,
        GROUP=group,
        PADDED=padded,
        WIDTH=width,
        BLOCK_M=block_m,
        BLOCK_N=BLOCK_N,
        BLOCK_K=min(BLOCKS_K, key=lambda size: (triton.cdiv(width, size) * size, -size)),
        BLOCK_R=BLOCK_R,
    )


@triton.jit  # type: ignore[untyped-decorator]  # triton has no types
def _linear(
    activations: tl.tensor,
    row_scales: tl.tensor,
    hidden: tl.tensor,
    weight: tl.tensor,
    weight_floats: tl.tensor,
    up: tl.tensor,
    bias: tl.tensor,
    y: tl.tensor,
    m: tl.tensor,
    n: tl.tensor,
    columns: tl.tensor,
    blocks: tl.tensor,
    rank: tl.tensor,
    LOOK_UP: tl.constexpr,
    BIASED: tl.constexpr,
    GROUP: tl.constexpr,
    PADDED: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_R: tl.constexpr,
) -> None:
    """One tile of y; `weight_floats` are the bytes of `weight` as float32."""
    rows = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    outputs = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    pairs = tl.program_id(1) * (BLOCK_N // 2) + tl.arange(0, BLOCK_N // 2)
    total = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for block in range(blocks):
        sums = tl.zeros((BLOCK_M, BLOCK_N), tl.int32)
        passed = block % (PADDED // WIDTH) * WIDTH
        record = _record(outputs // _PANEL, block, blocks, WIDTH, LOOK_UP)
        for start in range(0, WIDTH, BLOCK_K):
            places = start + tl.arange(0, BLOCK_K)
            code = _codes(weight, pairs, places, block, n, blocks, WIDTH, LOOK_UP)
            if LOOK_UP:
                entries = weight + _table(outputs, blocks, WIDTH)[None, :] + code
                whole = tl.load(entries, mask=(outputs < n)[None, :], other=0).to(tl.int8, bitcast=True)
            else:
                zeros = weight + record + _PANEL * (WIDTH // 2 + 4) + outputs % _PANEL
                whole = code.to(tl.int8) - tl.load(zeros, mask=outputs < n, other=0).to(tl.int8)[None, :]
            # To `tile`, what is past the block or the group is past the matrix too: 0, whatever the codes say there.
            inside = (places < WIDTH) & (passed + places < GROUP)
            column = tl.where(inside, block // (PADDED // WIDTH) * GROUP + passed + places, columns)
            sums = tl.dot(tile(activations, rows, column, m, columns), whole, sums, out_dtype=tl.int32)
        scales = weight_floats + (record + _PANEL * (WIDTH // 2)) // 4 + outputs % _PANEL
        total += sums.to(tl.float32) * tl.load(scales, mask=outputs < n, other=0.0)[None, :]
    total *= tl.load(row_scales + rows, mask=rows < m, other=0.0)[:, None]
    for first in range(0, rank, BLOCK_R):
        ranks = first + tl.arange(0, BLOCK_R)
        places = (outputs // _PANEL)[None, :] * (rank * _PANEL) + ranks[:, None] * _PANEL + (outputs % _PANEL)[None, :]
        factor = tl.load(up + places, mask=(ranks < rank)[:, None] & (outputs < n)[None, :], other=0.0)
        total = tl.dot(tile(hidden, rows, ranks, m, rank), factor, total, input_precision="ieee")
    if BIASED:
        total += tl.load(bias + outputs, mask=outputs < n, other=0.0)[None, :]
    store_tile(y, total, rows, outputs, m, n)


@triton.jit  # type: ignore[untyped-decorator]  # triton has no types
def _record(
    panel: tl.tensor, block: tl.tensor, blocks: tl.tensor, WIDTH: tl.constexpr, LOOK_UP: tl.constexpr
) -> tl.tensor:
    """Where the record of a panel's block begins, in bytes; a panel of a look-up layout begins with its tables."""
    size: tl.constexpr = _PANEL * (WIDTH // 2 + (4 if LOOK_UP else 5))
    tables: tl.constexpr = _PANEL * _TABLE if LOOK_UP else 0
    return panel.to(tl.int64) * (tables + blocks * size) + tables + block * size


@triton.jit  # type: ignore[untyped-decorator]  # triton has no types
def _table(outputs: tl.tensor, blocks: tl.tensor, WIDTH: tl.constexpr) -> tl.tensor:
    """Where the tables of those outputs begin: per half, quarter and lane of a panel."""
    half, lane, quarter = outputs % _PANEL // 16, outputs % 16 // 4, outputs % 4
    panel = _record(outputs // _PANEL, 0, blocks, WIDTH, True) - _PANEL * _TABLE
    return panel + ((half * 4 + quarter) * 4 + lane) * _TABLE


@triton.jit  # type: ignore[untyped-decorator]  # triton has no types
def _codes(
    weight: tl.tensor,
    pairs: tl.tensor,
    places: tl.tensor,
    block: tl.tensor,
    n: tl.tensor,
    blocks: tl.tensor,
    WIDTH: tl.constexpr,
    LOOK_UP: tl.constexpr,
) -> tl.tensor:
    """uint8 (places, 2 · pairs): codes of a block's inputs for pairs of neighbouring outputs, which share a byte."""
    record = _record(pairs // (_PANEL // 2), block, blocks, WIDTH, LOOK_UP)
    half, lane, quarters = pairs % (_PANEL // 2) // 8, pairs % 8 // 2, pairs % 2
    columns = record + half * (WIDTH * 8) + quarters * (4 * _UNIT) + lane * _UNIT
    inputs = places // _UNIT * (8 * _UNIT) + places % _UNIT
    inside = (places < WIDTH)[:, None] & (pairs * 2 < n)[None, :]
    both = tl.load(weight + inputs[:, None] + columns[None, :], mask=inside, other=0)
    return tl.interleave(both & 15, both >> 4)
