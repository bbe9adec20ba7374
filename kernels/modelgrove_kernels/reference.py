"""Linear layers of 4-bit weights and 8-bit activations in plain torch: what the compiled kernels must give.

    x' = x / smooth
    a_scale[m] = max|x'[m]| / 127, and 1 where that is 0;  a = x' / a_scale, rounded half to even, in [-127, 127]
    y[m, n] = a_scale[m] · Σ_g w_scale[n, g] · Σ_{k in g} a[m, k] · w[n, k]
            + Σ_r (x' · downᵀ)[m, r] · up[n, r] + bias[n]

with whole weights w: code - zero (`Packed`, asymmetric), or table[code] (`LookUp`). The sums over k are exact, the rest
is float32. A row of x' that is not finite gives a row of NaN. The branch of low rank takes x' before it is quantized
(SVDQuant, arXiv 2411.05007, equation 5).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from modelgrove_kernels.packing import Packed, unpack_nibbles

LARGEST = 127
"""The largest code of an activation."""
_EXACT = 1 << 24
"""Below this float32 holds every whole number."""


@dataclass(frozen=True)
class LookUp:
    """A matrix of `rows` × `columns` whose codes name entries of a table: w ≈ table[code] · scale.

    `codes` is uint8 (rows, padded / 2), two a byte as in `Packed`; `table` is int8 (1, 16), shared, or (rows, 16);
    `scales` is floating point (rows, groups) with padded = groups · group.
    """

    codes: Tensor
    table: Tensor
    scales: Tensor
    columns: int
    group: int


Weight = Packed | LookUp


def linear_w4a8(
    x: Tensor,
    weight: Weight,
    smooth: Tensor | None = None,
    down: Tensor | None = None,
    up: Tensor | None = None,
    bias: Tensor | None = None,
) -> Tensor:
    """Float32 x (…, columns) → (…, rows); `smooth` (columns,), `down` (r, columns), `up` (rows, r), `bias` (rows,)."""
    inputs = x.flatten(0, -2) if smooth is None else x.flatten(0, -2) / smooth
    codes, scales = quantize_rows(inputs)
    y = scales * _grouped_product(codes, weight)
    if down is not None and up is not None:
        y += inputs @ down.T @ up.T
    if bias is not None:
        y += bias
    y[~inputs.isfinite().all(-1)] = torch.nan
    return y.view(*x.shape[:-1], y.shape[-1])


def quantize_rows(inputs: Tensor) -> tuple[Tensor, Tensor]:
    """Float32 (m, k) → codes as float32 whole numbers (m, k) and scales (m, 1); rows that are not finite become 0."""
    inputs = torch.where(inputs.isfinite().all(-1, keepdim=True), inputs, 0.0)
    largest = inputs.abs().amax(-1, keepdim=True) if inputs.shape[-1] else inputs.new_zeros(len(inputs), 1)
    scales = largest / LARGEST
    scales = torch.where(scales == 0, 1.0, scales)
    return (inputs / scales).round().clamp(-LARGEST, LARGEST), scales


def whole_weights(weight: Weight) -> Tensor:
    """w, int16 (rows, groups, group), before the scales; padding included."""
    codes = unpack_nibbles(weight.codes)
    if isinstance(weight, LookUp):
        entries = weight.table.to(torch.int16).expand(len(codes), -1).gather(1, codes.long())
        return entries.view(*weight.scales.shape, weight.group)
    if weight.zeros is None:
        raise ValueError("weights of 4 bits need zero points")
    return codes.to(torch.int16).view(*weight.scales.shape, weight.group) - weight.zeros.unsqueeze(-1)


def _grouped_product(codes: Tensor, weight: Weight) -> Tensor:
    """Σ_g w_scale · Σ_k a · w, float32 (m, rows)."""
    weights, scales = whole_weights(weight), weight.scales.float()
    rows, groups = scales.shape
    dtype = torch.float32 if LARGEST * 128 * weight.group < _EXACT else torch.float64
    padded = torch.nn.functional.pad(codes, (0, groups * weight.group - codes.shape[1]))
    total = codes.new_zeros(len(codes), rows)
    for group in range(groups):
        part = padded[:, group * weight.group : (group + 1) * weight.group].to(dtype)
        total += (part @ weights[:, group].to(dtype).T).float() * scales[:, group]
    return total
