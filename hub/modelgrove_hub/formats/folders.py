"""List a model that is a folder: diffusers pipeline, PEFT adapter, shards with an index, or one part."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

from modelgrove_hub.errors import CorruptFileError, DataError, UnsafeFileError
from modelgrove_hub.formats.card import read_card
from modelgrove_hub.formats.content import Format
from modelgrove_hub.formats.listing import Contents, ListedTensor, Listing, Role, read_contents
from modelgrove_hub.formats.pickles import PickleReport
from modelgrove_hub.formats.texts import one_line
from modelgrove_hub.formats.walking import MAX_FILES, files_below
from modelgrove_hub.store.disk import open_regular, storage_errors

MAX_CONFIG = 2**20
MAX_INDEX = 32 * 2**20
MAX_BRACKETS = 100_000
"""`{` and `[` in a file: an index has two, the largest configs a few thousand."""

_CONFIGS = {"model_index.json", "config.json", "adapter_config.json", "scheduler_config.json"}
_WEIGHTS = {".safetensors", ".gguf", ".onnx"}
_PICKLES = {".bin", ".pt", ".pth", ".ckpt", ".pkl"}
_USUAL = ("model", "diffusion_pytorch_model", "adapter_model")
_INDEX = ".index.json"
_SHARD = re.compile(r"(.+)-(\d{5})-of-(\d{5})(\.safetensors)")
_PRECISION = re.compile(r"\.(fp16|bf16|fp32|fp8|non_ema|ema)(?=[.-])")


@dataclass
class _Gathered:
    """What the parts of a folder add up to."""

    tensors: dict[str, ListedTensor] = field(default_factory=dict)
    metadata: dict[str, str] = field(default_factory=dict)
    scalars: dict[str, float] = field(default_factory=dict)
    pickles: dict[str, PickleReport] = field(default_factory=dict)
    formats: set[Format] = field(default_factory=set)
    files: dict[str, Role] = field(default_factory=dict)
    stored: dict[str, int] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    def add(self, contents: Contents, prefix: str, name: str) -> None:
        for tensor, listed in contents.tensors.items():
            if prefix + tensor in self.tensors:
                raise CorruptFileError(f"{name}: tensor {tensor!r} is in another file of the model too")
            self.tensors[prefix + tensor] = listed
        self.scalars |= {prefix + tensor: value for tensor, value in contents.scalars.items()}
        self.metadata = {**contents.metadata, **self.metadata}
        self.formats.add(contents.format)
        self.stored |= {prefix + tensor: size for tensor, size in contents.stored.items()}
        self.files[name] = Role.PICKLE if contents.pickle else Role.WEIGHTS
        self.files |= {(PurePosixPath(name).parent / place).as_posix(): Role.WEIGHTS for place in contents.data}
        if contents.pickle:
            self.pickles[name] = contents.pickle


def list_folder(folder: Path, within: Path) -> Listing:
    """List the model in `folder`; see `list_model`."""
    files = files_below(folder)
    _refuse_links(files, within.resolve())
    gathered = _Gathered(files={path: _plain_role(path) for path in files})
    configs = {path: _read_json(file, MAX_CONFIG) for path, file in files.items() if file.name in _CONFIGS}
    parts = _parts(files)
    for part in parts:
        inside = {path: file for path, file in files.items() if _parent(path) == part}
        _add_part(gathered, inside, part)
    if not gathered.tensors and not gathered.pickles:
        raise DataError(f"{folder}: no weights in this folder")
    named = tuple(sorted({name.partition("/")[0] for name in gathered.tensors})) if _has_parts(parts, gathered) else ()
    return Listing(
        format=_format(configs, gathered, named),
        tensors=gathered.tensors,
        metadata=gathered.metadata,
        configs=configs,
        files=gathered.files,
        parts=named,
        scalars=gathered.scalars,
        pickles=gathered.pickles,
        notes=tuple(gathered.notes),
        card=read_card({path: file for path, file in files.items() if path == "README.md"}),
    )


def chosen_weights(paths: Iterable[str]) -> list[str]:
    """The weight files of a model that make it up, by path: all but spare copies in another precision or format.

    Raises:
        CorruptFileError: shards are missing.
    """
    paths = list(paths)
    chosen = [path for part in _parts(paths) for path in _choose([p for p in paths if _parent(p) == part])]
    return sorted(chosen)


def _refuse_links(files: Mapping[str, Path], within: Path) -> None:
    for path in files.values():
        if path.is_symlink() and not path.resolve().is_relative_to(within):
            raise UnsafeFileError(f"{path}: a link to {path.resolve()}, outside {within}")


def _parts(paths: Iterable[str]) -> list[str]:
    """The subfolders that hold weights, or "" when the weights lie in the folder itself."""
    paths = set(paths)
    holding = sorted({_parent(path) for path in paths if PurePosixPath(path).suffix in _WEIGHTS | _PICKLES})
    pipeline = "model_index.json" in paths and any(holding)
    if "" in holding and not pipeline:
        return [""]
    return [part for part in holding if part and "/" not in part]


def _add_part(gathered: _Gathered, files: Mapping[str, Path], part: str) -> None:
    """Add the best copy of a part's weights; other copies are spare."""
    prefix = f"{part}/" if part else ""
    chosen = _choose(files)
    for path, file in files.items():
        if file.suffix in _WEIGHTS | _PICKLES:
            gathered.files[path] = Role.PICKLE if file.suffix in _PICKLES else Role.SPARE
    for path, inner in chosen.items():
        gathered.add(read_contents(files[path]), prefix + inner, path)
    for path, file in files.items():
        if path.endswith(".safetensors" + _INDEX) and not _PRECISION.search(path):
            gathered.notes += _check_index(path, file, files, gathered.stored, prefix)


