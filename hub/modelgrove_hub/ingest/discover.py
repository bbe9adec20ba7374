"""Find the models in a folder: which files belong together, and what the model may be called."""

from __future__ import annotations

import re
import stat
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from modelgrove_hub.errors import DataError, ModelgroveError, NotFoundError
from modelgrove_hub.formats.onnx import data_files
from modelgrove_hub.formats.walking import MAX_DEPTH, files_below
from modelgrove_hub.registry.attestations import SIGNATURE_FILE

WEIGHT_SUFFIXES = frozenset({".safetensors", ".gguf", ".onnx", ".ckpt", ".pt", ".pth", ".bin", ".pkl"})
FOLDER_MARKS = ("model_index.json", "adapter_config.json", "config.json")
_INDEX = "*.safetensors.index.json"
_SIDECARS = (".md", ".json", ".txt", ".png", ".jpg")
_DECEIVING = re.compile("[\0-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")
"""Control characters, changes of the writing direction, and bytes that are no UTF-8."""
_FILE, _FOLDER, _MISSING = "a file", "a folder", "not there"
_KINDS = (
    (stat.S_ISREG, _FILE), (stat.S_ISDIR, _FOLDER), (stat.S_ISFIFO, "a named pipe"), (stat.S_ISSOCK, "a socket"),
    (stat.S_ISCHR, "a device"), (stat.S_ISBLK, "a device"),
)  # fmt: skip


@dataclass(frozen=True)
class Found:
    """One model on disk: `root` is what recognition reads, `files` are its parts by path in the model."""

    root: Path
    files: dict[str, Path]
    name: str
    top: Path
    """The folder that is ingested: links may lead anywhere inside it."""
    refused: str = ""
    """Why it is not even opened; empty for everything else."""
    signature: Path | None = None
    """A signature over the files that lies beside them: kept with the model, no part of it."""


def discover(path: Path) -> Iterator[Found]:
    """All models at or under `path`, in sorted order.

    A folder with a `model_index.json`, `adapter_config.json`, `config.json` or a shard index is
    one model; any other weight file is a model of its own, with the files that an ONNX graph
    keeps data in, and the side-car files that share its stem. What is called like weights and
    cannot be read as such (a pipe, a device, a link that leaves `path` or leads nowhere) comes
    refused, and so does a folder that cannot be read.

    Raises:
        NotFoundError: there is nothing at `path`.
    """
    kind = _kind(path)
    if kind == _MISSING and not path.is_symlink():
        raise NotFoundError(f"{path}: no such file or folder")
    if kind == _FOLDER:
        yield from _walk(path.resolve())
    else:
        yield _single(path, path.stem, path.parent.resolve(), "" if kind == _FILE else f"{path} is {kind}")


def data_of(weight: Path) -> dict[str, Path]:
    """The files in which an ONNX graph keeps data of its own, by path from its folder; none of any other file.

    Nor of a graph that cannot be read: what is wrong with it is said when it is prepared.
    """
    if weight.suffix != ".onnx":
        return {}
    try:
        files = data_files(weight)
    except ModelgroveError:
        return {}
    return {file.relative_to(weight.parent).as_posix(): file for file in files if _kind(file) == _FILE}


def _walk(top: Path) -> Iterator[Found]:
    waiting, data = [top], set[Path]()
    while waiting:
        folder = waiting.pop()
        try:
            if len(folder.relative_to(top).parts) > MAX_DEPTH:
                raise DataError(f"{folder}: folders nested deeper than {MAX_DEPTH}")
            found, below = _look_into(folder, top, data)
        except DataError as error:
            yield Found(folder, {}, _name(folder, top), top, str(error))
        except OSError as error:
            yield Found(folder, {}, _name(folder, top), top, f"{folder}: {error.strerror}")
        else:
            yield from found
            waiting += reversed(below)


