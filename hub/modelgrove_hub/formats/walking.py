"""Walk a stranger's folder: bounded in depth and number, links to folders not followed."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from modelgrove_hub.errors import DataError

MAX_FILES = 10_000
"""More files than any model has; a folder with more is not one model."""
MAX_DEPTH = 32
"""Folders in folders; the repositories that people publish have three or four."""


def files_below(folder: Path) -> dict[str, Path]:
    """The regular files below `folder` by path in it, sorted; hidden ones and what is in hidden folders left out.

    Raises:
        DataError: there are more than `MAX_FILES`, or folders nested deeper than `MAX_DEPTH`.
        OSError: a folder cannot be read.
    """
    found: dict[str, Path] = {}
    for path in _walk(folder):
        if len(found) >= MAX_FILES:
            raise DataError(f"{folder}: more than {MAX_FILES} files; that is no model")
        found[path.relative_to(folder).as_posix()] = path
    return dict(sorted(found.items(), key=lambda item: item[1]))


def _walk(folder: Path) -> Iterator[Path]:
    waiting = [(folder, 0)]
    while waiting:
        here, depth = waiting.pop()
        if depth > MAX_DEPTH:
            raise DataError(f"{folder}: folders nested deeper than {MAX_DEPTH}")
        for entry in here.iterdir():
            if entry.name.startswith("."):
                continue
            if entry.is_dir():
                waiting += [] if entry.is_symlink() else [(entry, depth + 1)]
            elif entry.is_file():
                yield entry
