"""What exporters share: a model's packed tensors one by one, and the files beside the weights."""

from __future__ import annotations

import json
import shutil
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from modelgrove_hub.contracts import InputModel
from modelgrove_hub.errors import DataError
from modelgrove_hub.formats.quantized import manifest_of
from modelgrove_hub.store.header import read_header
from modelgrove_hub.store.tensors import StoredTensor, tensors_of
from modelgrove_plugins.compress.packed import Stored, unpack

if TYPE_CHECKING:
    from torch import Tensor

WEIGHTS = ".safetensors"
INDEX = ".safetensors.index.json"


def weights_of(model: InputModel) -> dict[str, Path]:
    """The safetensors files, by their paths in the model.

    Raises:
        DataError: there are none.
    """
    files = model.files()
    found = {path: files[path] for path in sorted(files) if path.endswith(WEIGHTS)}
    if not found:
        raise DataError(f"model {model.name} has no safetensors weights, so there is nothing to export")
    return found


def stored_in(path: Path) -> Iterator[tuple[str, Stored | StoredTensor]]:
    """The tensors of one file under their original names: packed ones in parts, others unread.

    Raises:
        DataError: the manifest is broken, or the file does not hold what it says.
    """
    rest = {tensor.name: tensor for tensor in tensors_of(path)}
    manifest = manifest_of(path)
    for name, entry in manifest.tensors.items() if manifest else ():
        yield name, Stored(entry, {suffix: rest.pop(f"{name}.{suffix}").read() for suffix in entry.parts()})
    yield from rest.items()


def dense(name: str, tensor: Stored | StoredTensor) -> Tensor:
    """The values in the original dtype and shape."""
    return unpack(tensor, name) if isinstance(tensor, Stored) else tensor.read()


def uneven(name: str, stored: Stored) -> str:
    """Why a packed tensor is no plain matrix of codes and scales, the only thing other formats know; "" if it is.

    Raises:
        DataError: a scale is NaN or infinite; the message has `name`.
    """
    import torch

    entry, scales = stored.entry, stored.parts.get("scales")
    if scales is not None and not bool(torch.isfinite(scales).all()):
        raise DataError(f"tensor {name}: a scale is NaN or infinite; pack the model again")
    if entry.layout not in ("int8", "int4"):
        return f"{entry.form} is not on an even grid"
    if len(entry.shape) != 2:
        return "a convolution's groups run along the input channels, its stored rows along the kernel"
    if entry.smooth or entry.rotation or entry.rank:
        return "its codes stand for a transformed matrix"
    return ""


def write_others(model: InputModel, folder: Path, config: Mapping[str, Any], *, indexes: bool = True) -> None:
    """Copy what is no weight file into `folder`, where the weights are written already.

    Beside weights, config.json loses our `quantization_config` and gets that of `config`, by its folder in the model;
    lists of shards are made anew from what the shards hold, or left out.
    """
    files = model.files()
    for path, source in files.items():
        target = folder / path
        if path.endswith(WEIGHTS) or (path.endswith(INDEX) and not indexes):
            continue
        target.parent.mkdir(parents=True, exist_ok=True)
        if path.endswith(INDEX):
            target.write_text(json.dumps(_index(path, source, target.parent), indent=2), "utf-8")
        elif target.name == "config.json":
            target.write_bytes(_config(source, config.get(path.rpartition("/")[0])))
        else:
            shutil.copyfile(source, target)


def report_of(folder: Path, fates: Mapping[str, str]) -> dict[str, Any]:
    """What an exporter returns: `fates` says what became of each tensor ("Q8_0", "F16: why it is not packed")."""
    counts = Counter(fates.values())
    files = sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())
    remarks = [f"{count} tensors: {fate}" for fate, count in counts.most_common()]
    return {"files": files, "tensors": dict(fates), "remarks": remarks}


def full_name(path: str, key: str) -> str:
    """A tensor's name in the model: its file's folder, then its name in the file."""
    folder = path.rpartition("/")[0]
    return f"{folder}/{key}" if folder else key


def _index(path: str, source: Path, folder: Path) -> dict[str, Any]:
    fields = _json(source)
    shards = fields.get("weight_map") if fields else None
    if not isinstance(shards, dict):
        raise DataError(f"{path} is no list of shards: it has no weight_map")
    names: Iterable[str] = sorted({str(shard) for shard in shards.values()})
    if lost := [name for name in names if "/" in name or not (folder / name).is_file()]:
        raise DataError(f"{path} names the shard {lost[0]!r}, which is not in the model")
    held = {name: read_header(folder / name).tensors for name in names}
    size = sum(tensor.end - tensor.start for tensors in held.values() for tensor in tensors)
    places = {tensor.name: name for name, tensors in held.items() for tensor in tensors}
    return {"metadata": {"total_size": size}, "weight_map": places}


def _config(source: Path, quantization: Mapping[str, Any] | None) -> bytes:
    fields = _json(source)
    if fields is None:
        return source.read_bytes()
    said = fields.get("quantization_config")
    ours = isinstance(said, dict) and said.get("quant_method") == "modelgrove"
    if not ours and quantization is None:
        return source.read_bytes()
    kept = {key: value for key, value in fields.items() if key != "quantization_config"}
    return json.dumps(kept | ({"quantization_config": quantization} if quantization else {}), indent=2).encode()


def _json(source: Path) -> dict[str, Any] | None:
    try:
        fields = json.loads(source.read_bytes())
    except (ValueError, RecursionError):
        return None
    return fields if isinstance(fields, dict) else None
