"""Other programs' blocks of codes as parts of our layouts, without rounding anything again.

ggml (blocks of 32 columns; d and m float16): Q8_0 w = d · q; Q4_0 w = d · (q - 8); Q4_1 w = d · q + m, which is ours
where m is a whole number of steps. compressed-tensors: int32 words of eight codes, the first in the lowest bits.
"""

from __future__ import annotations

import torch
from torch import Tensor

from modelgrove_kernels.packing import pack_nibbles, unpack_nibbles

BLOCK = 32
_OFF = 0.01
"""Steps that a minimum may be off a whole number: float16 moves 15 of them by .0074."""


def q8_0(raw: Tensor) -> dict[str, Tensor]:
    """uint8 (rows, blocks · 34) → codes and scales of layout `int8`, groups of 32."""
    blocks = raw.view(len(raw), -1, 2 + BLOCK)
    return {"codes": blocks[..., 2:].contiguous().view(torch.int8).flatten(1), "scales": _halves(blocks, 0)}


def q4_0(raw: Tensor) -> dict[str, Tensor]:
    """uint8 (rows, blocks · 18) → codes, scales and zeros of layout `int4`, groups of 32."""
    blocks = raw.view(len(raw), -1, 2 + BLOCK // 2)
    scales = _halves(blocks, 0)
    return {"codes": _codes(blocks[..., 2:]), "scales": scales, "zeros": torch.full(scales.shape, 8, dtype=torch.uint8)}


def q4_1(raw: Tensor) -> dict[str, Tensor] | None:
    """uint8 (rows, blocks · 20) → the same, or None where a minimum is no whole number of steps from 0 to 15."""
    blocks = raw.view(len(raw), -1, 4 + BLOCK // 2)
    scales, lowest = _halves(blocks, 0), _halves(blocks, 2)
    steps = -lowest.float() / torch.where(scales == 0, 1.0, scales.float())
    zeros = steps.round()
    if not bool(((steps - zeros).abs() <= _OFF).all() & (zeros >= 0).all() & (zeros <= 15).all()):
        return None
    if bool(((scales == 0) & (lowest != 0)).any()):
        return None
    return {"codes": _codes(blocks[..., 4:]), "scales": scales, "zeros": zeros.to(torch.uint8)}


def q4_1_values(raw: Tensor) -> Tensor:
    """What Q4_1 blocks stand for, float32 (rows, columns)."""
    blocks = raw.view(len(raw), -1, 4 + BLOCK // 2)
    codes = torch.cat([blocks[..., 4:] & 15, blocks[..., 4:] >> 4], -1).float()
    return (codes * _halves(blocks, 0).float()[..., None] + _halves(blocks, 2).float()[..., None]).flatten(1)


def words_to_codes(words: Tensor, count: int) -> Tensor:
    """int32 (rows, ⌈count / 8⌉) → uint8 (rows, count) below 16."""
    # A copy in any case: one row or column counts as contiguous with strides that cannot be viewed.
    return unpack_nibbles(words.clone(memory_format=torch.contiguous_format).view(torch.uint8))[:, :count]


def _halves(blocks: Tensor, place: int) -> Tensor:
    """The float16 at a place in each block, (rows, blocks)."""
    return blocks[..., place : place + 2].contiguous().view(torch.float16).squeeze(-1)


def _codes(nibbles: Tensor) -> Tensor:
    """ggml has a block's first half in the low nibbles; ours are neighbours."""
    return pack_nibbles(torch.cat([nibbles & 15, nibbles >> 4], -1).flatten(1).contiguous())
