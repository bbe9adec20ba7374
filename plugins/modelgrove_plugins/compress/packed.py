"""Packed files between the kernels' arithmetic and the hub's manifest: pack a tensor, read a model back."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any

from modelgrove_hub.contracts import InputModel, LazyTensor
from modelgrove_hub.errors import CorruptFileError
from modelgrove_hub.formats.quantized import Activations, PackedTensor, manifest_of
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
            parts = {suffix: stored.pop(f"{name}.{suffix}").read() for suffix in entry.parts()}
            yield name, unpack(Stored(entry, parts), name)
    for name, tensor in stored.items():
        yield name, tensor.read()


@dataclass(frozen=True)
class Stored:
    """A packed tensor: its entry in the manifest, its parts by suffix, and what the method says of it in the report."""

    entry: PackedTensor
    parts: Mapping[str, Tensor]
    remarks: Mapping[str, Any] = field(default_factory=dict)
    """JSON values that are in no file: the smoothing strength that won, say."""


def matrix_of(tensor: Tensor) -> Tensor:
    """A tensor of two or more dimensions as (rows, columns); a convolution's channels become innermost."""
    return tensor.permute(axes_of(tensor)).reshape(tensor.shape[0], -1)


def axes_of(tensor: Tensor | LazyTensor) -> tuple[int, ...]:
    """The order of axes in which a tensor is packed: rows first, input channels last."""
    return (0, *range(2, len(tensor.shape)), 1)


def pack(
    tensor: Tensor, bits: int, group: int | None, activations: Activations | None = None, gram: Tensor | None = None
) -> Stored:
    """Round a tensor of two or more dimensions to nearest, or by GPTQ with the Gram matrix of its layer's inputs.

    8 bits are stored as `int8`, 4 as `int4`, fewer as equal steps in a `lut`; `activations` are for the manifest.

    Raises:
        ValueError: a value is not finite.
    """
    from modelgrove_kernels.gptq import gptq
    from modelgrove_kernels.packing import LEVELS, group_width, quantize
    from modelgrove_kernels.uniform import uniform_parts

    matrix = matrix_of(tensor)
    if bits not in LEVELS:
        parts, width = uniform_parts(matrix, bits, group, gram), group_width(matrix.shape[1], bits, group)
        return describe(tensor, parts, layout="lut", bits=bits, group=width, activations=activations)
    packed = quantize(matrix, bits, group)
    return pack_as(tensor, packed if gram is None else gptq(matrix, gram, packed), activations=activations)


def pack_as(
    tensor: Tensor, packed: Packed, remarks: Mapping[str, Any] | None = None, activations: Activations | None = None
) -> Stored:
    """The packed form of `tensor` in layout `int8` or `int4`, however its matrix was rounded."""
    error = math.sqrt(packed.noise / packed.signal) if packed.signal else 0.0
    parts, layout = packed_parts(packed), "int8" if packed.bits == 8 else "int4"
    entry = _entry(tensor, parts, error, layout=layout, bits=packed.bits, group=packed.group, activations=activations)
    return Stored(entry, parts, remarks or {})


def packed_parts(packed: Packed) -> dict[str, Tensor]:
    """The parts of layouts `int8` and `int4`."""
    parts = {"codes": packed.codes, "scales": packed.scales}
    return parts if packed.zeros is None else {**parts, "zeros": packed.zeros}


def describe(tensor: Tensor, parts: Mapping[str, Tensor], **fields: Any) -> Stored:
    """The packed form of `tensor` in any layout: its error and bytes are measured from `parts`.

    `fields` are those of `PackedTensor` that the method decides: layout, bits, group and so on.
    """
    from modelgrove_kernels.layouts import layout_of, restore

    exact = matrix_of(tensor).float()
    draft = _entry(tensor, parts, 0.0, **fields)
    norm = float(exact.norm())
    error = float((restore(layout_of(draft), parts) - exact).norm()) / norm if norm else 0.0
    return Stored(draft.model_copy(update={"error": error}), parts)


def predict(tensor: LazyTensor, **fields: Any) -> PackedTensor:
    """The entry that a tensor will get, from its shape alone: `bytes` are right, `error` is not known.

    `fields` are as in `describe`. Scales, tables and branches are taken to fit into float16.
    """
    axes = axes_of(tensor)
    draft = PackedTensor(dtype=tensor.dtype, shape=tensor.shape, axes=axes, error=0, bytes=0, **fields)
    size = sum(
        prod(part.shape) * min(DTYPES[dtype].bits for dtype in part.dtypes) // 8 for part in draft.parts().values()
    )
    return draft.model_copy(update={"bytes": size})


def predict_rounded(
    tensor: LazyTensor, bits: int, group: int | None, activations: Activations | None = None
) -> PackedTensor:
    """What `pack` will make of a tensor."""
    from modelgrove_kernels.packing import group_width

    width = group_width(prod(tensor.shape[1:]), bits, group)
    layout = {8: "int8", 4: "int4"}.get(bits, "lut")
    return predict(tensor, layout=layout, bits=bits, group=width, activations=activations)


def _entry(tensor: Tensor, parts: Mapping[str, Tensor], error: float, **fields: Any) -> PackedTensor:
    return PackedTensor(
        dtype=NAMES[str(tensor.dtype)],
        shape=tuple(tensor.shape),
        axes=axes_of(tensor),
        error=error,
        bytes=sum(part.nbytes for part in parts.values()),
        **fields,
    )


def unpack(stored: Stored, name: str) -> Tensor:
    """The tensor that the parts stand for, in its original dtype, shape and order of axes.

    Raises:
        CorruptFileError: the parts contradict each other; the message names the tensor.
    """
    import torch

    from modelgrove_kernels.layouts import layout_of, restore
    from modelgrove_kernels.packing import unfold

    entry = stored.entry
    try:
        matrix = restore(layout_of(entry), stored.parts)
    except (ValueError, IndexError, RuntimeError) as error:
        raise CorruptFileError(f"tensor {name}: {error}") from error
    return unfold(matrix.to(getattr(torch, str(DTYPES[entry.dtype].torch))), entry.shape, entry.axes)
