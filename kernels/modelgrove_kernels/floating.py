"""Low-bit floating-point grids (ExMy): a sign, x bits of exponent, y of mantissa, no infinities and no NaN.

    ±2^(E - b) · (1 + M / 2^y)  for E ≥ 1,   ±2^(1 - b) · M / 2^y  for E = 0

As in "Low-bitwidth floating point quantization for efficient high-quality diffusion models" (Chen et al., arXiv
2408.06995, after Kuzmin et al., arXiv 2208.09225) the bias b is any real number, found with the split into x and y by
the least squared error. A real bias is a scale, so grids here have b = 2^(x-1), with which float16 holds all their
values; the rest of the bias is in scale = 2^(2^(x-1) - b). Codes are the number's bits: sign, exponent, mantissa, from
the highest.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional

from modelgrove_kernels.bitstream import pack_bits
from modelgrove_kernels.packing import chunks, stored

SPLITS = {4: (1, 2, 3), 8: (2, 3, 4, 5)}
"""Bits → exponent bits of the search."""
_SHRINKS = tuple(1 - step / 20 for step in range(11))
"""Of the largest |w|: where the search puts the grid's largest value."""


def grid(bits: int, exponent: int) -> Tensor:
    """The values (2^bits,) that codes stand for, float32; the last of the first half is the largest."""
    mantissa = bits - 1 - exponent
    code = torch.arange(2 ** (bits - 1))
    power, fraction = code >> mantissa, (code & (2**mantissa - 1)) / 2**mantissa
    sizes = torch.where(power > 0, 1 + fraction, fraction) * 2.0 ** (power.clamp_min(1) - 2 ** (exponent - 1))
    return torch.cat([sizes, -sizes])


def largest(bits: int, exponent: int) -> float:
    """Of the values of `grid`."""
    return float(2.0 ** (2 ** (exponent - 1) - 1) * (2 - 2.0 ** (1 + exponent - bits)))


def round_to_float(values: Tensor, bits: int, exponent: int) -> Tensor:
    """The nearest values of `grid` to float32 of any shape; ties go to even mantissas, beyond the ends is cut off."""
    # Neighbours of |x| in [2^p, 2^(p+1)) are 2^(p - mantissa) apart; subnormals as those of the smallest exponent.
    power = torch.frexp(values)[1].sub_(1).clamp_min_(1 - 2 ** (exponent - 1))
    step = torch.ldexp(torch.ones_like(values), power.add_(1 + exponent - bits))
    top = largest(bits, exponent)
    return values.div(step).round_().mul_(step).clamp_(-top, top)


def round_floating(values: Tensor, bits: int, exponent: int, dims: Sequence[int]) -> Tensor:
    """Round to a floating-point grid whose largest value is max|x| over `dims`, one for each of the others."""
    scale = values.abs().amax(tuple(dims), keepdim=True) / largest(bits, exponent)
    scale = torch.where(scale == 0, 1.0, scale)
    return round_to_float(values / scale, bits, exponent) * scale


class FloatGrid:
    """The grid of a weight (rows, K) of any floating dtype: the best split and scales, one each `width` columns.

    Raises:
        ValueError: a value is not finite.
    """

    def __init__(self, weight: Tensor, bits: int, width: int) -> None:
        self.exact, self.bits, self.width = weight.float(), bits, width
        if not bool(torch.isfinite(self.exact).all()):
            raise ValueError("NaN or infinite values cannot be quantized")
        self.columns = weight.shape[1]
        self.groups = -(-self.columns // width)
        found = {split: self._search(split) for split in SPLITS[bits]}
        self.exponent = min(found, key=lambda split: found[split][0])
        self.scales = found[self.exponent][1]
        """(rows, groups), as stored."""

    @property
    def name(self) -> str:
        """As people write it: e2m1."""
        return f"e{self.exponent}m{self.bits - 1 - self.exponent}"

    def parts(self, values: Tensor | None = None) -> dict[str, Tensor]:
        """codes, scales and table (1, 2^bits, 1) of layout `lut`: of the weight, or of other `values` near it."""
        table = grid(self.bits, self.exponent)
        half = len(table) // 2
        bounds = (table[1:half] + table[: half - 1]) / 2
        codes = []
        for part in chunks(*self.exact.shape):
            found = self._grouped((self.exact if values is None else values)[part])
            found = (found / self.scales[part].float().unsqueeze(-1)).flatten(1)
            sizes = torch.bucketize(found.abs(), bounds)
            codes.append(pack_bits((sizes + half * (found < 0)).to(torch.uint8), self.bits))
        return {"codes": torch.cat(codes), "scales": self.scales, "table": table.half().view(1, -1, 1)}

    def neighbours(self) -> tuple[Tensor, Tensor]:
        """The values of the grid below and above each weight, (rows, K); of one beyond its end, the last two."""
        half = grid(self.bits, self.exponent)[: 2 ** (self.bits - 1)]
        levels = torch.cat([-half[1:].flip(0), half])
        scales = self.scales.float().repeat_interleave(self.width, 1)[:, : self.columns]
        above = torch.searchsorted(levels, self.exact / scales).clamp_(1, len(levels) - 1)
        return levels[above - 1] * scales, levels[above] * scales

    def _search(self, exponent: int) -> tuple[float, Tensor]:
        """The least squared error with that split, and its scales."""
        scales = torch.empty(len(self.exact), self.groups)
        total = 0.0
        for part in chunks(len(self.exact), self.groups * self.width):
            values = self._grouped(self.exact[part])
            whole = values.abs().amax(-1, keepdim=True) / largest(self.bits, exponent)
            whole = torch.where(whole == 0, 1.0, whole)
            best, least = whole, torch.full_like(whole, torch.inf)
            for shrink in _SHRINKS:
                scale = whole * shrink
                error = (round_to_float(values / scale, self.bits, exponent) * scale - values).square_()
                error = error.sum(-1, keepdim=True)
                best, least = torch.where(error < least, scale, best), torch.minimum(error, least)
            scales[part] = best.squeeze(-1)
            total += float(least.double().sum())
        return total, stored(scales)

    def _grouped(self, rows: Tensor) -> Tensor:
        padded = functional.pad(rows, (0, self.groups * self.width - self.columns))
        return padded.view(len(rows), self.groups, self.width)
