"""Quantized 2-D convolutions as torch operators: `modelgrove::conv2d_w8a8` and `modelgrove::conv2d_w4a8`.

    x' = x / s                                         s (C,), optional
    a_scale[i] = max |x'[i]| / 127                     one for each image i; 1 if that is 0
    a = round_half_even(x' / a_scale), clamped to ±127
    y[i] = a_scale[i] · (a[i] ∗ w) + up · (x'[i] ∗ down) + bias

with ∗ the convolution (cross-correlation, zeros outside) and w = (code - zero) · scale. Sums of a · (code - zero) over
the columns of one scale are exact, all else is float32. An image with NaN or infinite values gives NaN.

One scale for each image, because the integer sums over a kernel's taps need a common one: with a scale for each pixel,
every tap of every output would be scaled on its own. What that costs stands in docs/kernels.md.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional

from modelgrove_kernels import native
from modelgrove_kernels.conv_native import convolve, is_channels_last, quantize_pixels
from modelgrove_kernels.conv_panels import Geometry, Panels, matrix_of


@torch.library.custom_op("modelgrove::conv2d_w8a8", mutates_args=())
def conv2d_w8a8(
    x: Tensor,
    codes: Tensor,
    scales: Tensor,
    group: int,
    out: int,
    kernel: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    bias: Tensor | None,
    smooth: Tensor | None,
    down: Tensor | None,
    up: Tensor | None,
) -> Tensor:
    """x (n, C, h, w) → (n, out, h', w') in x's memory format, float32, with weights of 8 bits.

    `codes`, `scales`, `group` and `out` are those of `conv_panels.to_panels` for a matrix (out, kh·kw·C); `bias`
    (out,), `smooth` (C,), `down` (r, kh·kw·C) in the matrix's order of columns and `up` (out, r) are float32.

    Raises:
        ValueError: x is not float32 of four dimensions, or it has too few channels or pixels.
    """
    weight = Panels(codes, scales, torch.empty(0, dtype=torch.uint8), group, out)
    return _run(x, weight, Geometry(kernel, stride, padding, dilation), bias, smooth, down, up)


@torch.library.custom_op("modelgrove::conv2d_w4a8", mutates_args=())
def conv2d_w4a8(
    x: Tensor,
    codes: Tensor,
    scales: Tensor,
    zeros: Tensor,
    group: int,
    out: int,
    kernel: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    bias: Tensor | None,
    smooth: Tensor | None,
    down: Tensor | None,
    up: Tensor | None,
) -> Tensor:
    """The same with weights of 4 bits and their zero points; see `conv2d_w8a8`."""
    weight = Panels(codes, scales, zeros, group, out)
    return _run(x, weight, Geometry(kernel, stride, padding, dilation), bias, smooth, down, up)


def conv2d(
    x: Tensor,
    weight: Panels,
    geometry: Geometry,
    bias: Tensor | None = None,
    smooth: Tensor | None = None,
    down: Tensor | None = None,
    up: Tensor | None = None,
) -> Tensor:
    """The operator that fits the weight; see `conv2d_w8a8`."""
    places = (geometry.kernel, geometry.stride, geometry.padding, geometry.dilation)
    rest = (weight.group, weight.out, *places, bias, smooth, down, up)
    if weight.bits == 4:
        y: Tensor = conv2d_w4a8(x, weight.codes, weight.scales, weight.zeros, *rest)
    else:
        y = conv2d_w8a8(x, weight.codes, weight.scales, *rest)
    return y


@conv2d_w8a8.register_fake
def _fake_w8a8(
    x: Tensor, _codes: Tensor, _scales: Tensor, _group: int, out: int, kernel: Sequence[int], stride: Sequence[int],
    padding: Sequence[int], dilation: Sequence[int], *_: Tensor | None,
) -> Tensor:  # fmt: skip
    return _empty(x, out, Geometry(kernel, stride, padding, dilation))


@conv2d_w4a8.register_fake
def _fake_w4a8(
    x: Tensor, _codes: Tensor, _scales: Tensor, _zeros: Tensor, _group: int, out: int, kernel: Sequence[int],
    stride: Sequence[int], padding: Sequence[int], dilation: Sequence[int], *_: Tensor | None,
) -> Tensor:  # fmt: skip
    return _empty(x, out, Geometry(kernel, stride, padding, dilation))


def _run(
    x: Tensor,
    weight: Panels,
    geometry: Geometry,
    bias: Tensor | None,
    smooth: Tensor | None,
    down: Tensor | None,
    up: Tensor | None,
) -> Tensor:
    geometry.check(x, weight)
    x = x if is_channels_last(x) else x.contiguous()
    library = native.library()
    if library is None or x.numel() == 0:
        y = reference(x, weight, geometry, bias, smooth)
    else:
        y = _empty(x, weight.out, geometry)
        convolve(library, quantize_pixels(library, x, smooth, geometry.padding), weight, geometry, bias, y)
    if down is not None and up is not None:
        y += branch(x, geometry, smooth, down, up)
    return y


def reference(x: Tensor, weight: Panels, geometry: Geometry, bias: Tensor | None, smooth: Tensor | None) -> Tensor:
    """The plain form, without the branch of low rank: whole numbers convolved with the dequantized weight."""
    smoothed = _smoothed(x, smooth)
    most = smoothed.abs().amax((1, 2, 3), keepdim=True)
    scales = torch.where(most.isfinite(), most / torch.tensor(127.0), torch.nan)
    scales = torch.where(scales == 0, 1.0, scales)
    steps = (smoothed / scales).round().clamp(-127, 127)
    kernels = geometry.kernels(matrix_of(weight, geometry.columns(x)))
    y = functional.conv2d(steps, kernels, None, geometry.stride, geometry.padding, geometry.dilation) * scales
    return y if bias is None else y + bias.view(-1, 1, 1)


def branch(x: Tensor, geometry: Geometry, smooth: Tensor | None, down: Tensor, up: Tensor) -> Tensor:
    """up · (x' ∗ down), float32."""
    kernels = geometry.kernels(down)
    low = functional.conv2d(_smoothed(x, smooth), kernels, None, geometry.stride, geometry.padding, geometry.dilation)
    return functional.conv2d(low, up[:, :, None, None])


def _smoothed(x: Tensor, smooth: Tensor | None) -> Tensor:
    return x if smooth is None else x / smooth.view(-1, 1, 1)


def _empty(x: Tensor, out: int, geometry: Geometry) -> Tensor:
    """The output, of unset values."""
    form = torch.channels_last if is_channels_last(x) else torch.contiguous_format
    shape = (x.shape[0], out, *geometry.sides(x))
    return torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=form)
