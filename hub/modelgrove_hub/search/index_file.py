"""The file of an index: a line of JSON that says which rows it reflects, then FAISS's own bytes, replaced together.

All bytes are compared with their checksum before FAISS sees any. That is most of what opening costs (bench/README.md),
and is paid once a process.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import BinaryIO

from modelgrove_hub.search.vectors import VectorIndex
from modelgrove_hub.store.disk import create_temporary, publish

FORMAT = 2
_HEADER_LIMIT = 4096
_PIECE = 1 << 20

Identity = tuple[int, int, int]
"""Inode, size and time of change: another content is another file, for files are only replaced."""


@dataclass(frozen=True)
class Version:
    """Which rows an index holds: changes whenever a row of this side and space comes, goes or is made anew."""

    side: str
    space: str
    count: int
    id_sum: int
    newest: str
    """When the last row was made."""
    background: str
    """Digest of the background prompts, which scale the vectors."""


def write_index(path: Path, index: VectorIndex, version: Version) -> Identity:
    """Replace the file at `path`."""
    digest, size = hashlib.sha256(), 0

    def write(piece: bytes) -> int:
        nonlocal size
        digest.update(piece)
        size += len(piece)
        return file.write(piece)

    file, temporary = create_temporary(path.parent)
    file.write(bytes(_HEADER_LIMIT))
    index.write(write)
    header = {"format": FORMAT, "sha256": digest.hexdigest(), "size": size, "version": asdict(version)}
    file.seek(0)
    file.write(json.dumps(header).encode().ljust(_HEADER_LIMIT - 1) + b"\n")
    file.flush()
    identity = _identity_of(os.fstat(file.fileno()))
    publish(file, temporary, path)
    return identity


def read_index(path: Path) -> tuple[VectorIndex, Version, Identity]:
    """What `write_index` wrote.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: not such a file, cut short, or changed.
    """
    with path.open("rb") as file:
        version = _check(file)
        return VectorIndex.read(file.read), version, _identity_of(os.fstat(file.fileno()))


def identity_of(path: Path) -> Identity | None:
    """What tells this file from the one that replaces it; None when there is none."""
    try:
        return _identity_of(path.stat())
    except FileNotFoundError:
        return None


def _identity_of(status: os.stat_result) -> Identity:
    return status.st_ino, status.st_size, status.st_mtime_ns


def _check(file: BinaryIO) -> Version:
    """The version that the header tells, if all that follows has its size and checksum; leaves `file` at the body."""
    header = json.loads(file.read(_HEADER_LIMIT))
    if not isinstance(header, dict) or header.get("format") != FORMAT:
        raise ValueError(f"no header of format {FORMAT}")
    size = os.fstat(file.fileno()).st_size - _HEADER_LIMIT
    if header.get("size") != size:
        raise ValueError(f"{size} bytes follow the header instead of {header.get('size')}")
    if header.get("sha256") != _digest(file.read):
        raise ValueError("the checksum does not fit the content")
    file.seek(_HEADER_LIMIT)
    try:
        return Version(**header["version"])
    except (KeyError, TypeError) as error:
        raise ValueError(f"the header tells no version: {error}") from error


def _digest(read: Callable[[int], bytes]) -> str:
    digest = hashlib.sha256()
    while piece := read(_PIECE):
        digest.update(piece)
    return digest.hexdigest()
