"""Files of a revision as git would have them: object ids, LFS pointers, folders."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path, PurePosixPath
from typing import Any

from sqlmodel import Session, col, select

from modelgrove_hub.hub import Hub
from modelgrove_hub.ingest.discover import WEIGHT_SUFFIXES
from modelgrove_hub.registry.inputs import place_of
from modelgrove_hub.tables import Blob, Revision, RevisionFile

LARGEST_REGULAR = 10 << 20
"""Bytes of the largest file that is a git object of its own; larger ones are in LFS."""
_LFS_SUFFIXES = WEIGHT_SUFFIXES | {
    ".7z", ".arrow", ".bz2", ".gz", ".h5", ".joblib", ".model", ".msgpack", ".npy", ".npz", ".parquet", ".pb",
    ".pickle", ".rar", ".tar", ".tflite", ".tgz", ".wasm", ".xz", ".zip", ".zst",
}  # fmt: skip
GITATTRIBUTES = "".join(f"*{suffix} filter=lfs diff=lfs merge=lfs -text\n" for suffix in sorted(_LFS_SUFFIXES))
"""What a new repository begins with."""


@dataclass(frozen=True)
class Entry:
    """A file of a revision."""

    path: str
    blob: Blob

    @property
    def lfs(self) -> bool:
        """Whether a git client would see a pointer to it."""
        return is_lfs(self.path, self.blob.size)

    @property
    def pointer(self) -> bytes:
        """The LFS pointer in its place."""
        text = f"version https://git-lfs.github.com/spec/v1\noid sha256:{self.blob.sha256}\nsize {self.blob.size}\n"
        return text.encode()

    def oid(self, hub: Hub, model: str) -> str:
        """The id of its git object, SHA-1."""
        if self.lfs:
            return _git_hash("blob", self.pointer)
        return _hash_of(place_of(hub, model, self.path, self.blob), self.blob.sha256)

    def etag(self, hub: Hub, model: str) -> str:
        """What a hub names its content by: SHA-256 in LFS, else the git object's id."""
        return self.blob.sha256 if self.lfs else self.oid(hub, model)

    def facts(self, hub: Hub, model: str) -> dict[str, Any]:
        """The file as listings show it."""
        facts: dict[str, Any] = {
            "type": "file", "oid": self.oid(hub, model), "size": self.blob.size, "path": self.path,
        }  # fmt: skip
        if self.lfs:
            facts["lfs"] = {"oid": self.blob.sha256, "size": self.blob.size, "pointerSize": len(self.pointer)}
        return facts


def is_lfs(path: str, size: int) -> bool:
    """Whether a file of that name and size is kept in LFS. An empty one cannot be."""
    return size > 0 and (size > LARGEST_REGULAR or PurePosixPath(path).suffix.lower() in _LFS_SUFFIXES)


def entries_of(session: Session, revision: Revision) -> list[Entry]:
    """The files of a revision, by path."""
    query = select(RevisionFile.path, Blob).join(Blob, col(Blob.sha256) == col(RevisionFile.sha256))
    rows = session.exec(query.where(RevisionFile.revision_id == revision.id).order_by(col(RevisionFile.path)))
    return [Entry(path, blob) for path, blob in rows]


def listed(hub: Hub, model: str, entries: Sequence[Entry], folder: str, *, recursive: bool) -> list[dict[str, Any]]:
    """What lies in a folder, or below it: folders and files by path."""
    below = [entry for entry in entries if is_below(entry.path, folder)]
    folders = set(_folders(below, folder))
    if not recursive:
        direct = PurePosixPath(folder)
        below = [entry for entry in below if PurePosixPath(entry.path).parent == direct]
        folders = {path for path in folders if PurePosixPath(path).parent == direct}
    found = [entry.facts(hub, model) for entry in below]
    found += [folder_facts(hub, model, entries, path) for path in folders]
    return sorted(found, key=lambda one: str(one["path"]))


def folder_facts(hub: Hub, model: str, entries: Sequence[Entry], folder: str) -> dict[str, Any]:
    """A folder as listings show it; its id changes when anything in it does."""
    held = "\n".join(
        f"{entry.path} {entry.oid(hub, model)}" for entry in entries if is_below(entry.path, folder)
    )  # fmt: skip
    return {"type": "directory", "oid": _git_hash("tree", held.encode()), "size": 0, "path": folder}


def is_below(path: str, folder: str) -> bool:
    """Whether a file lies in a folder, at any depth; everything lies in ""."""
    return not folder or path.startswith(f"{folder}/")


def _folders(entries: Sequence[Entry], top: str) -> Iterator[str]:
    for entry in entries:
        for parent in PurePosixPath(entry.path).parents:
            if (name := parent.as_posix()) != "." and is_below(name, top):
                yield name


@lru_cache(maxsize=10_000)
def _hash_of(place: Path, _sha256: str) -> str:
    return _git_hash("blob", place.read_bytes())


def _git_hash(kind: str, content: bytes) -> str:
    return hashlib.sha1(f"{kind} {len(content)}\0".encode() + content, usedforsecurity=False).hexdigest()