def _choose(paths: Iterable[str]) -> dict[str, str]:
    """The weight files to list, each with the prefix its tensors get.

    Safetensors before GGUF before ONNX before pickles; full precision before its copies.
    """
    paths = list(paths)
    for suffixes in ({".safetensors"}, {".gguf"}, {".onnx"}, _PICKLES):
        fitting = [path for path in paths if PurePosixPath(path).suffix in suffixes]
        plain = [path for path in fitting if not _PRECISION.search(PurePosixPath(path).name)]
        if fitting:
            return _one_set(plain or fitting)
    return {}


def _one_set(paths: list[str]) -> dict[str, str]:
    shards = [path for path in paths if _SHARD.fullmatch(path)]
    if shards:
        _check_shards(shards)
        return dict.fromkeys(shards, "")
    usual = [path for path in paths if PurePosixPath(path).stem in _USUAL]
    if len(paths) == 1 or usual:
        return {(usual or paths)[0]: ""}
    # Unrelated files side by side are parts of their own.
    return {path: f"{PurePosixPath(path).stem}/" for path in paths}


def _check_shards(shards: list[str]) -> None:
    match = _SHARD.fullmatch(shards[0])
    if match is None:
        return
    stem, total, suffix = match[1], int(match[3]), match[4]
    wanted = {f"{stem}-{number:05}-of-{total:05}{suffix}" for number in range(1, min(total, MAX_FILES) + 1)}
    if missing := sorted(wanted - set(shards)):
        raise CorruptFileError(f"{stem}: missing shards: {_some(missing)}")


def _check_index(path: str, file: Path, files: Mapping[str, Path], stored: Mapping[str, int], prefix: str) -> list[str]:
    """Refuse an index that leads astray. Returns a note if it is wrong about the size, for which no loader cares."""
    index = _read_json(file, MAX_INDEX)
    places = index.get("weight_map")
    if not isinstance(places, dict) or not all(isinstance(shard, str) for shard in places.values()):
        raise CorruptFileError(f"{file}: no weight_map from tensor names to file names")
    shards = set(places.values())
    if astray := sorted(shard for shard in shards if PurePosixPath(shard).name != shard or shard in (".", "..")):
        raise UnsafeFileError(f"{file}: shards outside the folder: {_some(astray)}")
    folder = f"{_parent(path)}/" if _parent(path) else ""
    if missing := sorted(shard for shard in shards if folder + shard not in files):
        raise CorruptFileError(f"{file}: missing shards: {_some(missing)}")
    if lost := sorted(name for name in places if prefix + name not in stored):
        raise CorruptFileError(f"{file}: tensors in no shard: {_some(lost)}")
    metadata = index.get("metadata")
    claimed = metadata.get("total_size") if isinstance(metadata, dict) else None
    total = sum(stored[prefix + name] for name in places)
    if claimed is None or claimed == total:
        return []
    return [f"{path} claims a total_size of {one_line(str(claimed)[:40])} bytes; its tensors have {total}"]


def _has_parts(parts: list[str], gathered: _Gathered) -> bool:
    chosen = [path for path, role in gathered.files.items() if role is Role.WEIGHTS]
    return parts != [""] or (len(chosen) > 1 and not any(_SHARD.fullmatch(path) for path in chosen))


def _format(configs: Mapping[str, Any], gathered: _Gathered, parts: tuple[str, ...]) -> str:
    if "model_index.json" in configs and parts:
        return "diffusers"
    if "adapter_config.json" in configs:
        return "peft"
    if any(role is Role.INDEX for role in gathered.files.values()):
        return "sharded"
    return "+".join(sorted(gathered.formats))


def _plain_role(path: str) -> Role:
    name = PurePosixPath(path)
    if path.endswith(_INDEX):
        return Role.INDEX
    if name.suffix in _WEIGHTS:
        return Role.SPARE
    if name.suffix in _PICKLES:
        return Role.PICKLE
    if name.suffix == ".py":
        return Role.CODE
    if name.suffix == ".md":
        return Role.CARD
    return Role.CONFIG if name.suffix in (".json", ".yaml", ".txt") else Role.OTHER


def _read_json(file: Path, most: int) -> dict[str, Any]:
    with open_regular(file) as stream, storage_errors(file):
        raw = stream.read(most + 1)
    if len(raw) > most:
        raise CorruptFileError(f"{file}: more than {most} bytes of JSON")
    if raw.count(b"[") + raw.count(b"{") > MAX_BRACKETS:
        raise CorruptFileError(f"{file}: more than {MAX_BRACKETS} brackets of JSON")
    try:
        parsed = json.loads(raw, object_pairs_hook=_once)
    except (ValueError, RecursionError) as error:
        raise CorruptFileError(f"{file}: not JSON: {error}") from None
    if not isinstance(parsed, dict):
        raise CorruptFileError(f"{file}: not a JSON object")
    return parsed


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    entries = dict(pairs)
    if len(entries) != len(pairs):
        # Two readers could see two different models.
        raise ValueError("a key is given twice")
    return entries


def _parent(path: str) -> str:
    parent = PurePosixPath(path).parent.as_posix()
    return "" if parent == "." else parent


def _some(names: list[str]) -> str:
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")
