"""Find the models in a folder: which files belong together, and what the model may be called."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from modelgrove_hub.errors import NotFoundError

WEIGHT_SUFFIXES = frozenset({".safetensors", ".gguf", ".onnx", ".ckpt", ".pt", ".pth", ".bin", ".pkl"})
FOLDER_MARKS = ("model_index.json", "adapter_config.json", "config.json")
_INDEX = "*.safetensors.index.json"
_SIDECARS = (".md", ".json", ".txt", ".png", ".jpg")


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


def discover(path: Path) -> Iterator[Found]:
    """All models at or under `path`, in sorted order; one with a link that leaves `path` comes refused.

    A folder with a `model_index.json`, `adapter_config.json`, `config.json` or a shard index is
    one model; any other weight file is a model of its own, with the side-car files that share
    its stem.

    Raises:
        NotFoundError: there is nothing at `path`.
    """
    if not path.exists():
        raise NotFoundError(f"{path}: no such file or folder")
    if path.is_file():
        yield _single(path, path.stem, path.parent)
    else:
        yield from _walk(path.resolve(), path.resolve())


def _walk(folder: Path, top: Path) -> Iterator[Found]:
    entries = sorted(entry for entry in folder.iterdir() if not entry.name.startswith("."))
    weights = [entry for entry in entries if entry.suffix in WEIGHT_SUFFIXES and entry.is_file()]
    if _is_model_folder(folder, weights):
        parts = dict(_parts(folder))
        refused = next((reason for path in parts.values() if (reason := _leaves(path, top))), "")
        yield Found(folder, parts, _name(folder, top), top, refused)
        return
    for weight in weights:
        yield _single(weight, _name(weight.with_suffix(""), top), top, _leaves(weight, top))
    for entry in entries:
        if entry.is_dir() and not entry.is_symlink():
            yield from _walk(entry, top)


def _is_model_folder(folder: Path, weights: list[Path]) -> bool:
    if (folder / "model_index.json").is_file():
        return True
    marked = any((folder / mark).is_file() for mark in FOLDER_MARKS) or any(folder.glob(_INDEX))
    # A card beside a single weight file makes the folder the model, as on a hub.
    return bool(weights) and (marked or (len(weights) == 1 and (folder / "README.md").is_file()))


def _parts(folder: Path) -> Iterator[tuple[str, Path]]:
    for path in sorted(folder.rglob("*")):
        inside = not any(part.startswith(".") for part in path.relative_to(folder).parts)
        if inside and path.is_file():
            yield path.relative_to(folder).as_posix(), path


def _leaves(path: Path, top: Path) -> str:
    target = path.resolve()
    return "" if target.is_relative_to(top) else f"{path.name} is a link to {target}, outside {top}: ingest that folder"


def _single(weight: Path, name: str, top: Path, refused: str = "") -> Found:
    files = {weight.name: weight}
    for suffix in _SIDECARS:
        sidecar = weight.with_suffix(suffix)
        if sidecar.is_file() and not sidecar.is_symlink():
            files[sidecar.name] = sidecar
    return Found(weight, files, name, top, refused)


def _name(path: Path, top: Path) -> str:
    """The last two parts below `top`: an owner and a name, as far as the folders tell."""
    parts = path.relative_to(top).parts[-2:] if path != top else (top.name,)
    return "/".join(parts)
