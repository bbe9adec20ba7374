"""Indexes of model vectors: a cache of the Embedding rows, ids are revision ids.

One a side ("weights" or "card") and text space, kept in memory and in a file that says which rows it reflects. A stale
one is brought up to date by the rows that changed. One that is missing or damaged, or has outgrown its kind, is made
again from all rows; a damaged file is renamed, not deleted.
"""

from __future__ import annotations

import fcntl
import logging
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sqlmodel import Session, col, func, select

from modelgrove_hub.hub import Hub
from modelgrove_hub.search.background import Background
from modelgrove_hub.search.index_file import Identity, Version, identity_of, read_index, write_index
from modelgrove_hub.search.vectors import SAMPLE, VectorIndex, lists_for, load_faiss
from modelgrove_hub.store.disk import make_folder, storage_errors
from modelgrove_hub.tables import Embedding

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    Ids = NDArray[np.int64]
    Vectors = NDArray[np.float32]

log = logging.getLogger(__name__)

_BATCH = 20_000
_PAGE = 1000
_OVERLAP = timedelta(minutes=10)
_UNSAVED = 0.01
"""Share of an index that may change before its file is written again, which takes seconds for a million vectors."""


@dataclass(frozen=True)
class _Opened:
    """An index in memory, the rows it reflects, the file it came from, and how many vectors changed since."""

    index: VectorIndex
    version: Version
    identity: Identity
    unsaved: int = 0


_opened: dict[Path, _Opened] = {}
_opening = threading.Lock()


def open_index(hub: Hub, side: str, space: str, background: Background) -> VectorIndex:
    """The index of one side and text space, as the rows are now. Others search it too: it must not be changed.

    Raises:
        StorageError: FAISS is not installed, or the index folder cannot be written.
    """
    load_faiss()
    path = hub.settings.index / f"{side}-{space}.faiss"
    with hub.reading() as session:
        wanted = version_of(session, side, space, background)
    with _opening, storage_errors(path):
        opened = _latest(path, _opened.get(path))
        if opened is None or opened.version != wanted:
            with _single_writer(path.parent), hub.reading() as session:
                opened = _latest(path, opened)  # another process may have been quicker
                wanted = version_of(session, side, space, background)
                if opened is None or opened.version != wanted:
                    opened = _refreshed(session, path, opened, wanted, background)
        _opened[path] = opened
    return opened.index


def version_of(session: Session, side: str, space: str, background: Background) -> Version:
    """What the rows of this side and space are at now.

    Told by the keys, which are read in a fifth of the time of whole rows. SQLite gives an id again only after the rows
    from it on were removed, and then the last row is a new one.
    """
    keys = select(func.count(), func.sum(Embedding.id), func.max(Embedding.id))
    count, id_sum, last = session.exec(keys.where(*_of(side, space))).one()
    newest = session.exec(select(Embedding.created_at).where(Embedding.id == last)).first()
    return Version(side, space, int(count), int(id_sum or 0), newest.isoformat() if newest else "", background.digest)


def _latest(path: Path, opened: _Opened | None) -> _Opened | None:
    """What is open already if its file is still the same, else the file's; None when there is no good one."""
    if opened is not None and opened.identity == identity_of(path):
        return opened
    try:
        return _Opened(*read_index(path))
    except FileNotFoundError:
        return None
    except ValueError as error:
        aside = path.with_suffix(f".bad-{time.time_ns()}")
        log.warning("%s is damaged (%s): renamed to %s, the index is made again", path, error, aside.name)
        with suppress(FileNotFoundError):  # another process was quicker
            path.rename(aside)
        return None


def _refreshed(
    session: Session, path: Path, opened: _Opened | None, wanted: Version, background: Background
) -> _Opened:
    """The index as `wanted`, with its file written again if much has changed."""
    ids = _ids(session, wanted)
    updated = _updated(session, opened, wanted, ids, background) if opened is not None else None
    if updated is not None and updated.unsaved <= _UNSAVED * len(updated.index):
        return updated
    index = updated.index if updated is not None else _built(session, wanted, ids, background)
    if updated is None:
        log.info("%s: made of %d vectors in %d lists", path, len(index), index.lists)
    return _Opened(index, wanted, write_index(path, index, wanted))


