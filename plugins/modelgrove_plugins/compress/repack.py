"""Files that other programs quantized, in the packed format: the same codes, so that everything here works on them.

GGUF: Q8_0, Q4_0 and Q4_1 keep their codes, and floating tensors are as they were; other kinds of blocks have no
place in our layouts and are refused. compressed-tensors: int8 and int4 linear layers. See kernels/foreign.py.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any, ClassVar

from modelgrove_hub.contracts import API, Context, InputModel, Kind, Output, Params, Result
from modelgrove_hub.errors import DataError, UsageError
from modelgrove_hub.formats.gguf import Place, places_of
from modelgrove_hub.formats.quantized import PackedTensor, QuantManifest
from modelgrove_hub.ingest.discover import WEIGHT_SUFFIXES
from modelgrove_hub.planning import shown
from modelgrove_hub.store.dtypes import DTYPES, NAMES
from modelgrove_hub.store.tensors import StoredTensor, tensors_of
from modelgrove_hub.tables import Relation
from modelgrove_plugins.compress.packed import Stored
from modelgrove_plugins.compress.streaming import packed_config

if TYPE_CHECKING:
    from torch import Tensor

_BLOCK = 32
_CONFIG = "config.json"
_METHOD = "compressed-tensors"
_PARTS = ("_packed", "_scale", "_zero_point", "_shape")


@dataclass(frozen=True)
class _Found:
    """A tensor in its new form, and the bytes that it had in the file."""

    name: str
    nbytes: int
    tensor: Stored | Tensor
    why: str = ""
    """Why it is not packed, although it was quantized."""


class RepackParams(Params):
    """Nothing to choose: the file decides."""


class Repack:
    """Take over the codes of GGUF and compressed-tensors files."""

    name: ClassVar[str] = "repack"
    kind: ClassVar[Kind] = Kind.COMPRESSOR
    api: ClassVar[int] = API
    summary: ClassVar[str] = (
        "GGUF (Q8_0, Q4_0, Q4_1) and compressed-tensors files in the packed format, not rounded again."
    )
    paper: ClassVar[str] = ""
    Params: ClassVar[type[Params]] = RepackParams

    def run(self, context: Context, params: RepackParams) -> Result:  # noqa: ARG002  (there are none)
        """Write the packed model; the report says which tensors had to be unpacked, and why.

        Raises:
            UsageError: no weight file is GGUF or quantized as compressed-tensors.
            DataError: a tensor is quantized in a way that has no place here, its scales are NaN or infinite, or parts
                are missing or contradict each other; the message names it.
        """
        model = context.inputs[0]
        files = model.files()
        sources = {path: tensors for path in sorted(files) if (tensors := _tensors(path, files)) is not None}
        if not sources:
            raise UsageError(f"model {model.name} has neither GGUF files nor any that compressed-tensors quantized")
        written, report = [], _empty_report()
        for number, (path, tensors) in enumerate(sources.items()):
            context.progress(number / len(sources), path)
            written.append(_write(context, model, path, tensors, report))
        folders = {PurePosixPath(path).parent for path in sources}
        for path, source in files.items():
            place = PurePosixPath(path)
            foreign = place.suffix in WEIGHT_SUFFIXES and place.suffix != ".safetensors"
            if path in sources or foreign or (place.parent in folders and path.endswith(".index.json")):
                continue
            if place.name == _CONFIG and place.parent in folders:
                context.path(path).write_bytes(packed_config(source))
            else:
                shutil.copyfile(source, context.path(path))
            written.append(path)
        return Result((Output(tuple(written), Relation.QUANTIZED, tags=("repacked",)),), report)


def _empty_report() -> dict[str, Any]:
    return {
        "method": Repack.name, "bytes_before": 0, "bytes_after": 0, "quantized": 0, "kept": 0, "unpacked": {},
        "worst": {}, "layers": [], "fidelity": {"reason": "its codes are those of the original"},
    }  # fmt: skip


def _write(context: Context, model: InputModel, path: str, tensors: Iterator[_Found], report: dict[str, Any]) -> str:
    """One file's tensors; returns the new path."""
    target = str(PurePosixPath(path).with_suffix(".safetensors"))
    writer = context.writer(target, {"format": "pt"})
    entries: dict[str, PackedTensor] = {}
    for found in tensors:
        packed = found.tensor if isinstance(found.tensor, Stored) else None
        parts = _named(found.name, found.tensor)
        for key, part in parts.items():
            writer.add(key, part)
        size = sum(part.nbytes for part in parts.values())
        report["bytes_before"] += found.nbytes
        report["bytes_after"] += size
        report["quantized" if packed else "kept"] += 1
        if found.why:
            report["unpacked"][found.name] = found.why
        if packed:
            entries[found.name] = packed.entry
            line = {"name": found.name, "bytes_before": found.nbytes, **shown(packed.entry), "sqnr_db": None}
            report["layers"].append(line)
    if entries:
        manifest = QuantManifest(method=Repack.name, parent=model.sha256(path), tensors=entries)
        for key, value in manifest.metadata().items():
            writer.describe(key, value)
    return target


