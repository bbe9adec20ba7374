"""Notice where code writes: an audit hook that remembers every path changed outside one folder.

Python's own file operations are seen, those of compiled libraries are not.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

_WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
_CHANGES = {
    "os.mkdir": 1,
    "os.remove": 1,
    "os.rmdir": 1,
    "os.truncate": 1,
    "os.rename": 2,
    "os.link": 2,
    "os.symlink": 2,
}
"""Audit event → how many of its first arguments are paths that change."""

_watching: list[tuple[Path, list[str]]] = []


@contextmanager
def watch_writes(allowed: Path) -> Iterator[list[str]]:
    """Collect the paths that this process changes outside `allowed` while the block runs."""
    _install()
    outside: list[str] = []
    entry = (allowed.resolve(), outside)
    _watching.append(entry)
    try:
        yield outside
    finally:
        _watching.remove(entry)


@cache
def _install() -> None:
    # Audit hooks cannot be taken out again: one serves for ever, idle when nobody watches.
    sys.addaudithook(_notice)


def _notice(event: str, arguments: tuple[Any, ...]) -> None:
    if not _watching:
        return
    for path in _changed(event, arguments):
        for allowed, outside in _watching:
            if not _harmless(path, allowed):
                outside.append(str(path))


def _changed(event: str, arguments: tuple[Any, ...]) -> Iterator[Path]:
    if event == "open":
        paths = arguments[:1] if isinstance(arguments[2], int) and arguments[2] & _WRITING else ()
    else:
        paths = arguments[: _CHANGES.get(event, 0)]
    for path in paths:
        if isinstance(path, str | bytes | os.PathLike):
            yield Path(os.fsdecode(path))


def _harmless(path: Path, allowed: Path) -> bool:
    # Not resolve(): that reads links, and this runs inside of other calls.
    place = Path(os.path.normpath(Path.cwd() / path))
    return place.is_relative_to(allowed) or place.is_relative_to("/dev") or "__pycache__" in place.parts
