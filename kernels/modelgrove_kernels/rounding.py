"""The C half of `packing.quantize`: ranges and codes of groups, bit for bit as torch finds them, but faster."""

from __future__ import annotations

from ctypes import c_int, c_size_t, c_void_p

import torch
from torch import Tensor

from modelgrove_kernels.native import library

DTYPES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}


def available(weight: Tensor) -> bool:
    """Whether C can take this matrix."""
    return library() is not None and weight.dtype in DTYPES and weight.numel() > 0


def group_ranges(weight: Tensor, group: int) -> tuple[Tensor, Tensor]:
    """Lowest and highest value of every group of (rows, columns), float32 (rows, groups); NaN if one is not finite.

    Raises:
        MemoryError: there is no room for a row.
    """
    weight = weight.contiguous()
    low = torch.empty((weight.shape[0], -(-weight.shape[1] // group)))
    high = torch.empty_like(low)
    _call("mg_group_ranges", weight, group, low, high)
    return low, high


def group_codes(weight: Tensor, group: int, scales: Tensor, zeros: Tensor | None) -> tuple[Tensor, float, float]:
    """Codes as the layout stores them, ‖w‖² and ‖w - ŵ‖²; `scales` and `zeros` are (rows, groups), no zeros for int8.

    Raises:
        MemoryError: there is no room for a row.
    """
    weight, scales = weight.contiguous(), scales.float().contiguous()
    padded = scales.shape[1] * group
    if zeros is None:
        codes = torch.empty((len(weight), padded), dtype=torch.int8)
    else:
        codes = torch.empty((len(weight), padded // 2), dtype=torch.uint8)
    signal, noise = (torch.empty(len(weight), dtype=torch.float64) for _ in range(2))
    _call("mg_group_round", weight, group, scales, zeros, codes, signal, noise)
    return codes, float(signal.sum()), float(noise.sum())


def _call(name: str, weight: Tensor, group: int, *tensors: Tensor | None) -> None:
    function = getattr(library(), name)
    rows, columns = weight.shape
    sizes = (c_size_t(rows), c_size_t(columns), c_size_t(group))
    pointers = [c_void_p(None if tensor is None else tensor.data_ptr()) for tensor in tensors]
    threads = c_int(torch.get_num_threads())
    if function(c_void_p(weight.data_ptr()), c_int(DTYPES[weight.dtype]), *sizes, *pointers, threads):
        raise MemoryError(f"{name}: no memory for a row of {columns} values")
