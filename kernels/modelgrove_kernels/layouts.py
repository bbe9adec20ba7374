"""What the parts of a packed matrix mean, in plain torch: the reference for every layout of docs/format.md.

A packed matrix M (rows, columns) may act on transformed inputs x' = (x / s)[π] · R, and may have a
branch of low rank beside its codes:

    W = (M + up · down) · Rᵀ · Pᵀ · diag(1 / s)

with s (channels,) per input channel (a convolution's kernel positions share it), π a permutation of
the columns and R a block-diagonal orthogonal matrix. Parts are named as in the file, without the
tensor's name: codes, scales, zeros, table, mask, values, smooth, permutation, rotation, up, down.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from modelgrove_kernels.bitstream import pack_bits, unpack_bits
from modelgrove_kernels.packing import Packed, chunks, dequantize

Parts = Mapping[str, Tensor]


@dataclass(frozen=True)
class Layout:
    """How a matrix of `columns` columns is coded; the fields are those of the manifest's entry."""

    name: str
    columns: int
    bits: int
    group: int
    vector: int = 1
    rotation: str | None = None
    block: int = 0


class Entry(Protocol):
    """What a manifest says of a packed matrix; see `Layout`."""

    @property
    def layout(self) -> str: ...  # noqa: D102
    @property
    def bits(self) -> int: ...  # noqa: D102
    @property
    def group(self) -> int: ...  # noqa: D102
    @property
    def vector(self) -> int: ...  # noqa: D102
    @property
    def rotation(self) -> str | None: ...  # noqa: D102
    @property
    def block(self) -> int: ...  # noqa: D102
    @property
    def matrix(self) -> tuple[int, int]: ...  # noqa: D102


def layout_of(entry: Entry) -> Layout:
    """How the matrix of a manifest's entry is coded."""
    return Layout(entry.layout, entry.matrix[1], entry.bits, entry.group, entry.vector, entry.rotation, entry.block)


def decode(layout: Layout, parts: Parts) -> Tensor:
    """M, float32 (rows, columns): what the codes stand for, before the transform is undone."""
    if layout.name == "lut":
        return _look_up(layout, parts)
    if layout.name == "sparse":
        return _scatter(layout, parts)
    return dequantize(
        Packed(parts["codes"], parts["scales"], parts.get("zeros"), layout.columns, layout.bits, layout.group)
    )


def restore(layout: Layout, parts: Parts) -> Tensor:
    """W, float32 (rows, columns): the matrix that acts on untransformed inputs."""
    matrix = decode(layout, parts)
    if "up" in parts:
        matrix += parts["up"].float() @ parts["down"].float()
    if layout.rotation:
        matrix = rotate(matrix, rotation_of(layout, parts).mT)
    if "permutation" in parts:
        back = torch.empty_like(matrix)
        back[:, parts["permutation"].long()] = matrix
        matrix = back
    return matrix / spread(parts["smooth"], layout.columns) if "smooth" in parts else matrix


def transform(weight: Tensor, layout: Layout, parts: Parts) -> Tensor:
    """W (rows, columns) → the matrix that acts on transformed inputs: what is to be coded. `restore` undoes it."""
    if "smooth" in parts:
        weight = weight * spread(parts["smooth"], layout.columns)
    if "permutation" in parts:
        weight = weight[:, parts["permutation"].long()]
    return rotate(weight, rotation_of(layout, parts)) if layout.rotation else weight


def transform_inputs(inputs: Tensor, layout: Layout, parts: Parts) -> Tensor:
    """x (…, columns) → x' = (x / s)[π] · R."""
    if "smooth" in parts:
        inputs = inputs / spread(parts["smooth"], layout.columns)
    if "permutation" in parts:
        inputs = inputs[..., parts["permutation"].long()]
    return rotate(inputs, rotation_of(layout, parts)) if layout.rotation else inputs


def spread(smooth: Tensor, columns: int) -> Tensor:
    """s per channel → s per column; the channel is the innermost axis."""
    return smooth.float().repeat(columns // len(smooth))


def rotation_of(layout: Layout, parts: Parts) -> Tensor:
    """R as its blocks, (1 | blocks, block, block)."""
    return parts["rotation"].float() if layout.rotation == "stored" else hadamard(layout.block).unsqueeze(0)


def rotate(values: Tensor, blocks: Tensor) -> Tensor:
    """(…, columns) times the block-diagonal matrix of `blocks` (1 | n, block, block)."""
    size = blocks.shape[-1]
    cut = values.reshape(*values.shape[:-1], -1, 1, size)
    return torch.matmul(cut, blocks).reshape(values.shape)


def hadamard(size: int) -> Tensor:
    """Sylvester's Hadamard matrix over √size: symmetric and orthogonal, float32.

    Raises:
        ValueError: `size` is no power of two.
    """
    if size < 1 or size & (size - 1):
        raise ValueError(f"a Hadamard matrix of {size} rows is not built: only powers of two are")
    matrix = torch.ones(1, 1)
    while len(matrix) < size:
        matrix = torch.cat([torch.cat([matrix, matrix], 1), torch.cat([matrix, -matrix], 1)])
    return torch.div(matrix, size**0.5)


def sparse_parts(matrix: Tensor, dtype: torch.dtype) -> dict[str, Tensor]:
    """The parts of layout `sparse` for a matrix (rows, columns) of which many elements are zero."""
    mask = matrix != 0
    return {"mask": pack_bits(mask.to(torch.uint8), 1), "values": matrix[mask].to(dtype)}


def _look_up(layout: Layout, parts: Parts) -> Tensor:
    """w = table[code] · scale; the code of a vector gives `vector` neighbouring columns."""
    scales, table = parts["scales"].float(), parts["table"].float()
    rows, groups = scales.shape
    count = groups * layout.group // layout.vector
    matrix = torch.empty((rows, layout.columns))
    for part in chunks(rows, groups * layout.group):
        codes = unpack_bits(parts["codes"][part], layout.bits, count).long()
        entries = table[part] if len(table) > 1 else table.expand(len(codes), -1, -1)
        values = torch.gather(entries, 1, codes.unsqueeze(-1).expand(-1, -1, layout.vector))
        values = values.reshape(len(codes), groups, layout.group) * scales[part].unsqueeze(-1)
        matrix[part] = values.flatten(1)[:, : layout.columns]
    return matrix


def _scatter(layout: Layout, parts: Parts) -> Tensor:
    """Raises ValueError: the mask has more or fewer bits than there are values."""
    mask, values = unpack_bits(parts["mask"], 1, layout.columns).bool(), parts["values"].float()
    if int(mask.sum()) != len(values):
        raise ValueError(f"the mask keeps {int(mask.sum())} elements, but {len(values)} are stored")
    matrix = torch.zeros(mask.shape)
    matrix[mask] = values
    return matrix
