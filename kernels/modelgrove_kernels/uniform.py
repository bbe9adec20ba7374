"""Equal steps at any number of bits, in layout `lut`: w = (code - 2^(bits - 1)) · scale, with one scale a group.

There is one level more below zero than above. A scale may be negative, so that this level lies on the side of the
group's largest value; at 2 and 3 bits that is worth more than a zero point's bytes.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from modelgrove_kernels.bitstream import pack_bits
from modelgrove_kernels.gptq import compensated
from modelgrove_kernels.packing import group_width

_SHRINKS = tuple(1 - step / 20 for step in range(11))
"""Shares of the group's range that are tried: at few bits it pays to cut off what is far out."""


def uniform_parts(weight: Tensor, bits: int, group: int | None, gram: Tensor | None = None) -> dict[str, Tensor]:
    """codes, scales and table for (rows, K) of any floating dtype, rounded to nearest, or by GPTQ with `gram` (K, K).

    Raises:
        ValueError: a value or the Gram matrix is not finite.
    """
    exact = weight.float()
    if not bool(torch.isfinite(exact).all()):
        raise ValueError("NaN or infinite values cannot be quantized")
    columns = exact.shape[1]
    width, half = group_width(columns, bits, group), 2 ** (bits - 1)
    scales = _scales(exact, width, half)
    wide = scales.float().repeat_interleave(width, 1)[:, :columns]
    if gram is None:
        steps = (exact / wide).round().clamp(-half, half - 1)
    else:
        low, high = torch.full_like(wide, -half), torch.full_like(wide, half - 1)
        steps = compensated(exact, gram, wide, low, high)
    padded = functional.pad(steps + half, (0, scales.shape[1] * width - columns), value=half)
    table = torch.arange(-half, half, dtype=torch.float16).view(1, -1, 1)
    return {"codes": pack_bits(padded.to(torch.uint8), bits), "scales": scales, "table": table}


def _scales(exact: Tensor, width: int, half: int) -> Tensor:
    """(rows, groups): of the shrunk ranges the one with the least squared error, as it is stored."""
    rows, columns = exact.shape
    groups = -(-columns // width)
    values = functional.pad(exact, (0, groups * width - columns)).view(rows, groups, width)
    far = values.gather(-1, values.abs().argmax(-1, keepdim=True))
    whole = torch.where(far == 0, 1.0, -far / half)
    best, least = whole, torch.full_like(whole, torch.inf)
    for shrink in _SHRINKS:
        scale = _stored(whole * shrink).float()
        error = ((values / scale).round().clamp(-half, half - 1) * scale - values).square().sum(-1, keepdim=True)
        best, least = torch.where(error < least, scale, best), torch.minimum(error, least)
    return _stored(best.squeeze(-1))


def _stored(scales: Tensor) -> Tensor:
    """Float16 if every scale is in its normal range, else float32."""
    sizes, small = scales.abs(), torch.finfo(torch.float16)
    fits = bool(((sizes >= small.smallest_normal) & (sizes <= small.max)).all())
    return scales.half() if fits else scales
