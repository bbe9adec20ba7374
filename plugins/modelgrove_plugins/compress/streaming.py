"""What every compressor does around its method: stream a model's tensors through it, keep all else.

Weight files keep their paths, and all other files come along, so that the output is a whole
model. No more than a few of the largest tensors are in memory, and the packed denoiser where it is
compared with the original.
"""

from __future__ import annotations

import json
import math
import shutil
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import groupby
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any

from modelgrove_hub.contracts import Context, InputModel, LazyTensor, Output, Result, TensorWriter
from modelgrove_hub.errors import DataError, UsageError
from modelgrove_hub.formats.quantized import KEY, PackedTensor, QuantManifest
from modelgrove_hub.ingest.discover import WEIGHT_SUFFIXES
from modelgrove_hub.planning import shown, size_of
from modelgrove_hub.store.dtypes import DTYPES
from modelgrove_hub.store.header import read_header
from modelgrove_hub.tables import Relation
from modelgrove_plugins.compress.comparing import PLOT, SHEET, Evidence, compare, draw, seek
from modelgrove_plugins.compress.packed import Stored

if TYPE_CHECKING:
    from torch import Tensor

Quantize = Callable[[LazyTensor], "Stored | Tensor | None"]
"""Tensor → the packed tensor, another tensor in its place, or None to keep it."""

_INDEX = ".safetensors.index.json"
_CONFIG = "config.json"
_FOREIGN = (".qweight", ".weight_scale", ".scale_weight", ".quant_map", ".absmax", ".SCB", "scaled_fp8")
_SHOWN = 5


@dataclass
class _Tally:
    """What happened so far, over all files."""

    total: int
    evidence: Evidence
    before: int = 0
    after: int = 0
    kept: int = 0
    layers: list[dict[str, Any]] = field(default_factory=list)
    parts: dict[str, dict[str, int]] = field(default_factory=dict)
    """Name of a tensor → the keys it is stored under, and the bytes of each."""


def compress(
    context: Context, method: str, parameters: Mapping[str, Any], quantize: Quantize, tag: str,
    *, timesteps: Sequence[int] = (), fidelity: bool | None = None,
) -> Result:  # fmt: skip
    """Pass every tensor of the first input through `quantize` and write the packed model, with a plot of its layers.

    `timesteps` are the bounds of stored activation ranges, for the manifest. `fidelity` is `CompressorParams`'s:
    a denoiser is compared with the original, and the report says so, or why not.

    Raises:
        UsageError: there is nothing to quantize, or the model is an adapter or quantized already.
        DataError: there are no safetensors weights, `quantize` refuses a tensor's values, or a list of shards
            is broken; the message names it.
    """
    model = context.inputs[0]
    files = model.files()
    weights = _weights(model, files)
    everything = [tensor for tensors in weights.values() for tensor in tensors]
    tally = _Tally(sum(map(size_of, everything)), seek(model, everything, fidelity))
    for path, tensors in weights.items():
        writer = context.writer(path, read_header(files[path]).metadata)
        packed = _stream(context, tensors, quantize, writer, tally)
        if packed:
            manifest = QuantManifest(
                method=method, parameters=dict(parameters), parent=model.sha256(path), timesteps=tuple(timesteps),
                tensors=packed,
            )  # fmt: skip
            for key, value in manifest.metadata().items():
                writer.describe(key, value)
    if not tally.layers:
        raise UsageError(f"model {model.name}: nothing to quantize: all tensors are skipped, small or not floating")
    copied, left_out = _copy_others(context, files, weights, tally)
    compared = compare(context, tally.evidence, timesteps, method)
    draw(context, method, tally.layers, compared)
    output = Output((*weights, *copied), Relation.QUANTIZED, tags=(tag,))
    artefacts = (PLOT, SHEET) if "error" in compared else (PLOT,)
    return Result((output,), {"method": method, **_report(tally, left_out), "fidelity": compared}, artefacts)


def _weights(model: InputModel, files: Mapping[str, Path]) -> dict[str, list[LazyTensor]]:
    """The tensors of every weight file, once it is sure that they may be quantized."""
    if model.adapter_type:
        raise UsageError(f"model {model.name} is an adapter ({model.adapter_type}): compress its base instead")
    weights = {path: list(tensors) for path, tensors in groupby(model.tensors(), lambda tensor: tensor.file)}
    for path, tensors in weights.items():
        if KEY in read_header(files[path]).metadata:
            raise UsageError(f"model {model.name} is quantized already: {path} is in the packed format")
        for tensor in tensors:
            small = tensor.dtype.startswith("F") and DTYPES[tensor.dtype].bits <= 8
            if small or tensor.key.endswith(_FOREIGN):
                raise UsageError(f"model {model.name} is quantized already: {path} has {tensor.key} ({tensor.dtype})")
    return weights