def _look_into(folder: Path, top: Path, data: set[Path]) -> tuple[list[Found], list[Path]]:
    """The models that lie in a folder, and the folders below where more may be.

    `data` are the files that ONNX graphs keep data in, here and in folders seen before: no models of their own.
    """
    kinds = {entry: _kind(entry) for entry in sorted(folder.iterdir()) if not entry.name.startswith(".")}
    below = [entry for entry, kind in kinds.items() if kind == _FOLDER and not entry.is_symlink()]
    for graph in (entry for entry, kind in kinds.items() if kind == _FILE):
        data.update(data_of(graph).values())
    called = [entry for entry in kinds if entry.suffix in WEIGHT_SUFFIXES and entry not in {*below, *data}]
    weights = [entry for entry in called if kinds[entry] == _FILE]
    odd = [
        Found(entry, {}, _name(entry.with_suffix(""), top), top, f"{entry} is {_oddity(entry, kinds[entry])}")
        for entry in called
        if kinds[entry] != _FILE
    ]
    if _is_model_folder(folder, weights):
        parts = files_below(folder)
        refused = next((reason for path in parts.values() if (reason := _fault(path, top))), "")
        signature = parts.pop(SIGNATURE_FILE, None)
        return [*odd, Found(folder, parts, _name(folder, top), top, refused, signature)], []
    alone = [_single(weight, _name(weight.with_suffix(""), top), top, _fault(weight, top)) for weight in weights]
    if len(alone) == 1 and kinds.get(folder / SIGNATURE_FILE) == _FILE and not alone[0].refused:
        alone = [replace(alone[0], signature=folder / SIGNATURE_FILE, refused=_fault(folder / SIGNATURE_FILE, top))]
    return [*odd, *alone], below


def _kind(path: Path) -> str:
    """What is at `path`, in words; links are followed."""
    try:
        mode = path.stat().st_mode
    except (FileNotFoundError, NotADirectoryError):
        return _MISSING
    except OSError as error:
        return f"not to be opened ({error.strerror})"
    return next((name for fits, name in _KINDS if fits(mode)), "not a regular file")


def _oddity(path: Path, kind: str) -> str:
    return f"a link to {kind}" if path.is_symlink() else kind


def _is_model_folder(folder: Path, weights: list[Path]) -> bool:
    if (folder / "model_index.json").is_file():
        return True
    marked = any((folder / mark).is_file() for mark in FOLDER_MARKS) or any(folder.glob(_INDEX))
    # A card beside a single weight file makes the folder the model, as on a hub; not when there are more below.
    carded = len(weights) == 1 and (folder / "README.md").is_file()
    return bool(weights) and (marked or (carded and not _weights_below(folder)))


def _weights_below(folder: Path) -> bool:
    return any("/" in path and file.suffix in WEIGHT_SUFFIXES for path, file in files_below(folder).items())


def _fault(path: Path, top: Path) -> str:
    """Why a file is not even opened, or nothing."""
    if _DECEIVING.search(str(path)):
        return f"{path}: a name with control characters, or that is not UTF-8: rename it"
    target = path.resolve()
    return "" if target.is_relative_to(top) else f"{path.name} is a link to {target}, outside {top}: ingest that folder"


def _single(weight: Path, name: str, top: Path, refused: str = "") -> Found:
    data = {} if refused else data_of(weight)
    refused = refused or next((fault for path in data.values() if (fault := _fault(path, top))), "")
    files = {} if refused else {weight.name: weight, **data}
    for suffix in _SIDECARS:
        sidecar = weight.with_suffix(suffix)
        if _kind(sidecar) == _FILE and not sidecar.is_symlink():
            files[sidecar.name] = sidecar
    return Found(weight, files, name, top, refused)


def _name(path: Path, top: Path) -> str:
    """The last two parts below `top`: an owner and a name, as far as the folders tell."""
    parts = path.relative_to(top).parts[-2:] if path != top else (top.name,)
    return "/".join(parts)
