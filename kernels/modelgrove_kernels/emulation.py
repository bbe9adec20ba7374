"""What a quantized layer computes, in plain float32 torch: slow, exact in meaning, and the same for every layout.

Weights are decoded once; activations are rounded to their grid and kept as floats. Fast kernels
and fidelity reports are both measured against this.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

from modelgrove_kernels.floating import round_floating
from modelgrove_kernels.layouts import Layout, Parts, decode, restore, transform_inputs
from modelgrove_kernels.packing import unfold


@dataclass
class Clock:
    """The interval of timesteps that a network is in; its layers share one clock."""

    interval: int = 0


@dataclass(frozen=True)
class ActivationRule:
    """How inputs are rounded: the manifest's `activations`."""

    bits: int
    ranges: str = "token"
    width: int = 0
    exponent: int = 0


def round_symmetric(values: Tensor, bits: int, dims: Sequence[int]) -> Tensor:
    """Round to 2^(bits-1) - 1 steps on either side of zero; one scale, max|x| over `dims`, for each of the others."""
    levels = 2 ** (bits - 1) - 1
    scale = values.abs().amax(tuple(dims), keepdim=True) / levels
    scale = torch.where(scale == 0, 1.0, scale)
    return (values / scale).round_().clamp_(-levels, levels).mul_(scale)


def round_to_ranges(values: Tensor, bits: int, low: Tensor, high: Tensor) -> Tensor:
    """Round to 2^bits - 1 steps from `low` to `high` (broadcast against `values`), which are moved to include zero.

    Zero is on the grid: padding and dead units stay exactly zero.
    """
    levels = 2**bits - 1
    low, high = low.clamp_max(0), high.clamp_min(0)
    step = (high - low) / levels
    scale = torch.where(step == 0, 1.0, step)
    zero = (-low / scale).round()
    return (values / scale).round_().add_(zero).clamp_(0, levels).sub_(zero).mul_(step)


def round_activations(values: Tensor, rule: ActivationRule, parts: Parts, interval: int, channel: int = -1) -> Tensor:
    """Inputs (n, …) on their grid; `channel` is the axis of the channels: the last, or 1 for pictures (n, C, h, w)."""
    if rule.ranges == "token":
        return _round_dynamic(values, rule, parts, channel)
    table = parts["ranges"][min(interval, len(parts["ranges"]) - 1)]
    group = parts["channels"].long() if "channels" in parts else torch.zeros(1, dtype=torch.long)
    shape = [1] * values.ndim
    shape[channel] = -1
    low, high = (table[group, side].reshape(shape) for side in (0, 1))
    return round_to_ranges(values, rule.bits, low, high)


def _round_dynamic(values: Tensor, rule: ActivationRule, parts: Parts, channel: int) -> Tensor:
    if "channels" in parts:
        rounded = torch.empty_like(values)
        for group in range(int(parts["channels"].max()) + 1):
            places = (parts["channels"] == group).nonzero().flatten()
            chosen = values.index_select(channel, places)
            rounded.index_copy_(channel, places, _round_dynamic(chosen, rule, {}, channel))
        return rounded
    if channel == 1:
        return _round_own(values, rule, range(1, values.ndim))
    if not rule.width or rule.width >= values.shape[-1]:
        return _round_own(values, rule, [-1])
    columns = values.shape[-1]
    cut = functional.pad(values, (0, -columns % rule.width)).reshape(*values.shape[:-1], -1, rule.width)
    return _round_own(cut, rule, [-1]).flatten(-2)[..., :columns]


def _round_own(values: Tensor, rule: ActivationRule, dims: Sequence[int]) -> Tensor:
    if rule.exponent:
        return round_floating(values, rule.bits, rule.exponent, dims)
    return round_symmetric(values, rule.bits, dims)


class EmulatedLinear(nn.Module):
    """y = round(x') · Mᵀ + x' · downᵀ · upᵀ + b, with x' and M of `layouts`."""

    def __init__(
        self, layout: Layout, parts: Parts, rule: ActivationRule | None, bias: Tensor | None, clock: Clock
    ) -> None:
        super().__init__()
        self.layout, self.rule, self.clock = layout, rule, clock
        self.parts = {name: part for name, part in parts.items() if name not in ("codes", "scales", "zeros")}
        self.weight, self.bias = decode(layout, parts), bias

    def forward(self, inputs: Tensor) -> Tensor:
        """(…, columns) → (…, rows)."""
        inner = transform_inputs(inputs, self.layout, self.parts)
        rounded = inner
        if self.rule is not None:
            rounded = round_activations(inner, self.rule, self.parts, self.clock.interval)
        outputs = functional.linear(rounded, self.weight, self.bias)
        if "up" in self.parts:
            branch = functional.linear(inner, self.parts["down"].float())
            outputs = outputs + functional.linear(branch, self.parts["up"].float())
        return outputs


class EmulatedConv2d(nn.Module):
    """A convolution of rounded inputs with its branch on unrounded ones; of rotated weights all is restored first."""

    def __init__(
        self, layout: Layout, parts: Parts, rule: ActivationRule | None, layer: nn.Conv2d, clock: Clock
    ) -> None:
        super().__init__()
        self.rule, self.clock, self.layer = rule, clock, [layer]  # a list, so that its weight is not ours
        self.parts = {name: parts[name] for name in ("channels", "ranges") if name in parts}
        whole = layout.rotation is not None
        self.smooth = parts["smooth"].float().view(-1, 1, 1) if "smooth" in parts and not whole else None
        self.weight = self._kernels(restore(layout, parts) if whole else decode(layout, parts))
        self.bias = layer.bias
        branch = "up" in parts and not whole
        self.down = self._kernels(parts["down"].float()) if branch else None
        self.up = parts["up"].float() if branch else None

    def forward(self, inputs: Tensor) -> Tensor:
        """(n, C, h, w) → (n, rows, h', w')."""
        inner = inputs if self.smooth is None else inputs / self.smooth
        rounded = inner
        if self.rule is not None:
            rounded = round_activations(inner, self.rule, self.parts, self.clock.interval, channel=1)
        outputs: Tensor = self.layer[0]._conv_forward(rounded, self.weight, self.bias)
        if self.down is not None and self.up is not None:
            branch = self.layer[0]._conv_forward(inner, self.down, None)
            outputs = outputs + functional.conv2d(branch, self.up[:, :, None, None])
        return outputs

    def _kernels(self, matrix: Tensor) -> Tensor:
        return unfold(matrix, (len(matrix), *self.layer[0].weight.shape[1:]), (0, 2, 3, 1))