def _stream(
    context: Context, tensors: Sequence[LazyTensor], quantize: Quantize, writer: TensorWriter, tally: _Tally
) -> dict[str, PackedTensor]:
    """Write the tensors of one file; returns the manifest's entries."""
    packed: dict[str, PackedTensor] = {}
    for tensor in _ahead(tensors):
        context.progress(0.9 * tally.before / max(1, tally.total), tensor.name)
        result = _quantized(quantize, tensor)
        if result is not None:
            tally.evidence.keep(tensor.name, result)
        stored = _keyed(tensor.key, tensor.read() if result is None else result)
        for key, part in stored.items():
            writer.add(key, part)
        tally.parts[tensor.name] = {key: part.nbytes for key, part in stored.items()}
        tally.before += size_of(tensor)
        tally.after += sum(part.nbytes for part in stored.values())
        if isinstance(result, Stored):
            packed[tensor.key] = result.entry
            tally.layers.append(_layer(tensor, result))
    tally.kept += len(tensors) - len(packed)
    return packed


@dataclass
class _Coming:
    """A tensor that is read, or being read."""

    name: str
    key: str
    file: str
    dtype: str
    shape: tuple[int, ...]
    values: Future[Tensor]

    def read(self) -> Tensor:
        """The values, the same each time: they are not to be changed."""
        return self.values.result()


def _ahead(tensors: Sequence[LazyTensor]) -> Iterator[LazyTensor]:
    """The tensors, each read while the one before it is worked on."""
    with ThreadPoolExecutor(1) as reader:
        coming = deque[_Coming]()
        for tensor in tensors:
            values = reader.submit(tensor.read)
            coming.append(_Coming(tensor.name, tensor.key, tensor.file, tensor.dtype, tensor.shape, values))
            if len(coming) > 1:
                yield coming.popleft()
        yield from coming


def _quantized(quantize: Quantize, tensor: LazyTensor) -> Stored | Tensor | None:
    try:
        result = quantize(tensor)
    except ValueError as error:
        raise DataError(f"tensor {tensor.name}: {error}") from error
    # Rows may be so short that the scales outweigh the codes.
    return None if isinstance(result, Stored) and result.entry.bytes >= size_of(tensor) else result


def _keyed(key: str, result: Stored | Tensor) -> dict[str, Tensor]:
    """The tensors to write, by their keys in the file."""
    if isinstance(result, Stored):
        return {f"{key}.{suffix}": part for suffix, part in result.parts.items()}
    return {key: result}


def _copy_others(
    context: Context, files: Mapping[str, Path], weights: Mapping[str, Any], tally: _Tally
) -> tuple[list[str], list[str]]:
    """Copy what is no weight file. Returns (copied, left out)."""
    others = sorted(files.keys() - weights.keys())
    copied = [path for path in others if PurePosixPath(path).suffix not in WEIGHT_SUFFIXES]
    packed_folders = {PurePosixPath(path).parent for path in weights}
    for path in copied:
        place = PurePosixPath(path)
        if path.endswith(_INDEX):
            context.path(path).write_text(_index(path, files[path], tally), "utf-8")
        elif place.name == _CONFIG and place.parent in packed_folders:
            context.path(path).write_bytes(packed_config(files[path]))
        else:
            shutil.copyfile(files[path], context.path(path))
    return copied, [path for path in others if path not in set(copied)]


def _index(path: str, source: Path, tally: _Tally) -> str:
    """The list of shards, with the stored tensors instead of the original ones."""
    index = _json_object(source)
    shards = index.get("weight_map") if index else None
    if index is None or not isinstance(shards, dict):
        raise DataError(f"{path} is no list of shards: it has no weight_map")
    folder = path.rpartition("/")[0]
    stored = {key: tally.parts.get(f"{folder}/{key}" if folder else key, {}) for key in shards}
    renamed = {part: shards[key] for key, parts in stored.items() for part in parts}
    size = sum(sum(parts.values()) for parts in stored.values())
    return json.dumps({**index, "metadata": {"total_size": size}, "weight_map": renamed}, indent=2)


def packed_config(source: Path) -> bytes:
    """The configuration, saying that the weights are packed: diffusers would put random weights in their place."""
    fields = _json_object(source)
    if fields is None:
        return source.read_bytes()
    return json.dumps({**fields, "quantization_config": {"quant_method": "modelgrove"}}, indent=2).encode()


def _json_object(source: Path) -> dict[str, Any] | None:
    try:
        fields = json.loads(source.read_bytes())
    except (ValueError, RecursionError):
        return None
    return fields if isinstance(fields, dict) else None


def _layer(tensor: LazyTensor, stored: Stored) -> dict[str, Any]:
    error = stored.entry.error
    return {
        "name": tensor.name,
        "bytes_before": size_of(tensor),
        **shown(stored.entry),
        "sqnr_db": round(-20 * math.log10(error), 2) if error else None,
        **stored.remarks,
    }


def _report(tally: _Tally, left_out: list[str]) -> dict[str, Any]:
    """Bytes are those of the tensors, scales, zero points and padding included; no SQNR means that nothing was lost."""
    measured = [layer for layer in tally.layers if layer["sqnr_db"] is not None]
    worst = sorted(measured, key=lambda layer: float(layer["sqnr_db"]))[:_SHOWN]
    return {
        "bytes_before": tally.before,
        "bytes_after": tally.after,
        "quantized": len(tally.layers),
        "kept": tally.kept,
        "left_out": left_out,
        "worst": {layer["name"]: layer["sqnr_db"] for layer in worst},
        "layers": tally.layers,
    }