def _named(name: str, tensor: Stored | Tensor) -> dict[str, Tensor]:
    if isinstance(tensor, Stored):
        return {f"{name}.{suffix}": part for suffix, part in tensor.parts.items()}
    return {name: tensor}


def _tensors(path: str, files: Mapping[str, Path]) -> Iterator[_Found] | None:
    """What is in a weight file of another program; None for all other files."""
    if path.endswith(".gguf"):
        return _of_gguf(files[path])
    config = files.get(str(PurePosixPath(path).with_name(_CONFIG)))
    if path.endswith(".safetensors") and config is not None and _is_compressed(config):
        return _of_compressed(files[path])
    return None


def _of_gguf(path: Path) -> Iterator[_Found]:
    from modelgrove_kernels import foreign

    for place in places_of(path):
        if place.dtype in DTYPES:
            stored = StoredTensor(place.name, place.dtype, place.shape, path, place.start, place.nbytes)
            yield _Found(place.name, place.nbytes, stored.read())
            continue
        if place.dtype not in ("Q8_0", "Q4_0", "Q4_1"):
            raise DataError(
                f"{path}: tensor {place.name} is {place.dtype}: only Q8_0, Q4_0 and Q4_1 have a place in our layouts"
            )
        if len(place.shape) < 2 or 0 in place.shape:
            raise DataError(f"{path}: tensor {place.name} is {place.dtype} of shape {place.shape}: no matrix")
        raw = _raw(path, place)
        parts = {"Q8_0": foreign.q8_0, "Q4_0": foreign.q4_0, "Q4_1": foreign.q4_1}[place.dtype](raw)
        if parts is None:
            values = foreign.q4_1_values(raw).view(place.shape)
            _check_finite(path, place.name, values)
            why = f"{place.dtype} with minima that are no whole steps"
            yield _Found(place.name, place.nbytes, values.half(), why)
            continue
        _check_finite(path, place.name, parts["scales"])
        yield _Found(place.name, place.nbytes, _stored(parts, place.shape, _BLOCK, "F16"))


def _raw(path: Path, place: Place) -> Tensor:
    """The blocks of a tensor, uint8 (rows, bytes of a row); rows are those of the outermost axis."""
    stored = StoredTensor(place.name, "U8", (place.nbytes,), path, place.start, place.nbytes)
    return stored.read().view(place.shape[0], -1)


def _is_compressed(config: Path) -> bool:
    try:
        fields = json.loads(config.read_bytes())
    except (ValueError, RecursionError):
        return False
    said = fields.get("quantization_config") if isinstance(fields, dict) else None
    return isinstance(said, dict) and said.get("quant_method") == _METHOD


def _of_compressed(path: Path) -> Iterator[_Found]:
    tensors = {tensor.name: tensor for tensor in tensors_of(path)}
    scaled = {name.removesuffix("_scale") for name in tensors if name.endswith(".weight_scale")}
    for name, tensor in tensors.items():
        weight = next((name.removesuffix(part) for part in _PARTS if name.endswith(part)), name)
        if weight in scaled:
            continue  # with its scale, below
        if name.endswith((".weight_packed", ".weight_g_idx")):
            raise DataError(f"{path}: tensor {name} has no scale, or its columns are in another order")
        yield _Found(name, tensor.nbytes, tensor.read())
    for name in sorted(scaled):
        if f"{name}_g_idx" in tensors:
            raise DataError(f"{path}: tensor {name} has its columns in another order (g_idx): only plain order is read")
        own = {part: tensors[f"{name}{part}"] for part in ("", *_PARTS) if f"{name}{part}" in tensors}
        yield _Found(name, sum(tensor.nbytes for tensor in own.values()), _compressed(path, name, own))


