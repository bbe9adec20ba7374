"""Operators for linear layers of 4-bit weights and 8-bit activations: compiled where that is possible, else in torch.

`modelgrove::linear_w4a8` takes asymmetric codes, `modelgrove::linear_lut4a8` codes into a table; `reference.py` says
what they compute. Both take weights in the order that the compiled kernels read (`csrc/modelgrove.h`), one order for
all instruction sets, made once by `prepack` and `prepack_branch` and never stored in files.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from functools import cache

import torch
from torch import Tensor
from torch.nn.functional import pad

from modelgrove_kernels import native, reference
from modelgrove_kernels.packing import Packed, pack_nibbles, unpack_nibbles
from modelgrove_kernels.reference import LookUp, Weight

PANEL = 32
"""Output columns that lie together."""
UNIT = 16
"""Inputs that lie together; blocks are whole units."""
_WIDEST = 256
"""Inputs of a block at most: a look-up layout's sums of 255 · 127 stay below 2^24."""
_RANKS = 16
"""Ranks are padded to a multiple of this."""
_TABLE = 16


@cache
def blocking(group: int) -> tuple[int, int]:
    """How a group of inputs is cut for the kernels: (inputs with padding, inputs of a block); the least padding."""
    counts = range(-(-group // _WIDEST), max(1, group // 64) + 1)
    widths = [-(-group // (count * UNIT)) * UNIT for count in counts]
    cuts = [(count * width, width) for count, width in zip(counts, widths, strict=True)]
    return min(cuts, key=lambda cut: (cut[0], -cut[1]))


def prepack(weight: Weight) -> Tensor:
    """The weight in the kernels' order: opaque uint8, of 0.56 (group 64) to 0.63 bytes (group 32) a weight.

    Raises:
        ValueError: not of 4 bits, or codes, scales and zero points do not belong together.
    """
    _check(weight)
    rows, groups = weight.scales.shape
    padded, width = blocking(weight.group)
    codes = pad(unpack_nibbles(weight.codes).view(rows, groups, weight.group), (0, padded - weight.group))
    codes = pad(codes.view(rows, groups * padded), (0, 0, 0, -rows % PANEL))
    panels, blocks = len(codes) // PANEL, groups * padded // width
    parts = [_order(codes.view(panels, PANEL, blocks, width))]
    parts.append(_by_block(weight.scales.float(), padded // width).view(torch.uint8))
    if isinstance(weight, LookUp):
        tables = pad(weight.table.expand(rows, -1), (0, 0, 0, -rows % PANEL)).view(panels, 2, 4, 4, _TABLE)
        head = tables.transpose(2, 3).reshape(panels, -1).view(torch.uint8)
        return torch.cat([head, torch.cat(parts, -1).flatten(1)], 1).flatten()
    zeros = torch.zeros_like(weight.scales, dtype=torch.uint8) if weight.zeros is None else weight.zeros
    return torch.cat([*parts, _by_block(zeros, padded // width)], -1).flatten()


def unpack(weight: Tensor, rows: int, columns: int, group: int, look_up: bool) -> Weight:
    """The inverse of `prepack`; scales are float32."""
    padded, width = blocking(group)
    groups = -(-columns // group)
    blocks, panels = groups * padded // width, -(-rows // PANEL)
    whole = weight.view(panels, -1)
    head, body = (whole[:, : PANEL * _TABLE], whole[:, PANEL * _TABLE :]) if look_up else (whole[:, :0], whole)
    records = body.reshape(panels, blocks, -1)
    ends = [PANEL * width // 2, PANEL * width // 2 + PANEL * 4]
    codes = _disorder(records[..., : ends[0]].reshape(panels, blocks, 2, width // UNIT, 2, 4, UNIT))
    codes = codes.view(-1, groups, padded)[:rows, :, :group].flatten(1)
    first = slice(None, None, padded // width)
    scales = records[..., ends[0] : ends[1]].contiguous().view(torch.float32)
    scales = scales.transpose(1, 2).flatten(0, 1)[:rows, first].contiguous()
    if look_up:
        table = head.reshape(panels, 2, 4, 4, _TABLE).transpose(2, 3).reshape(-1, _TABLE)[:rows]
        return LookUp(pack_nibbles(codes), table.view(torch.int8), scales, columns, group)
    zeros = records[..., ends[1] :].transpose(1, 2).flatten(0, 1)[:rows, first].contiguous()
    return Packed(pack_nibbles(codes), scales, zeros, columns, 4, group)


def prepack_branch(down: Tensor, up: Tensor) -> Tensor:
    """`down` (r, columns) and `up` (rows, r) in the kernels' order: opaque float32, ranks padded with zeros.

    Raises:
        ValueError: the factors do not fit together.
    """
    if down.ndim != 2 or up.ndim != 2 or len(down) != up.shape[1]:
        raise ValueError(f"factors {tuple(up.shape)} and {tuple(down.shape)} do not make a branch")
    spare = -len(down) % _RANKS
    down, up = pad(down.float(), (0, 0, 0, spare)), pad(up.float(), (0, spare, 0, -len(up) % PANEL))
    downs = [part.T.flatten() for part in torch.split(down, PANEL)]
    return torch.cat([*downs, up.view(-1, PANEL, up.shape[1]).transpose(1, 2).flatten()])


def unpack_branch(branch: Tensor, rows: int, columns: int) -> tuple[Tensor, Tensor]:
    """The inverse of `prepack_branch`, `down` and `up`; the ranks stay padded."""
    panels = -(-rows // PANEL)
    rank = branch.numel() // max(1, columns + panels * PANEL)
    ranks = [min(PANEL, rank - first) for first in range(0, rank, PANEL)]
    parts = torch.split(branch[: rank * columns], [columns * count for count in ranks])
    downs = [part.view(columns, count).T for part, count in zip(parts, ranks, strict=True)]
    up = branch[rank * columns :].view(panels, rank, PANEL).transpose(1, 2).reshape(-1, rank)[:rows]
    return torch.cat([branch.new_empty(0, columns), *downs]), up


@torch.library.custom_op("modelgrove::linear_w4a8", mutates_args=(), device_types="cpu")
def linear_w4a8(
    x: Tensor,
    weight: Tensor,
    rows: int,
    group: int,
    smooth: Tensor | None = None,
    branch: Tensor | None = None,
    bias: Tensor | None = None,
) -> Tensor:
    """Float32 x (…, columns) → (…, rows) with asymmetric codes; `weight` and `branch` as `prepack` gives them.

    Raises:
        TypeError: a tensor is not of the dtype that it must have.
        ValueError: shapes do not belong together.
    """
    return _linear(x, weight, rows, group, smooth, branch, bias, look_up=False)


@torch.library.custom_op("modelgrove::linear_lut4a8", mutates_args=(), device_types="cpu")
def linear_lut4a8(
    x: Tensor,
    weight: Tensor,
    rows: int,
    group: int,
    smooth: Tensor | None = None,
    branch: Tensor | None = None,
    bias: Tensor | None = None,
) -> Tensor:
    """The same as `linear_w4a8` with codes into a table of int8.

    Raises:
        TypeError: a tensor is not of the dtype that it must have.
        ValueError: shapes do not belong together.
    """
    return _linear(x, weight, rows, group, smooth, branch, bias, look_up=True)


@linear_w4a8.register_fake
@linear_lut4a8.register_fake
def _(x: Tensor, _weight: Tensor, rows: int, *_: object) -> Tensor:
    return x.new_empty((*x.shape[:-1], rows))


def _on_gpu(look_up: bool) -> Callable[..., Tensor]:
    """The implementation for GPUs; `triton` is imported when it is called."""

    def compute(
        x: Tensor,
        weight: Tensor,
        rows: int,
        group: int,
        smooth: Tensor | None = None,
        branch: Tensor | None = None,
        bias: Tensor | None = None,
    ) -> Tensor:
        from modelgrove_kernels.triton.linear import linear

        _check_call(x, weight, rows, group, smooth, branch, bias, look_up=look_up)
        return linear(x, weight, rows, group, smooth, branch, bias, look_up=look_up)

    return compute


linear_w4a8.register_kernel("cuda")(_on_gpu(look_up=False))
linear_lut4a8.register_kernel("cuda")(_on_gpu(look_up=True))


class _Call(ctypes.Structure):
    """`mg_linear_call` of csrc/linear.c."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("x", "smooth", "down", "up", "bias", "weight", "y")),
        *((name, ctypes.c_int64) for name in ("rows", "depth", "columns", "group", "padded", "width", "rank")),
        *((name, ctypes.c_int64) for name in ("lut", "threads", "isa")),
    )


def _linear(
    x: Tensor,
    weight: Tensor,
    rows: int,
    group: int,
    smooth: Tensor | None,
    branch: Tensor | None,
    bias: Tensor | None,
    *,
    look_up: bool,
) -> Tensor:
    _check_call(x, weight, rows, group, smooth, branch, bias, look_up=look_up)
    library = native.library()
    if library is None or not x.numel() or not rows:
        down, up = (None, None) if branch is None else unpack_branch(branch, rows, x.shape[-1])
        plain = unpack(weight, rows, x.shape[-1], group, look_up)
        return reference.linear_w4a8(x, plain, smooth, down, up, bias)
    x = x.contiguous()
    y = x.new_empty((*x.shape[:-1], rows))
    columns = x.shape[-1]
    rank = 0 if branch is None else branch.numel() // (columns + -(-rows // PANEL) * PANEL)
    call = _Call(
        x.data_ptr(),
        smooth.data_ptr() if smooth is not None else None,
        branch.data_ptr() if branch is not None else None,
        branch.data_ptr() + 4 * rank * columns if branch is not None else None,
        bias.data_ptr() if bias is not None else None,
        weight.data_ptr(),
        y.data_ptr(),
        x.numel() // columns,
        columns,
        rows,
        group,
        *blocking(group),
        rank,
        look_up,
        torch.get_num_threads(),
        native.ISAS[native.isa()],
    )
    if library.mg_linear(ctypes.byref(call)):
        raise MemoryError(f"no memory to quantize activations of shape {tuple(x.shape)}")
    return y


def _check_call(
    x: Tensor,
    weight: Tensor,
    rows: int,
    group: int,
    smooth: Tensor | None,
    branch: Tensor | None,
    bias: Tensor | None,
    *,
    look_up: bool,
) -> None:
    """Raises TypeError or ValueError where the compiled kernels would read what is not there."""
    columns, panels = x.shape[-1], -(-rows // PANEL)
    wanted = {
        "x": (x, torch.float32, x.numel()),
        "weight": (weight, torch.uint8, _bytes(rows, columns, group, look_up)),
    }
    if smooth is not None:
        wanted["smooth"] = (smooth, torch.float32, columns)
    if bias is not None:
        wanted["bias"] = (bias, torch.float32, rows)
    if branch is not None:
        whole = max(1, columns + panels * PANEL)
        wanted["branch"] = (branch, torch.float32, branch.numel() // (_RANKS * whole) * _RANKS * whole)
    for name, (tensor, dtype, count) in wanted.items():
        if tensor.dtype != dtype:
            raise TypeError(f"{name} is {tensor.dtype}, it must be {dtype}")
        if tensor.numel() != count or (name != "x" and not tensor.is_contiguous()):
            raise ValueError(f"{name} has {tensor.numel()} elements, {count} contiguous ones were expected")


def _bytes(rows: int, columns: int, group: int, look_up: bool) -> int:
    """Size of a prepacked weight."""
    padded, width = blocking(group)
    record = PANEL * (width // 2 + 4 + (not look_up))
    return -(-rows // PANEL) * (PANEL * _TABLE * look_up + -(-columns // group) * (padded // width) * record)


def _check(weight: Weight) -> None:
    rows, groups = weight.scales.shape
    if isinstance(weight, LookUp):
        fits = weight.table.dtype == torch.int8 and tuple(weight.table.shape) in {(1, _TABLE), (rows, _TABLE)}
    else:
        fits = weight.bits == 4 and weight.zeros is not None and weight.zeros.shape == weight.scales.shape
    if (
        not fits
        or groups != -(-weight.columns // weight.group)
        or weight.codes.shape != (rows, groups * weight.group // 2)
    ):
        raise ValueError(
            f"codes {tuple(weight.codes.shape)} and scales {tuple(weight.scales.shape)} are no 4-bit matrix "
            f"of {weight.columns} columns in groups of {weight.group}"
        )


def _order(codes: Tensor) -> Tensor:
    """Codes (panels, PANEL, blocks, width) → bytes (panels, blocks, PANEL · width / 2), as csrc/modelgrove.h says."""
    panels, _, blocks, width = codes.shape
    parts = codes.view(panels, 2, 4, 4, blocks, width // UNIT, UNIT).permute(0, 4, 1, 5, 3, 2, 6)
    return (parts[:, :, :, :, 0::2] | parts[:, :, :, :, 1::2] << 4).reshape(panels, blocks, -1)


def _disorder(both: Tensor) -> Tensor:
    """Bytes (panels, blocks, halves, units, pairs, lanes, UNIT) → codes (rows, padded columns)."""
    parts = torch.stack([both & 15, both >> 4], 5).flatten(4, 5)
    return parts.permute(0, 2, 5, 4, 1, 3, 6).reshape(-1, both.shape[1] * both.shape[3] * UNIT)


def _by_block(values: Tensor, repeat: int) -> Tensor:
    """(rows, groups) → (panels, blocks, PANEL): each group's value once for each of its blocks."""
    padded = pad(values, (0, 0, 0, -len(values) % PANEL)).repeat_interleave(repeat, 1)
    return padded.view(-1, PANEL, padded.shape[1]).transpose(1, 2).contiguous()