def _updated(session: Session, opened: _Opened, wanted: Version, ids: Ids, background: Background) -> _Opened | None:
    """With the rows that changed; None when these are not known, or the index has outgrown its kind."""
    import numpy as np

    held, lists = opened.version, opened.index.lists
    if held.background != wanted.background or not held.newest or lists_for(len(ids), lists) != lists:
        return None
    newest = datetime.fromisoformat(held.newest)
    # Others may be searching what is in memory; what was just read from the file is ours alone.
    index = opened.index.copy() if opened in _opened.values() else opened.index
    gone = np.setdiff1d(index.ids, ids)
    index.remove(gone)
    changed = len(gone)
    # A row gets its time when it is made, not when it is committed: look a little further back.
    for revisions, vectors, moments in _recent(session, wanted, background, newest - _OVERLAP):
        index.replace(revisions, vectors)
        changed += sum(moment > newest for moment in moments)
    if not np.array_equal(index.ids, ids):
        return None
    return _Opened(index, wanted, opened.identity, opened.unsaved + changed)


def _built(session: Session, wanted: Version, ids: Ids, background: Background) -> VectorIndex:
    import numpy as np

    lists = lists_for(len(ids))
    chosen = np.random.default_rng(0).permutation(ids)[: lists * SAMPLE]
    index = VectorIndex.empty(background.vectors.shape[1], lists, _some(session, wanted, background, chosen))
    query = select(Embedding.revision_id, Embedding.vector).where(*_of(wanted.side, wanted.space))
    for rows in session.exec(query.execution_options(yield_per=_BATCH)).partitions():
        index.replace(*_decoded(rows, background))
    return index


# ---- rows -----------------------------------------------------------------------------------


def _of(side: str, space: str) -> tuple[Any, ...]:
    return Embedding.side == side, Embedding.text_space == space


def _ids(session: Session, wanted: Version) -> Ids:
    """The revisions that have a vector, ascending."""
    import numpy as np

    query = select(Embedding.revision_id).where(*_of(wanted.side, wanted.space))
    return np.sort(np.fromiter(session.exec(query), np.int64))


def _some(session: Session, wanted: Version, background: Background, ids: Ids) -> Vectors:
    """The scaled vectors of these revisions, in no order."""
    import numpy as np

    query = select(Embedding.revision_id, Embedding.vector).where(*_of(wanted.side, wanted.space))
    found = [np.empty((0, background.vectors.shape[1]), np.float32)]
    for start in range(0, len(ids), _PAGE):
        rows = session.exec(query.where(col(Embedding.revision_id).in_(ids[start : start + _PAGE].tolist()))).all()
        found.append(_decoded(rows, background)[1])
    return np.concatenate(found)


def _recent(
    session: Session, wanted: Version, background: Background, since: datetime
) -> Iterator[tuple[Ids, Vectors, list[datetime]]]:
    """Rows made since a moment, from the last id down, until a page has none."""
    query = select(Embedding.revision_id, Embedding.vector, Embedding.created_at).where(*_of(wanted.side, wanted.space))
    query = query.order_by(col(Embedding.id).desc()).execution_options(yield_per=_PAGE)
    for page in session.exec(query).partitions():
        rows = [(revision, vector, moment) for revision, vector, moment in page if moment >= since]
        if not rows:
            return
        revisions, vectors = _decoded([row[:2] for row in rows], background)
        yield revisions, vectors, [moment for _, _, moment in rows]


def _decoded(rows: Sequence[tuple[int, bytes]], background: Background) -> tuple[Ids, Vectors]:
    """Revision ids (n,) and their vectors (n, d), scaled by their spread over the background."""
    import numpy as np

    width = background.vectors.shape[1]
    vectors = np.frombuffer(b"".join(vector for _, vector in rows), "<f4").reshape(len(rows), width)
    return np.array([revision for revision, _ in rows], np.int64), background.scale(vectors)


@contextmanager
def _single_writer(folder: Path) -> Iterator[None]:
    """Wait until no other process writes indexes. The kernel frees the lock of a writer that died."""
    make_folder(folder)
    with (folder / "writer.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield
