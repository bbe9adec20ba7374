"""The compiled convolution: tensors to C structures (csrc/conv2d.h) and back."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence

import torch
from torch import Tensor

from modelgrove_kernels import native
from modelgrove_kernels.conv_panels import Geometry, Panels

_Pair = ctypes.c_int64 * 2


class _Pixels(ctypes.Structure):
    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("x", "smooth", "codes", "scales")),
        *((name, ctypes.c_int64) for name in ("images", "channels", "height", "width", "top", "left")),
        *((name, ctypes.c_int64) for name in ("padded_height", "padded_width")),
        *((name, ctypes.c_int32) for name in ("channels_last", "threads")),
    )


class _Conv(ctypes.Structure):
    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("x", "x_scales", "codes", "scales", "zeros", "bias", "y", "scratch")),
        *((name, ctypes.c_int64) for name in ("images", "channels", "padded_height", "padded_width")),
        *((name, ctypes.c_int64) for name in ("out", "height", "width")),
        *((name, _Pair) for name in ("kernel", "stride", "dilation")),
        *((name, ctypes.c_int64) for name in ("depth", "groups", "group")),
        *((name, ctypes.c_int32) for name in ("bits", "channels_last", "isa", "threads")),
    )


def quantize_pixels(
    library: ctypes.CDLL, x: Tensor, smooth: Tensor | None, padding: Sequence[int]
) -> tuple[Tensor, Tensor]:
    """x (n, C, h, w), float32 in either memory format → int8 codes (n, h + 2·p, w + 2·p, C), a scale per image (n,)."""
    images, channels, height, width = x.shape
    padded = (height + 2 * padding[0], width + 2 * padding[1])
    codes = torch.empty((images, *padded, channels), dtype=torch.int8)
    scales = torch.empty(images)
    last = is_channels_last(x)
    library.mg_conv_quantize(
        ctypes.byref(
            _Pixels(
                x=x.data_ptr(),
                smooth=None if smooth is None else smooth.data_ptr(),
                codes=codes.data_ptr(),
                scales=scales.data_ptr(),
                images=images,
                channels=channels,
                height=height,
                width=width,
                top=padding[0],
                left=padding[1],
                padded_height=padded[0],
                padded_width=padded[1],
                channels_last=last,
                threads=torch.get_num_threads(),
            )
        )
    )
    return codes, scales


def convolve(
    library: ctypes.CDLL,
    pixels: tuple[Tensor, Tensor],
    weight: Panels,
    geometry: Geometry,
    bias: Tensor | None,
    y: Tensor,
) -> None:
    """What `quantize_pixels` gave, times the panels → y (n, out, h, w), which is overwritten."""
    codes, x_scales = pixels
    images, padded_height, padded_width, channels = codes.shape
    threads = torch.get_num_threads()
    library.mg_conv_scratch.restype = ctypes.c_int64
    scratch = torch.empty(threads * library.mg_conv_scratch(), dtype=torch.uint8)
    library.mg_conv_run(
        ctypes.byref(
            _Conv(
                x=codes.data_ptr(),
                x_scales=x_scales.data_ptr(),
                codes=weight.codes.data_ptr(),
                scales=weight.scales.data_ptr(),
                zeros=weight.zeros.data_ptr() if weight.bits == 4 else None,
                bias=None if bias is None else bias.data_ptr(),
                y=y.data_ptr(),
                scratch=scratch.data_ptr(),
                images=images,
                channels=channels,
                padded_height=padded_height,
                padded_width=padded_width,
                out=y.shape[1],
                height=y.shape[2],
                width=y.shape[3],
                kernel=_Pair(*geometry.kernel),
                stride=_Pair(*geometry.stride),
                dilation=_Pair(*geometry.dilation),
                depth=8 * weight.codes.shape[1],
                groups=weight.groups,
                group=weight.group,
                bits=weight.bits,
                channels_last=is_channels_last(y),
                isa=native.ISAS[native.isa()],
                threads=threads,
            )
        )
    )


def is_channels_last(x: Tensor) -> bool:
    """Whether the channels of x are innermost in memory; a plain contiguous tensor counts as planes."""
    return not x.is_contiguous() and x.is_contiguous(memory_format=torch.channels_last)
