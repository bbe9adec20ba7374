"""Exporters: what writes a model as files that other tools read, and how the hub runs one.

An exporter is a class with a name, a summary and one method. It is found through the entry-point
group `modelgrove.exporters`, imported when asked for, and so is light, as plugins are.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, ClassVar, Protocol, cast

from modelgrove_hub.contracts import InputModel
from modelgrove_hub.entries import usable
from modelgrove_hub.errors import ConflictError, NotFoundError
from modelgrove_hub.store.disk import storage_errors

GROUP = "modelgrove.exporters"


class Exporter(Protocol):
    """One format that others read."""

    name: ClassVar[str]
    summary: ClassVar[str]

    def run(self, model: InputModel, folder: Path) -> Mapping[str, Any]:
        """Write the model into the empty `folder`; returns a report (JSON values).

        Raises:
            DataError: a tensor cannot be written in this format; the message names it.
        """


def get_exporter(name: str) -> Exporter:
    """The exporter called `name`.

    Raises:
        NotFoundError: there is none; the message lists those there are.
    """
    found = usable(GROUP)
    if name not in found:
        raise NotFoundError(f"no export format {name!r}; there are {', '.join(sorted(found)) or 'none'}")
    return cast(Exporter, found[name].load()())


def check_free(folder: Path) -> None:
    """See that an export may go to `folder`.

    Raises:
        ConflictError: it is neither new nor empty.
    """
    if folder.exists() and any(folder.iterdir()):
        raise ConflictError(f"{folder} is not empty: name a new folder")


def publish_folder(folder: Path, write: Callable[[Path], Mapping[str, Any]]) -> Mapping[str, Any]:
    """Let `write` fill a temporary folder, flush it to disk and give it the name `folder`: whole or not at all.

    Raises:
        ConflictError: `folder` is neither new nor empty.
        StorageError: the disk refuses.
    """
    check_free(folder)
    folder = folder.absolute()
    partial = folder.with_name(f"{folder.name}.{os.getpid()}.partial")
    try:
        with storage_errors(folder):
            partial.mkdir(parents=True)
            report = write(partial)
            for path in (*partial.rglob("*"), partial):
                _flush(path)
            # Over an empty folder it takes its place in one step.
            os.replace(partial, folder)
            _flush(folder.parent)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return report


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
