"""Packed convolution weights in the order in which the compiled kernel reads them.

A weight is the matrix (out, kh·kw·C) with the input channel innermost. Panels hold 32 output channels each (the last
one is filled up with channels of scale 0), and units of 8 columns, so that codes are (panels, ⌈columns / 8⌉, bytes):

- 8 bits: 256 bytes, code + 128 of (first 4 columns, then the other 4; output channel; column of the 4).
- 4 bits: 128 bytes in the order of the first half; the first 4 columns are the low nibbles, the other 4 the high ones.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from modelgrove_kernels.packing import Packed, unpack_nibbles

PANEL = 32
"""Output channels of a panel."""
_UNIT = 8


@dataclass(frozen=True)
class Panels:
    """Prepacked weights of a convolution.

    `codes` is uint8 (panels, units, 256 | 128), `scales` float32 (panels, groups, 32), `zeros` uint8 of that shape,
    empty at 8 bits; `group` columns share a scale; `out` output channels.
    """

    codes: Tensor
    scales: Tensor
    zeros: Tensor
    group: int
    out: int

    @property
    def bits(self) -> int:
        """8 or 4."""
        return 4 if self.zeros.numel() else 8

    @property
    def groups(self) -> int:
        """Scales of an output channel."""
        return self.scales.shape[1]


@dataclass(frozen=True)
class Geometry:
    """Where a convolution's taps are; each is (vertical, horizontal)."""

    kernel: Sequence[int]
    stride: Sequence[int]
    padding: Sequence[int]
    dilation: Sequence[int]

    def columns(self, x: Tensor) -> int:
        """K = kh·kw·C."""
        return self.kernel[0] * self.kernel[1] * x.shape[1]

    def sides(self, x: Tensor) -> list[int]:
        """Height and width of the output."""
        spans = [step * (size - 1) + 1 for step, size in zip(self.dilation, self.kernel, strict=True)]
        return [
            (size + 2 * pad - span) // stride + 1
            for size, pad, span, stride in zip(x.shape[2:], self.padding, spans, self.stride, strict=True)
        ]

    def kernels(self, matrix: Tensor) -> Tensor:
        """(out, kh·kw·C) → (out, C, kh, kw)."""
        return matrix.view(len(matrix), *self.kernel, -1).permute(0, 3, 1, 2)

    def check(self, x: Tensor, weight: Panels) -> None:
        """Raises ValueError: x cannot be convolved with this weight."""
        if x.dtype != torch.float32 or x.ndim != 4:
            raise ValueError(f"the input is {x.dtype} of shape {tuple(x.shape)}, not float32 (n, C, h, w)")
        if weight.codes.shape[1] != -(-self.columns(x) // _UNIT):
            raise ValueError(f"the weight is not one for {x.shape[1]} channels and a kernel of {tuple(self.kernel)}")
        if min(self.sides(x)) < 1:
            raise ValueError(f"an image of {tuple(x.shape[2:])} is smaller than the kernel of {tuple(self.kernel)}")


def to_panels(packed: Packed) -> Panels:
    """Reorder once what a file keeps.

    Raises:
        ValueError: a row has several groups, and a unit of 8 columns would lie in two of them.
    """
    groups = packed.scales.shape[1]
    if groups > 1 and packed.group % _UNIT:
        raise ValueError(f"groups of {packed.group} columns: a convolution's are whole rows or multiples of {_UNIT}")
    codes = packed.codes.view(torch.uint8) ^ 128 if packed.zeros is None else unpack_nibbles(packed.codes)
    units = -(-packed.columns // _UNIT)
    fit = (0, units * _UNIT - codes.shape[1], 0, -codes.shape[0] % PANEL)
    rows = functional.pad(codes, fit).view(-1, PANEL, units, 2, 4).permute(0, 2, 3, 1, 4)
    low, high = rows.flatten(3).unbind(2)
    zeros = torch.empty(0, dtype=torch.uint8) if packed.zeros is None else _by_panel(packed.zeros)
    return Panels(
        torch.cat([low, high], -1) if packed.zeros is None else low | high << 4,
        _by_panel(packed.scales.float()),
        zeros,
        packed.group,
        packed.codes.shape[0],
    )


def matrix_of(panels: Panels, columns: int) -> Tensor:
    """w, float32 (out, columns): what the panels stand for."""
    codes = panels.codes
    halves = (codes & 15, codes >> 4) if panels.bits == 4 else codes.chunk(2, -1)
    steps = torch.stack([half.reshape(*half.shape[:-1], PANEL, 4) for half in halves], 2).permute(0, 3, 1, 2, 4)
    rows = steps.reshape(len(codes) * PANEL, -1)[: panels.out, :columns].float()
    groups = (torch.arange(columns) // panels.group).clamp(max=panels.groups - 1)
    scales, zeros = (_by_row(part, panels.out)[:, groups] for part in (panels.scales, _zeros_of(panels)))
    return (rows - zeros) * scales


def _zeros_of(panels: Panels) -> Tensor:
    return panels.zeros.float() if panels.bits == 4 else torch.full_like(panels.scales, 128)


def _by_panel(values: Tensor) -> Tensor:
    """(out, groups) → (panels, groups, 32)."""
    padded = functional.pad(values, (0, 0, 0, -len(values) % PANEL))
    return padded.view(-1, PANEL, padded.shape[1]).transpose(1, 2).contiguous()


def _by_row(values: Tensor, out: int) -> Tensor:
    """The inverse of `_by_panel`."""
    return values.transpose(1, 2).flatten(0, 1)[:out]
