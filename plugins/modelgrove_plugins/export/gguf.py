"""GGUF: codes in blocks of 32 with their scales, as ggml's Q8_0, Q4_0 and Q4_1 (ggml-quants of the ggml project).

Codes are never rounded again. A block of 32 columns repeats the scale d of its group:

    Q8_0: w = d · q, q int8        Q4_0: w = d · (q - 8)        Q4_1: w = d · q + m, m = -zero · d

d is float16, as in our files. m is rounded to float16: that shifts a block by at most zero · 2^-11 ≤ 0.0074 steps.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from modelgrove_hub.contracts import InputModel
from modelgrove_hub.errors import DataError
from modelgrove_hub.formats.gguf import MAX_SIDES
from modelgrove_hub.store.tensors import StoredTensor
from modelgrove_plugins.compress.packed import Stored
from modelgrove_plugins.export.folder import dense, full_name, report_of, stored_in, uneven, weights_of, write_others

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray
    from torch import Tensor

BLOCK = 32
_PLAIN = ("F16", "F32", "BF16", "F64", "I8", "I16", "I32", "I64")
_SHARD = re.compile(r"-\d{5}-of-\d{5}(?=\.safetensors$)")


class Gguf:
    """Matrices keep their codes where ggml has a block for them; all else is stored in its original dtype."""

    name: ClassVar[str] = "gguf"
    summary: ClassVar[str] = "GGUF with Q8_0, Q4_0 and Q4_1 blocks: ggml's programs and diffusers read it."

    def run(self, model: InputModel, folder: Path) -> Mapping[str, Any]:
        """Write one .gguf in the place of each weight file or list of shards; tensors keep their names.

        Raises:
            DataError: a tensor has a dtype or a number of dimensions that GGUF lacks, a name that is in two shards, or
                a scale that is not finite; the message names it.
        """
        fates: dict[str, str] = {}
        sources: dict[str, list[tuple[str, Path]]] = {}
        for path, source in weights_of(model).items():
            sources.setdefault(_SHARD.sub("", path).removesuffix(".safetensors") + ".gguf", []).append((path, source))
        for target, shards in sources.items():
            (folder / target).parent.mkdir(parents=True, exist_ok=True)
            _write(folder / target, shards, fates)
        write_others(model, folder, {}, indexes=False)
        return report_of(folder, fates)


def _write(target: Path, shards: list[tuple[str, Path]], fates: dict[str, str]) -> None:
    from gguf import GGMLQuantizationType, GGUFWriter

    # The temporary file keeps the tensors out of memory until the header is known.
    writer = GGUFWriter(target, arch="diffusion", use_temp_file=True)
    try:
        for path, source in shards:
            for key, tensor in stored_in(source):
                name = full_name(path, key)
                if name in fates:
                    raise DataError(f"tensor {name} is in two files that would become {target.name}")
                kind, data, shape, why = _converted(key, tensor)
                # Blocks are rows of bytes, from which the package works out the shape; other dtypes it takes as bytes.
                raw = data.shape if kind in ("Q8_0", "Q4_0", "Q4_1") else shape
                writer.add_tensor(key, data, raw_shape=raw, raw_dtype=GGMLQuantizationType[kind])
                fates[name] = f"{kind}: {why}" if why else kind
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
    finally:
        writer.close()


def _converted(key: str, tensor: Stored | StoredTensor) -> tuple[str, NDArray[Any], tuple[int, ...], str]:
    """(ggml type, array, shape, why it is not packed any more)."""
    why = ""
    if isinstance(tensor, Stored):
        why = uneven(key, tensor) or unblocked(tensor)
        if not why:
            kind, data = blocks(tensor)
            return kind, data, tuple(tensor.entry.shape), ""
    dtype = tensor.entry.dtype if isinstance(tensor, Stored) else tensor.dtype
    shape = tuple(tensor.entry.shape if isinstance(tensor, Stored) else tensor.shape)
    if dtype not in _PLAIN:
        raise DataError(f"tensor {key} is {dtype}; GGUF has {', '.join(_PLAIN)}: export as dense")
    if not 1 <= len(shape) <= MAX_SIDES or 0 in shape:
        raise DataError(f"tensor {key} has the shape {shape}; GGUF has 1 to {MAX_SIDES} sides, none of them 0")
    return dtype, _array(dense(key, tensor), dtype), shape, why


def _array(values: Tensor, dtype: str) -> NDArray[Any]:
    import torch

    # NumPy has no bfloat16: its bytes go as they are.
    return (values.contiguous().view(torch.int16) if dtype == "BF16" else values.contiguous()).numpy()


def unblocked(stored: Stored) -> str:
    """Why a matrix of codes cannot be cut into ggml's blocks without rounding; "" if it can."""
    import torch

    entry, scales = stored.entry, stored.parts["scales"]
    columns = entry.matrix[1]
    if columns % BLOCK:
        return f"rows of a length that is no multiple of {BLOCK}"
    if entry.group % BLOCK:
        return f"groups of {entry.group} columns are no multiple of {BLOCK}"
    if scales.dtype != torch.float16 and not torch.equal(scales.half().float(), scales):
        return "scales that float16 cannot hold"
    if entry.layout == "int4" and not bool(torch.isfinite((scales.float() * stored.parts["zeros"]).half()).all()):
        return "minima that float16 cannot hold"
    return ""


def blocks(stored: Stored) -> tuple[str, NDArray[np.uint8]]:
    """(ggml type, bytes (rows, blocks · bytes of a block)) of a matrix for which `unblocked` says nothing."""
    import numpy as np

    from modelgrove_kernels.packing import unpack_nibbles

    entry, parts = stored.entry, stored.parts
    rows, columns = entry.matrix
    count = columns // BLOCK

    def spread(values: Tensor) -> NDArray[Any]:
        # A wider group is several blocks with one scale; the last group of a row may be padded by whole blocks.
        return values.repeat_interleave(entry.group // BLOCK, 1)[:, :count].numpy()[..., None]

    scales = spread(parts["scales"].half())
    if entry.layout == "int8":
        codes = parts["codes"][:, :columns].numpy().reshape(rows, count, BLOCK)
        return "Q8_0", _rows(scales, codes)
    codes = unpack_nibbles(parts["codes"])[:, :columns].numpy().reshape(rows, count, BLOCK)
    # The first half of a block is in the low nibbles, the second in the high ones.
    nibbles = codes[..., : BLOCK // 2] | codes[..., BLOCK // 2 :] << 4
    if bool((parts["zeros"] == 8).all()):
        return "Q4_0", _rows(scales, nibbles)
    lowest = -(spread(parts["scales"].float()) * spread(parts["zeros"].float()))
    return "Q4_1", _rows(scales, lowest.astype(np.float16), nibbles)


def _rows(*fields: NDArray[Any]) -> NDArray[np.uint8]:
    import numpy as np

    octets = np.concatenate([np.ascontiguousarray(field).view(np.uint8) for field in fields], axis=-1)
    return octets.reshape(len(octets), -1)
