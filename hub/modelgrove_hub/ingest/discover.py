"""Find the models in a folder: which files belong together, and what the model may be called."""

from __future__ import annotations

import hashlib
import os
import re
import stat
from collections.abc import Container, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from modelgrove_hub.errors import DataError, ModelgroveError, NotFoundError
from modelgrove_hub.formats.onnx import data_files
from modelgrove_hub.formats.walking import MAX_DEPTH, files_below
from modelgrove_hub.registry.attestations import SIGNATURE_FILE

WEIGHT_SUFFIXES = frozenset({".safetensors", ".gguf", ".onnx", ".ckpt", ".pt", ".pth", ".bin", ".pkl"})
FOLDER_MARKS = ("model_index.json", "adapter_config.json", "config.json")
_INDEX = ".safetensors.index.json"
_SIDECARS = (
    ".md", ".json", ".txt", ".png", ".jpg", ".jpeg", ".webp", ".preview.png", ".preview.jpg", ".preview.jpeg",
    ".preview.webp", ".civitai.info", ".metadata.json", ".cm-info.json",
)  # fmt: skip
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

    @property
    def key(self) -> str:
        """Its path below `top`; "." for `top` itself."""
        return self.root.relative_to(self.top).as_posix() if self.root.is_relative_to(self.top) else str(self.root)

    @property
    def stamp(self) -> str:
        """Changes when a file does (size, time, inode), and not when the model is moved or renamed.

        Raises:
            OSError: a file is gone since.
        """
        whole = self.root not in self.files.values()
        facts = sorted((path if whole else "", *_facts(file)) for path, file in self.files.items())
        return hashlib.blake2b(repr(facts).encode("utf-8", "surrogateescape"), digest_size=16).hexdigest()


def _facts(file: Path) -> tuple[int, int, int]:
    found = file.stat()
    return found.st_size, found.st_mtime_ns, found.st_ino


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
    with os.scandir(folder) as entries:
        seen = sorted((entry.name, entry) for entry in entries if not entry.name.startswith("."))
    kinds = {folder / name: _kind_of(entry) for name, entry in seen}
    linked = {folder / name for name, entry in seen if entry.is_symlink()}
    below = [entry for entry, kind in kinds.items() if kind == _FOLDER and entry not in linked]
    for graph in (entry for entry, kind in kinds.items() if kind == _FILE):
        data.update(data_of(graph).values())
    called = [entry for entry in kinds if entry.suffix in WEIGHT_SUFFIXES and entry not in {*below, *data}]
    weights = [entry for entry in called if kinds[entry] == _FILE]
    odd = [
        Found(entry, {}, _name(entry.with_suffix(""), top), top, f"{entry} is {_oddity(entry, kinds[entry])}")
        for entry in called
        if kinds[entry] != _FILE
    ]
    if _is_model_folder(folder, weights, kinds):
        parts = files_below(folder)
        refused = next((reason for path in parts.values() if (reason := _fault(path, top))), "")
        signature = parts.pop(SIGNATURE_FILE, None)
        return [*odd, Found(folder, parts, _name(folder, top), top, refused, signature)], []
    plain = {entry for entry, kind in kinds.items() if kind == _FILE and entry not in linked}
    alone = [
        _single(weight, _name(weight.with_suffix(""), top), top, _fault(weight, top, plain), plain)
        for weight in weights
    ]
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


def _kind_of(entry: os.DirEntry[str]) -> str:
    # What the directory says of its entries saves asking each of a hundred thousand files.
    if entry.is_symlink():
        return _kind(Path(entry.path))
    if entry.is_file(follow_symlinks=False):
        return _FILE
    return _FOLDER if entry.is_dir(follow_symlinks=False) else _kind(Path(entry.path))


def _oddity(path: Path, kind: str) -> str:
    return f"a link to {kind}" if path.is_symlink() else kind


def _is_model_folder(folder: Path, weights: list[Path], kinds: Mapping[Path, str]) -> bool:
    if kinds.get(folder / "model_index.json") == _FILE:
        return True
    if not weights:
        return False
    marked = any(kinds.get(folder / mark) == _FILE for mark in FOLDER_MARKS)
    if marked or any(entry.name.endswith(_INDEX) for entry in kinds):
        return True
    # A card beside a single weight file makes the folder the model, as on a hub; not when there are more below.
    return len(weights) == 1 and kinds.get(folder / "README.md") == _FILE and not _weights_below(folder)


def _weights_below(folder: Path) -> bool:
    return any("/" in path and file.suffix in WEIGHT_SUFFIXES for path, file in files_below(folder).items())


def _fault(path: Path, top: Path, plain: Container[Path] = ()) -> str:
    """Why a file is not even opened, or nothing. `plain` are files that are known to be no links."""
    if _DECEIVING.search(str(path)):
        return f"{path}: a name with control characters, or that is not UTF-8: rename it"
    if path in plain:
        return ""
    target = path.resolve()
    return "" if target.is_relative_to(top) else f"{path.name} is a link to {target}, outside {top}: ingest that folder"


def _single(
    weight: Path, name: str, top: Path, refused: str = "", plain: Container[Path] | None = None
) -> Found:  # fmt: skip
    """One weight file with what lies beside it; `plain` are the regular files there, if they were looked at."""
    data = {} if refused else data_of(weight)
    refused = refused or next((fault for path in data.values() if (fault := _fault(path, top))), "")
    files = {} if refused else {weight.name: weight, **data}
    for suffix in _SIDECARS:
        sidecar = weight.with_name(f"{weight.stem}{suffix}")
        regular = sidecar in plain if plain is not None else _kind(sidecar) == _FILE and not sidecar.is_symlink()
        if regular:
            files[sidecar.name] = sidecar
    return Found(weight, files, name, top, refused)


def _name(path: Path, top: Path) -> str:
    """The last two parts below `top`: an owner and a name, as far as the folders tell."""
    parts = path.relative_to(top).parts[-2:] if path != top else (top.name,)
    return "/".join(parts)
