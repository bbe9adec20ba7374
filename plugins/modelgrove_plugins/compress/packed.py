"""Packed files between the kernels' arithmetic and the hub's manifest: pack a tensor, read a model back."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from modelgrove_hub.contracts import InputModel
from modelgrove_hub.formats.quantized import CODES, SCALES, ZEROS, PackedTensor, manifest_of
from modelgrove_hub.store.dtypes import DTYPES, NAMES
from modelgrove_hub.store.tensors import tensors_of

if TYPE_CHECKING:
    from torch import Tensor

    from modelgrove_kernels.packing import Packed


def dequantized(model: InputModel) -> Iterator[tuple[str, Tensor]]:
    """All tensors of a model under their original names, dtypes and shapes, one at a time.

    Packed tensors are unpacked, all others come as they are stored, and so do whole files that are not packed.

    Raises:
        DataError: a manifest is broken, or the file does not hold what it says.
    """
    files = model.files()
    for path in sorted(files):
        if path.endswith(".safetensors"):
            yield from dequantized_file(files[path])


def dequantized_file(path: Path) -> Iterator[tuple[str, Tensor]]:
    """All tensors of one file under their original names; see `dequantized`."""
    stored = {tensor.name: tensor for tensor in tensors_of(path)}
    manifest = manifest_of(path)
    if manifest is not None:
        for name, entry in manifest.tensors.items():
            yield name, unpack(entry, {part: stored.pop(part).read() for part in entry.parts(name)}, name)
    for name, tensor in stored.items():
        yield name, tensor.read()


def pack(tensor: Tensor, bits: int, group: int | None) -> tuple[PackedTensor, Packed]:
    """Quantize a tensor of two or more dimensions, rows along the first; a convolution's channels become innermost.

    Raises:
        ValueError: a value is not finite.
    """
    from modelgrove_kernels.packing import quantize

    axes = (0, *range(2, tensor.ndim), 1)
    packed = quantize(tensor.permute(axes).reshape(tensor.shape[0], -1), bits, group)
    entry = PackedTensor(
        layout="int8" if bits == 8 else "int4",
        bits=8 if bits == 8 else 4,
        group=packed.group,
        dtype=NAMES[str(tensor.dtype)],
        shape=tuple(tensor.shape),
        axes=axes,
        error=math.sqrt(packed.noise / packed.signal) if packed.signal else 0.0,
        bytes=packed.nbytes,
    )
    return entry, packed


def parts_of(name: str, packed: Packed) -> dict[str, Tensor]:
    """The stored tensors of a packed one."""
    parts = {name + CODES: packed.codes, name + SCALES: packed.scales}
    return parts if packed.zeros is None else {**parts, name + ZEROS: packed.zeros}


def unpack(entry: PackedTensor, parts: Mapping[str, Tensor], name: str) -> Tensor:
    """The tensor that `parts` stand for, in its original dtype, shape and order of axes."""
    import torch

    from modelgrove_kernels.packing import Packed, dequantize, unfold

    codes, scales, zeros = parts[name + CODES], parts[name + SCALES], parts.get(name + ZEROS)
    packed = Packed(codes, scales, zeros, entry.matrix[1], entry.bits, entry.group)
    values = dequantize(packed, getattr(torch, str(DTYPES[entry.dtype].torch)))
    return unfold(values, entry.shape, entry.axes)