def _compressed(path: Path, name: str, own: Mapping[str, StoredTensor]) -> Stored:
    import torch

    from modelgrove_kernels.foreign import words_to_codes
    from modelgrove_kernels.packing import pack_nibbles

    scales = own["_scale"].read()
    _check_finite(path, name, scales)
    dtype = NAMES[str(scales.dtype)]
    scales = scales.float() if scales.dtype == torch.bfloat16 else scales
    if "" in own:
        codes = own[""].read()
        if codes.dtype != torch.int8 or codes.ndim != 2 or "_zero_point" in own:
            raise DataError(
                f"{path}: tensor {name} is {own[''].dtype} {own[''].shape}: only symmetric int8 matrices are read"
            )
        rows, columns = codes.shape
    elif "_packed" in own and "_shape" in own:
        rows, columns = _shape(path, name, own)
        codes = words_to_codes(own["_packed"].read(), columns)
    else:
        raise DataError(f"{path}: tensor {name} has a scale, but neither codes nor a shape")
    if scales.ndim != 2 or len(scales) != rows or not scales.shape[1] or columns % scales.shape[1]:
        raise DataError(
            f"{path}: tensor {name}_scale is {tuple(scales.shape)}, which does not divide {(rows, columns)}"
        )
    group = columns // scales.shape[1]
    if codes.dtype == torch.int8:
        return _stored({"codes": codes, "scales": scales}, (rows, columns), group, dtype)
    if columns % 2 or group % 2:
        raise DataError(f"{path}: tensor {name} has groups of {group} columns: only even ones are read")
    zeros = torch.full(scales.shape, 8, dtype=torch.uint8)
    if "_zero_point" in own:
        words = own["_zero_point"].read()
        if words.dtype != torch.int32 or tuple(words.shape) != (-(-rows // 8), scales.shape[1]):
            raise DataError(f"{path}: tensor {name}_zero_point is {own['_zero_point'].dtype} {tuple(words.shape)}")
        zeros = words_to_codes(words.T, rows).T.contiguous()
    parts = {"codes": pack_nibbles(codes.contiguous()), "scales": scales, "zeros": zeros}
    return _stored(parts, (rows, columns), group, dtype)


def _shape(path: Path, name: str, own: Mapping[str, StoredTensor]) -> tuple[int, int]:
    """Raises DataError: the words are not those of eight codes each of such a matrix."""
    sides = own["_shape"].read().flatten().tolist() if own["_shape"].nbytes <= 64 else []
    rows, columns = (int(side) for side in sides) if len(sides) == 2 else (0, 0)
    if own["_packed"].dtype != "I32" or own["_packed"].shape != (rows, -(-columns // 8)) or rows < 1 or columns < 1:
        raise DataError(
            f"{path}: tensor {name}_packed is {own['_packed'].dtype} {own['_packed'].shape}, "
            f"not words of eight 4-bit codes of a matrix {sides}"
        )
    return rows, columns


def _check_finite(path: Path, name: str, scales: Tensor) -> None:
    import torch

    if not bool(torch.isfinite(scales).all()):
        raise DataError(f"{path}: tensor {name}: a scale is NaN or infinite")


def _stored(parts: Mapping[str, Tensor], shape: tuple[int, ...], group: int, dtype: str) -> Stored:
    layout = "int4" if "zeros" in parts else "int8"
    entry = PackedTensor(
        layout=layout, bits=4 if layout == "int4" else 8, group=group, dtype=dtype, shape=shape,
        axes=tuple(range(len(shape))), error=0.0, bytes=sum(part.nbytes for part in parts.values()),
    )  # fmt: skip
    return Stored(entry, parts)
