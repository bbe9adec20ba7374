"""Twin-log quantization of LRQ-DiT (Yang et al., arXiv 2508.03485): levels that lie dense where weights do.

Positive and negative weights are coded apart, 2^(b-1) levels each, in equal steps Δ of log2(|w| + η):

    |ŵ| = 2^((zp + k) · Δ) - η,   zp = round(l / Δ),   Δ = (u - l) / (2^(b-1) - 1)

with [l, u] the range of log2(|w| + η) on that side of a row; η > 0 lets zero have a logarithm and thins the levels out
around it. η and the percentiles at which the two sides are cut off are those of the least squared error. The error
is a sum over the two sides, so for each η their percentiles are found one by one; every row has its own η, which costs
nothing, as each row has its own table (of Δ and zp as well). Then each weight takes the nearest level, which no
rounding of logarithms can beat. A row is divided by its largest |w| before, so that η is relative to it.
"""

from __future__ import annotations

import torch
from torch import Tensor

from modelgrove_kernels.bitstream import pack_bits
from modelgrove_kernels.packing import chunks, stored

SHIFTS = (0.0, 0.001, 0.005, 0.01, 0.02, 0.03, 0.04, 0.05, 0.1, 0.2, 0.3, 0.4, 0.5)
"""η of the search."""
PERCENTILES = (0.98, 0.99, 0.999, 0.9999, 0.99999)
"""Shares of a side's weights that are within its range."""
_TINY = 2.0**-24
"""The least |w| + η that has a logarithm of its own."""


def twin_log_parts(weight: Tensor, bits: int) -> dict[str, Tensor]:
    """codes, scales (rows, 1) and table (rows, 2^bits, 1) of layout `lut` for (rows, K) of any floating dtype.

    Raises:
        ValueError: a value is not finite.
    """
    exact = weight.float()
    if not bool(torch.isfinite(exact).all()):
        raise ValueError("NaN or infinite values cannot be quantized")
    scales = stored(exact.abs().amax(1, keepdim=True))
    tables, codes = [], []
    for part in chunks(*exact.shape):
        shares = exact[part] / scales[part].float()
        table = _levels(shares, bits).sort(1).values.half()
        levels = table.float()
        bounds = ((levels[:, 1:] + levels[:, :-1]) / 2).contiguous()
        codes.append(pack_bits(torch.searchsorted(bounds, shares.contiguous()).to(torch.uint8), bits))
        tables.append(table)
    return {"codes": torch.cat(codes), "scales": scales, "table": torch.cat(tables).unsqueeze(-1)}


def uniform_error(weight: Tensor, bits: int) -> float:
    """‖W - Ŵ‖ / ‖W‖ of 2^bits equal steps over each row's range: what twin-log is compared with."""
    exact = weight.float()
    low, high = exact.amin(1, keepdim=True).clamp_max(0), exact.amax(1, keepdim=True).clamp_min(0)
    step = high / (2**bits - 1) - low / (2**bits - 1)
    step = torch.where(step == 0, 1.0, step)
    zero = (-low / step).round()
    found = ((exact / step).round() + zero).clamp(0, 2**bits - 1).sub(zero) * step
    norm = float(exact.norm())
    return float((found - exact).norm()) / norm if norm else 0.0


def _levels(shares: Tensor, bits: int) -> Tensor:
    """The best levels (rows, 2^bits) for float32 (rows, K) within [-1, 1], the negative ones first."""
    half = 2 ** (bits - 1)
    positive = shares >= 0
    least, tops = _extent(shares)
    found = torch.empty(len(shares), 2 * half)
    fewest = torch.full((len(shares),), torch.inf)
    for shift in SHIFTS:
        logs = (shares.abs() + shift).clamp_min(_TINY).log2_()
        low = (least + shift).clamp_min(_TINY).log2()
        sides = torch.empty(len(shares), 2, half)
        errors = torch.full((len(shares), 2), torch.inf)
        for top in tops.unbind(-1):
            high = (top + shift).clamp_min(_TINY).log2()
            step = (high - low) / (half - 1)
            start = torch.where(step > 0, (low / torch.where(step > 0, step, 1.0)).round() * step, low)
            steps = torch.arange(half)
            levels = (start.unsqueeze(-1) + steps * step.unsqueeze(-1)).exp2() - shift
            error = _errors(shares, positive, logs, start, step, levels)
            better = error < errors
            errors = torch.where(better, error, errors)
            sides = torch.where(better.unsqueeze(-1), levels, sides)
        total = errors.sum(1)
        better = total < fewest
        fewest = torch.where(better, total, fewest)
        signed = torch.cat([-sides[:, 0], sides[:, 1]], 1)
        found = torch.where(better.unsqueeze(-1), signed, found)
    return found


def _extent(shares: Tensor) -> tuple[Tensor, Tensor]:
    """Of the negative and the positive side of each row: the least |w|, and its percentiles.

    (rows, 2) and (rows, 2, percentiles); 1 for a side without weights.
    """
    ranked = shares.sort(1).values
    sides, columns = [], shares.shape[1]
    for side, ascending in ((shares < 0, -ranked.flip(1)), (shares >= 0, ranked)):
        count = side.sum(1, keepdim=True)
        places = (torch.tensor((0.0, *PERCENTILES)) * (count - 1)).round().long() + columns - count
        sizes = ascending.gather(1, places.clamp(0, columns - 1))
        sides.append(torch.where(count > 0, sizes, 1.0))
    both = torch.stack(sides, 1)
    return both[:, :, 0], both[:, :, 1:]


def _errors(shares: Tensor, positive: Tensor, logs: Tensor, start: Tensor, step: Tensor, levels: Tensor) -> Tensor:
    """Squared errors (rows, 2) of the negative and the positive side when logarithms are rounded to the levels."""
    half = levels.shape[-1]
    steps = torch.where(step > 0, step, 1.0)
    first, width = (torch.where(positive, side[:, 1:], side[:, :1]) for side in (start, steps))
    codes = (logs - first).div_(width).round_().clamp_(0, half - 1).long()
    sizes = levels.flatten(1).gather(1, codes + positive * half)
    squares = sizes.sub_(shares.abs()).square_()
    upper = (squares * positive).sum(1)
    return torch.stack([squares.sum(1) - upper, upper], 1)
