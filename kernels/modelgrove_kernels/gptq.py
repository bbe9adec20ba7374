"""GPTQ: rounding that makes up for itself (Frantar et al., arXiv 2210.17323, algorithm 1).

Columns are rounded one after the other; what each loses is taken up by those to come, as the inverse Hessian of the
layer's squared output error, H = 2 X Xᵀ, says. Scales and zero points are those of rounding to nearest, fixed before,
so that columns may be taken in any order ("act order": the largest inputs first) and the layouts stay as they are.
(Scales that are shrunk for the least error weighted by the inputs' energy were tried: no gain on the zoo's base.)
"""

from __future__ import annotations

import torch
from torch import Tensor

from modelgrove_kernels.packing import Packed, grid_of, with_steps

BLOCK = 128
"""Columns whose errors are passed on together."""
DAMPING = 0.01
"""Share of the mean diagonal that is added to H; ten times as much while H is not positive definite."""
_TRIES = 4


def gptq(weight: Tensor, gram: Tensor, nearest: Packed) -> Packed:
    """Round (rows, K) on the grid of `nearest`, which `packing.quantize` made of it; `gram` (K, K) is Σ x xᵀ.

    Raises:
        ValueError: the Gram matrix is not finite.
    """
    scales, low, high = grid_of(nearest)
    return with_steps(nearest, compensated(weight.float(), gram, scales, low, high), weight.float())


def compensated(weight: Tensor, gram: Tensor, scales: Tensor, low: Tensor, high: Tensor) -> Tensor:
    """Whole steps of `scales`, within [low, high], for float32 (rows, K); all but `gram` (K, K) are of that shape.

    Raises:
        ValueError: the Gram matrix is not finite.
    """
    if not bool(torch.isfinite(gram).all()):
        raise ValueError("the layer's inputs are NaN or infinite")
    order = gram.diagonal().argsort(descending=True)
    steps = torch.empty_like(weight)
    steps[:, order] = _round(
        weight[:, order], _factor(gram[order][:, order]), scales[:, order], low[:, order], high[:, order]
    )
    return steps


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
