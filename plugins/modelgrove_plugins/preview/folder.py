"""Lay a registered model out as a folder that diffusers reads.

Only data files are laid out (JSON, text, safetensors, tokenizers), so neither code nor pickles
of a stranger's folder can be reached. Packed tensors are dequantized on the way.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path, PurePosixPath
from typing import Any

from modelgrove_hub.contracts import InputModel
from modelgrove_hub.errors import DataError, UsageError
from modelgrove_hub.formats.quantized import KEY
from modelgrove_hub.store.header import read_header
from modelgrove_hub.store.writer import SafetensorsWriter
from modelgrove_plugins.compress.packed import dequantized_file

INDEX = "model_index.json"
_DATA = frozenset({".json", ".txt", ".model", ".safetensors"})
_MAX_JSON = 64 << 20
_CONFIG = "config.json"
_SHARDS = ".safetensors.index.json"
_QUANTIZATION = "quantization_config"


def lay_out(model: InputModel, folder: Path) -> Path:
    """Make `folder` hold the model's data files; weights are links, or dequantized copies.

    Raises:
        UsageError: the model is no diffusers folder.
    """
    files = {PurePosixPath(path): source for path, source in model.files().items()}
    if PurePosixPath(INDEX) not in files:
        raise UsageError(
            f"{model.name} cannot paint: it has no {INDEX}. Preview a diffusers folder, with adapters by --lora"
        )
    for path, source in files.items():
        if path.suffix in _DATA and ".." not in path.parts and not path.is_absolute():
            target = folder / _plain_name(path, files)
            target.parent.mkdir(parents=True, exist_ok=True)
            _place(source, target)
    for written in sorted(folder.rglob("*.json")):
        _undo_packing(written)
    return folder


def read_index(folder: Path, name: str) -> dict[str, Any]:
    """The folder's `model_index.json`, with a `_class_name`.

    Raises:
        DataError: it is not JSON of that form.
    """
    index = read_json(folder / INDEX)
    if not isinstance(index.get("_class_name"), str):
        raise DataError(f"{name}: {INDEX} has no _class_name")
    return index


def content_hash(model: InputModel) -> str:
    """sha256 over the sorted (path, sha256) lines of the model's files."""
    total = hashlib.sha256()
    for path in sorted(model.files()):
        total.update(f"{path}\0{model.sha256(path)}\n".encode())
    return total.hexdigest()


def _plain_name(path: PurePosixPath, files: dict[PurePosixPath, Path]) -> PurePosixPath:
    """`x.fp16.safetensors` becomes `x.safetensors` where that is missing: previews are float32 anyway."""
    plain = path.with_name(path.name.replace(".fp16.", "."))
    return path if plain in files else plain


def _place(source: Path, target: Path) -> None:
    if target.suffix == ".safetensors" and KEY in read_header(source).metadata:
        with SafetensorsWriter(target) as writer:
            for name, tensor in dequantized_file(source):
                writer.add(name, tensor)
    else:
        target.symlink_to(source.absolute())


def _undo_packing(path: Path) -> None:
    """Make a configuration and a list of shards speak of the dequantized weights beside them."""
    if path.name == _CONFIG:
        config = read_json(path)
        quantization = config.pop(_QUANTIZATION, None)
        if isinstance(quantization, dict) and quantization.get("quant_method") == "modelgrove":
            _write_json(path, config)
    elif path.name.endswith(_SHARDS):
        shards = sorted(path.parent.glob("*.safetensors"))
        places = {tensor.name: shard.name for shard in shards for tensor in read_header(shard).tensors}
        _write_json(path, {**read_json(path), "weight_map": places})


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object in a model's folder.

    Raises:
        DataError: it is none, or unreasonably large.
    """
    try:
        content = json.loads(path.read_bytes()) if path.stat().st_size <= _MAX_JSON else None
    except (ValueError, RecursionError):
        content = None
    if not isinstance(content, dict):
        raise DataError(f"{path.parent.name}/{path.name} is not a JSON object")
    return content


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.unlink()  # a link into the store, which must stay as it is
    path.write_text(json.dumps(content), "utf-8")
