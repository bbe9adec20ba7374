"""Garbage: bytes and Blob rows that nothing names any more, and what killed processes left behind.

Rows go first and bytes after, so a crash in between leaves bytes that the next run takes. Bytes
younger than the grace time are kept, for someone may be about to name them; putting bytes that
are there already makes them young again (see `shelves`).
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from itertools import islice
from pathlib import Path
from typing import Any

from sqlalchemy import Column
from sqlmodel import Session, SQLModel, col, delete, select

from modelgrove_hub.errors import StorageError
from modelgrove_hub.hub import Hub
from modelgrove_hub.tables import Blob, Job, JobState

_BATCH = 500


@dataclass(frozen=True)
class Garbage:
    """A blob that nothing names; `stored` tells whether its bytes are in the store, or it is only a row."""

    sha256: str
    size: int
    stored: bool


@dataclass(frozen=True)
class Collected:
    """What a collection removed, or would remove."""

    garbage: list[Garbage]
    folders: list[Path]
    """Working folders of dead jobs."""
    drafts: int
    """Files in the store that killed writers left half-written."""


def collect(hub: Hub, *, dry_run: bool = False) -> Collected:
    """Remove everything that is garbage now, or with `dry_run` only find it.

    Raises:
        StorageError: the store or the database does not answer, or something cannot be removed.
    """
    garbage, folders = find_garbage(hub), find_leftovers(hub)
    if not dry_run:
        garbage = list(remove_garbage(hub, garbage))
        remove_leftovers(folders)
    return Collected(garbage, folders, hub.store.sweep(hub.settings.gc_grace_seconds, dry_run=dry_run))


def find_garbage(hub: Hub) -> list[Garbage]:
    """What `remove_garbage` would remove now, by sha256. Files referenced in place are never bytes to remove.

    Raises:
        StorageError: the store or the database does not answer.
    """
    # The store before the rows: a blob that is named meanwhile is then seen as named.
    stored = {blob.sha256: blob for blob in hub.store}
    oldest = _oldest(hub)
    with hub.reading() as session:
        names = named(session)
        rows = session.exec(select(Blob).where(Blob.created_at < datetime.fromtimestamp(oldest, UTC)))
        garbage = {row.sha256: Garbage(row.sha256, row.size, stored=False) for row in rows if row.sha256 not in names}
    for sha256, blob in stored.items():
        if blob.added_ns > oldest * 1e9:
            garbage.pop(sha256, None)
        elif sha256 not in names:
            garbage[sha256] = Garbage(sha256, blob.size, stored=True)
    return [garbage[sha256] for sha256 in sorted(garbage)]


def remove_garbage(hub: Hub, garbage: Iterable[Garbage]) -> Iterator[Garbage]:
    """Remove what is still garbage, and yield what was removed. Stop at any time: the rest waits for the next run.

    Raises:
        StorageError: the store or the database does not answer.
    """
    waiting = iter(garbage)
    while batch := list(islice(waiting, _BATCH)):
        for item in _forget(hub, batch):
            if not item.stored or hub.store.delete(item.sha256, unless_newer_than=_oldest(hub)):
                yield item


def find_leftovers(hub: Hub) -> list[Path]:
    """Working folders of jobs and uploads that died longer than the grace time ago."""
    with hub.reading() as session:
        running = set(session.exec(select(Job.id).where(Job.state == JobState.RUNNING)))
    folders = sorted([*(hub.settings.home / "tmp").glob("*"), *hub.settings.incoming.glob("*")])
    return [
        folder for folder in folders if folder.name.partition("-")[0] not in running and _newest(folder) < _oldest(hub)
    ]


def remove_leftovers(folders: Iterable[Path]) -> None:
    """Remove such folders.

    Raises:
        StorageError: one cannot be removed.
    """
    for folder in folders:
        try:
            shutil.rmtree(folder)
        except OSError as error:
            raise StorageError(f"{folder}: cannot be removed: {error.strerror}") from error


def named(session: Session, among: Collection[str] | None = None) -> set[str]:
    """The sha256 of all blobs that a row names (of those `among`, if given): by foreign key, or as a job's artefact."""
    names: set[str] = set()
    for column in naming_columns():
        query: Any = select(column).where(column.is_not(None)).distinct()
        names.update(session.exec(query if among is None else query.where(column.in_(among))))
    for artefacts in session.exec(select(col(Job.outputs)["artefacts"])):
        names.update((artefacts or {}).values())
    return names if among is None else names & set(among)


def naming_columns() -> list[Column[str]]:
    """Every column of every table that points to a blob."""
    keys = (key for table in SQLModel.metadata.sorted_tables for key in table.foreign_keys)
    return [key.parent for key in keys if key.column.table.name == Blob.__tablename__]


def _forget(hub: Hub, batch: list[Garbage]) -> list[Garbage]:
    """Delete the rows of what is still garbage, and return it."""
    with hub.transaction() as session:
        rows = {blob.sha256 for blob in session.exec(select(Blob).where(_is_one_of(batch)))}
        # On PostgreSQL a row that someone is naming right now is locked, and so passed over.
        free = set(session.exec(select(Blob.sha256).where(_is_one_of(batch)).with_for_update(skip_locked=True)))
        kept = named(session, [item.sha256 for item in batch]) | (rows - free)
        gone = [item for item in batch if item.sha256 not in kept and not (item.stored and _young(hub, item))]
        session.exec(delete(Blob).where(_is_one_of(gone)))
    return gone


def _is_one_of(items: list[Garbage]) -> Any:
    return col(Blob.sha256).in_([item.sha256 for item in items])


def _young(hub: Hub, item: Garbage) -> bool:
    blob = hub.store.find(item.sha256)
    return blob is not None and blob.added_ns > _oldest(hub) * 1e9


def _oldest(hub: Hub) -> float:
    return time.time() - hub.settings.gc_grace_seconds


def _newest(folder: Path) -> float:
    """When something in the folder was last written; files may vanish meanwhile."""
    times = [0.0]
    for path in (folder, *folder.rglob("*")):
        try:
            times.append(path.lstat().st_mtime)
        except FileNotFoundError:
            continue
    return max(times)
