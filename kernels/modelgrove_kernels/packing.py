"""Rounding to nearest on an integer grid, and how the codes are laid out: the reference for all kernels.

A weight is a matrix (rows, columns); each row is cut into groups of `group` columns, the last one
padded. Two layouts:

- `int8`, symmetric: codes int8 in [-127, 127], w ≈ code · scale.
- `int4`, asymmetric: codes in [0, 15], two a byte, the even column in the low nibble;
  w ≈ (code - zero) · scale with an integer zero point in [0, 15], so that 0 is kept exactly.

Plain torch in float32, a few rows at a time, so memory stays bounded whatever the size; where the
compiled kernels are there, `round_groups` finds the same codes in C.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from modelgrove_kernels.rounding import Rounded, round_groups

CHUNK = 1 << 18
"""Elements worked on at once: 1 MB a temporary, which stays in the cache."""

LEVELS = {8: 127, 4: 15}
"""Grid steps from zero (8 bits, symmetric) or from the lowest code (4 bits) to the highest."""


@dataclass(frozen=True)
class Packed:
    """A quantized matrix of `rows` × `columns`.

    `codes` is int8 (rows, padded) at 8 bits, uint8 (rows, padded / 2) at 4; `scales` (rows, groups)
    is float16 where that can hold them and float32 elsewhere; `zeros` (rows, groups) is uint8,
    None at 8 bits. padded = groups · group. `signal` is ‖w‖² and `noise` ‖w - ŵ‖², 0 when read back from a file.
    """

    codes: Tensor
    scales: Tensor
    zeros: Tensor | None
    columns: int
    bits: int
    group: int
    signal: float = 0.0
    noise: float = 0.0

    @property
    def sqnr(self) -> float:
        """Signal to quantization noise in dB; infinite when nothing was lost."""
        return 10 * math.log10(self.signal / self.noise) if self.noise and self.signal else math.inf

    @property
    def nbytes(self) -> int:
        """True size: codes, scales and zero points, padding included."""
        parts = [self.codes, self.scales, *([] if self.zeros is None else [self.zeros])]
        return sum(part.nbytes for part in parts)


def unfold(matrix: Tensor, shape: Sequence[int], axes: Sequence[int]) -> Tensor:
    """The tensor of `shape` whose axes, in the order `axes`, were flattened to `matrix`: all but the first in one."""
    back = sorted(range(len(axes)), key=lambda place: axes[place])
    return matrix.reshape([shape[axis] for axis in axes]).permute(back).contiguous()


def group_width(columns: int, bits: int, group: int | None) -> int:
    """The group width in use: `group`, or the whole row if it is None or the row is shorter (even at 4 bits)."""
    whole = columns + columns % 2 if bits == 4 else columns
    return max(1, whole if group is None else min(group, whole))


def quantize(weight: Tensor, bits: int, group: int | None = None) -> Packed:
    """Round (rows, columns) of any floating dtype to 8 or 4 bits with one scale a group; None is one a row.

    Raises:
        ValueError: not a matrix, no such bits or group, or a value is not finite in float32.
    """
    if bits not in LEVELS:
        raise ValueError(f"{bits} bits are not supported, only {sorted(LEVELS)}")
    if group is not None and (group < 1 or (bits == 4 and group % 2)):
        raise ValueError(f"a group of {group} columns is not possible at {bits} bits")
    if weight.ndim != 2 or not weight.is_floating_point():
        raise ValueError(f"a {weight.dtype} tensor of shape {tuple(weight.shape)} is no matrix of floats")
    columns = weight.shape[1]
    width = group_width(columns, bits, group)
    rounded = round_groups(weight, bits, width) or _round(weight, bits, width)
    return Packed(rounded.codes, rounded.scales, rounded.zeros, columns, bits, width, rounded.signal, rounded.noise)


def dequantize(packed: Packed, dtype: torch.dtype = torch.float32) -> Tensor:
    """The matrix (rows, columns) that the codes stand for, computed in float32, returned as `dtype`."""
    rows, groups = packed.scales.shape
    values = torch.empty((rows, packed.columns), dtype=dtype)
    for part in chunks(rows, groups * packed.group):
        codes = packed.codes[part] if packed.zeros is None else unpack_nibbles(packed.codes[part])
        steps = codes.float().view(len(codes), groups, packed.group)
        if packed.zeros is not None:
            steps -= packed.zeros[part].unsqueeze(-1)
        values[part] = steps.mul_(packed.scales[part].float().unsqueeze(-1)).flatten(1)[:, : packed.columns]
    return values


def grid_of(packed: Packed) -> tuple[Tensor, Tensor, Tensor]:
    """(scales, low, high), each (rows, columns): a weight may be any whole number from low to high of its scale."""
    levels, zeros = LEVELS[packed.bits], packed.zeros
    low, high = (-zeros.float(), levels - zeros.float()) if zeros is not None else (-levels, levels)
    scales, low, high = (_by_column(part, packed) for part in (packed.scales, low, high))
    return scales, low, high


def with_steps(nearest: Packed, steps: Tensor, exact: Tensor) -> Packed:
    """`nearest` with other codes: whole numbers (rows, columns) on its grid, for the matrix `exact` that it rounds."""
    noise = float((steps * _by_column(nearest.scales, nearest) - exact).double().square().sum())
    rows, groups = nearest.scales.shape
    whole = torch.nn.functional.pad(steps, (0, groups * nearest.group - nearest.columns))
    if nearest.zeros is None:
        return replace(nearest, codes=whole.to(torch.int8), noise=noise)
    codes = whole.view(rows, groups, nearest.group) + nearest.zeros.unsqueeze(-1)
    return replace(nearest, codes=pack_nibbles(codes.to(torch.uint8).flatten(1)), noise=noise)


def _by_column(values: Tensor | int, grid: Packed) -> Tensor:
    """(rows, groups), or one value for all, → (rows, columns)."""
    whole = torch.as_tensor(values).float().expand(grid.scales.shape)
    return whole.repeat_interleave(grid.group, 1)[:, : grid.columns]


def pack_nibbles(codes: Tensor) -> Tensor:
    """uint8 (rows, 2n) with values below 16 → uint8 (rows, n); the even column is the low nibble."""
    pairs = codes.flatten().view(torch.int16)
    # Little-endian: the even column is the low byte. The cast drops what the shift leaves above.
    return (pairs | (pairs >> 4)).to(torch.uint8).view(codes.shape[0], codes.shape[1] // 2)


def unpack_nibbles(packed: Tensor) -> Tensor:
    """The inverse of `pack_nibbles`: uint8 (rows, n) → uint8 (rows, 2n)."""
    return torch.stack([packed & 15, packed >> 4], dim=-1).flatten(1)


def stored(scales: Tensor) -> Tensor:
    """Float16 if every scale is in its normal range, else float32. A group of zeros has scale one."""
    scales = torch.where(scales == 0, 1.0, scales)
    small = torch.finfo(torch.float16)
    fits = bool(((scales >= small.smallest_normal) & (scales <= small.max)).all())
    return scales.half() if fits else scales


def chunks(rows: int, columns: int) -> Iterator[slice]:
    """Slices of rows that cover all of them, each of at most `CHUNK` elements or one row."""
    step = max(1, CHUNK // max(1, columns))
    for start in range(0, rows, step):
        yield slice(start, min(start + step, rows))


def _round(weight: Tensor, bits: int, width: int) -> Rounded:
    """What `round_groups` does, for all dtypes and sizes of scales.

    Raises:
        ValueError: a value is not finite.
    """
    rows, groups = weight.shape[0], -(-weight.shape[1] // width)
    scales, zeros = _grid(weight, bits, width, groups)
    codes = torch.empty((rows, groups * width * bits // 8), dtype=torch.int8 if bits == 8 else torch.uint8)
    signal = noise = 0.0
    for part in chunks(rows, groups * width):
        exact = _grouped(weight[part], width, groups)
        scale = scales[part].float().unsqueeze(-1)
        steps = (exact / scale).round_()
        codes[part] = _codes(steps, None if zeros is None else zeros[part])
        signal += _energy(exact)
        noise += _energy(steps.mul_(scale).sub_(exact))
    return Rounded(codes, scales, zeros, signal, noise)


def _grid(weight: Tensor, bits: int, width: int, groups: int) -> tuple[Tensor, Tensor | None]:
    """Scales and zero points of all groups, as they are stored."""
    low = torch.empty((weight.shape[0], groups))
    high = torch.empty_like(low)
    for part in chunks(weight.shape[0], groups * width):
        values = _grouped(weight[part], width, groups)
        low[part], high[part] = values.amin(-1), values.amax(-1)
    if not bool(torch.isfinite(low).all() and torch.isfinite(high).all()):
        raise ValueError("NaN or infinite values cannot be quantized")
    if bits == 8:
        return stored(torch.maximum(-low, high) / LEVELS[8]), None
    low, high = low.clamp_max(0), high.clamp_min(0)
    # Divided before the subtraction: the range of float32's extremes would overflow.
    scales = stored(high / LEVELS[4] - low / LEVELS[4])
    return scales, (-low / scales.float()).round_().clamp_(0, LEVELS[4]).to(torch.uint8)


def _codes(steps: Tensor, zeros: Tensor | None) -> Tensor:
    """Stored codes of the whole numbers `steps` (n, groups, width), which are clamped to the grid in place."""
    if zeros is None:
        return steps.clamp_(-LEVELS[8], LEVELS[8]).to(torch.int8).flatten(1)
    zero = zeros.float().unsqueeze(-1)
    steps.clamp_(-zero, LEVELS[4] - zero)
    return pack_nibbles((steps + zero).to(torch.uint8).flatten(1))


def _energy(values: Tensor) -> float:
    flat = values.flatten()
    total = float(torch.dot(flat, flat))
    # Values above 1e19 overflow float32's squares; float64 is right but five times slower.
    return total if math.isfinite(total) else float(flat.double().square().sum())


def _grouped(rows: Tensor, width: int, groups: int) -> Tensor:
    """Rows in float32, padded with zeros, (n, groups, width). Zeros widen no range: they are on both grids."""
    padded = torch.nn.functional.pad(rows.float(), (0, groups * width - rows.shape[1]))
    return padded.view(len(rows), groups, width)
