"""The C half of `packing.quantize`: groups are rounded bit for bit as in torch, but in one pass over the weights."""

from __future__ import annotations

from ctypes import c_int, c_size_t, c_void_p
from typing import NamedTuple

import torch
from torch import Tensor

from modelgrove_kernels.native import library

DTYPES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}
_NO_MEMORY = 1


class Rounded(NamedTuple):
    """Codes as the layout stores them, scales float16 and zero points uint8 (rows, groups); ‖w‖² and ‖w - ŵ‖²."""

    codes: Tensor
    scales: Tensor
    zeros: Tensor | None
    signal: float
    noise: float


def round_groups(weight: Tensor, bits: int, group: int) -> Rounded | None:
    """Round (rows, columns) with one scale a group of columns.

    None if that is left to torch: there is no library, the dtype is none of `DTYPES`, a value is not finite, or a
    scale is not in float16's normal range.

    Raises:
        MemoryError: there is no room for a row.
    """
    native = library()
    if native is None or weight.dtype not in DTYPES:
        return None
    weight, (rows, columns) = weight.contiguous(), weight.shape
    groups = -(-columns // group)
    codes = torch.empty((rows, groups * group * bits // 8), dtype=torch.int8 if bits == 8 else torch.uint8)
    scales, zeros = torch.empty((rows, groups), dtype=torch.float16), torch.empty((rows, groups), dtype=torch.uint8)
    energy = torch.empty((2, rows), dtype=torch.float64)
    outputs = [c_void_p(tensor.data_ptr()) for tensor in (scales, zeros, codes, energy[0], energy[1])]
    sizes = c_size_t(rows), c_size_t(columns), c_size_t(group), c_int(bits)
    kind, threads = c_int(DTYPES[weight.dtype]), c_int(torch.get_num_threads())
    faults = native.mg_group_quantize(c_void_p(weight.data_ptr()), kind, *sizes, *outputs, threads)
    if faults & _NO_MEMORY:
        raise MemoryError(f"no memory to round a row of {columns} values")
    if faults:
        return None
    signal, noise = energy.sum(1).tolist()
    return Rounded(codes, scales, zeros if bits == 4 else None, signal, noise)
