"""GPTQ: rounding that makes up for itself (Frantar et al., arXiv 2210.17323, algorithm 1).

Columns are rounded one after the other; what each loses is taken up by those to come, as the inverse Hessian of the
layer's squared output error, H = 2 X Xᵀ, says. Scales and zero points are those of rounding to nearest, fixed before,
so that columns may be taken in any order ("act order": the largest inputs first) and the layouts stay as they are.
(Scales that are shrunk for the least error weighted by the inputs' energy were tried: no gain on the zoo's base.)
"""

from __future__ import annotations

import torch
from torch import Tensor

from modelgrove_kernels.packing import LEVELS, Packed, pack_nibbles, quantize

BLOCK = 128
"""Columns whose errors are passed on together."""
DAMPING = 0.01
"""Share of the mean diagonal that is added to H; ten times as much while H is not positive definite."""
_TRIES = 4


def gptq(weight: Tensor, gram: Tensor, bits: int, group: int | None = None) -> Packed:
    """Round (rows, K) to 8 or 4 bits in the layouts of `packing.quantize`; `gram` (K, K) is Σ x xᵀ of the inputs.

    Raises:
        ValueError: a value of either is not finite, or the weight is none that `packing.quantize` takes.
    """
    if not bool(torch.isfinite(gram).all()):
        raise ValueError("the layer's inputs are NaN or infinite")
    nearest = quantize(weight, bits, group)
    columns = weight.shape[1]
    low, high = (torch.full_like(nearest.scales.float(), sign * LEVELS[bits]) for sign in (-1, 1))
    if nearest.zeros is not None:
        low, high = -nearest.zeros.float(), LEVELS[bits] - nearest.zeros.float()
    scales, low, high = (
        part.float().repeat_interleave(nearest.group, 1)[:, :columns] for part in (nearest.scales, low, high)
    )
    order = gram.diagonal().argsort(descending=True)
    steps = torch.empty_like(scales)
    steps[:, order] = _round(
        weight.float()[:, order], _factor(gram[order][:, order]), scales[:, order], low[:, order], high[:, order]
    )
    exact = weight.float()
    noise = float((steps * scales - exact).double().square().sum())
    codes = _codes(steps, nearest)
    return Packed(codes, nearest.scales, nearest.zeros, columns, bits, nearest.group, nearest.signal, noise)


def _factor(gram: Tensor) -> Tensor:
    """U with Uᵀ U = H⁻¹, upper triangular."""
    mean = float(gram.diagonal().mean()) or 1.0
    for attempt in range(_TRIES):
        damped = gram + torch.eye(len(gram)) * (DAMPING * 10**attempt * mean)
        lower, failed = torch.linalg.cholesky_ex(damped)
        if int(failed):
            continue
        factor, failed = torch.linalg.cholesky_ex(torch.cholesky_inverse(lower), upper=True)
        if not int(failed):
            upper: Tensor = factor
            return upper
    return torch.eye(len(gram))  # no direction is told from another: that is rounding to nearest


def _round(weight: Tensor, factor: Tensor, scales: Tensor, low: Tensor, high: Tensor) -> Tensor:
    """Whole steps (rows, K), within [low, high]; the arguments' columns are in the order of rounding."""
    rest, steps = weight.clone(), torch.empty_like(weight)
    for start in range(0, weight.shape[1], BLOCK):
        end = min(start + BLOCK, weight.shape[1])
        errors = torch.empty(len(weight), end - start)
        for column in range(start, end):
            value, scale = rest[:, column], scales[:, column]
            step = (value / scale).round().clamp(low[:, column], high[:, column])
            error = (value - step * scale) / factor[column, column]
            rest[:, column:end] -= error.unsqueeze(1) * factor[column, column:end]
            steps[:, column], errors[:, column - start] = step, error
        rest[:, end:] -= errors @ factor[start:end, end:]
    return steps


def _codes(steps: Tensor, like: Packed) -> Tensor:
    """Codes as `like`'s layout stores them."""
    rows, groups = like.scales.shape
    whole = torch.nn.functional.pad(steps, (0, groups * like.group - like.columns))
    if like.zeros is None:
        return whole.to(torch.int8)
    codes = whole.view(rows, groups, like.group) + like.zeros.unsqueeze(-1)
    return pack_nibbles(codes.to(torch.uint8).flatten(1))
