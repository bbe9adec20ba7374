"""Opening local files that strangers may have made, and publishing new ones without half-written states."""

from __future__ import annotations

import os
import secrets
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from io import BufferedReader
from pathlib import Path
from typing import BinaryIO

from modelgrove_hub.errors import DataError, NotFoundError, PluginError, StorageError

TEMPORARY = ".part"
"""Suffix of files being written; their names start with a dot, so that `discover` passes them over."""


def output_place(folder: Path, path: str) -> Path:
    """Where a plugin's output file `path` lies in its output folder; parent folders exist.

    Raises:
        PluginError: the path leaves the folder.
    """
    root = folder.resolve()
    place = (root / path).resolve()
    if place == root or not place.is_relative_to(root):
        raise PluginError(f"output path {path!r} is not inside the output folder")
    place.parent.mkdir(parents=True, exist_ok=True)
    return place


@contextmanager
def storage_errors(subject: str | Path) -> Iterator[None]:
    """Turn an `OSError` (no space, no permission, a dying disk) into a `StorageError` about `subject`."""
    try:
        yield
    except OSError as error:
        raise StorageError(f"{subject}: {error.strerror or error}") from error


def open_regular(path: Path) -> BufferedReader:
    """Open a regular file for reading. A named pipe or device is refused and never waited for.

    Raises:
        NotFoundError: there is no such file.
        DataError: it is a folder, pipe, socket or device.
        StorageError: it cannot be opened.
    """
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except FileNotFoundError as error:
        raise NotFoundError(f"{path}: no such file") from error
    except OSError as error:
        raise StorageError(f"{path}: {error.strerror}") from error
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise DataError(f"{path}: not a regular file")
    return os.fdopen(descriptor, "rb")


def create_temporary(folder: Path, permissions: int = 0o666) -> tuple[BinaryIO, Path]:
    """A new file in `folder` (made if need be) under a name nobody uses: open for reading and writing."""
    make_folder(folder)
    path = folder / temporary_name()
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, permissions)
    return os.fdopen(descriptor, "r+b"), path


def temporary_name() -> str:
    """A fresh name for a file being written."""
    return f".{secrets.token_hex(8)}{TEMPORARY}"


def publish(file: BinaryIO, temporary: Path, target: Path) -> None:
    """Close `file` and rename it to `target`, such that after a power cut there is all of it or nothing."""
    finish(file)
    make_folder(target.parent)
    move(temporary, target)


def finish(file: BinaryIO) -> None:
    """Close `file` with its bytes on disk."""
    with file:
        file.flush()
        os.fsync(file.fileno())


def move(temporary: Path, target: Path) -> None:
    """Rename a file whose bytes are on disk already into a folder that exists, and make the new name last."""
    os.replace(temporary, target)
    # Renaming between two links of one file does nothing, by POSIX: drop the old name then.
    temporary.unlink(missing_ok=True)
    sync_folder(target.parent)


def make_folder(folder: Path) -> None:
    """Create `folder` and its parents; each new name is on disk when this returns."""
    if folder.is_dir():
        return
    make_folder(folder.parent)
    folder.mkdir(exist_ok=True)
    sync_folder(folder.parent)


def sync_folder(folder: Path) -> None:
    """Flush a folder's list of names to disk."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
