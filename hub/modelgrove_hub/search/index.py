"""FAISS indexes of model vectors: a cache of the Embedding rows, ids are revision ids.

One file a side ("weights" or "card") and text space: a JSON header line, then FAISS's own bytes,
replaced together. The header says which rows the file reflects. A stale file is brought up to
date by the rows that changed; a missing or damaged one is made again from all rows, and the
damaged one is renamed, not deleted.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import logging
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from datetime import datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sqlmodel import Session, col, func, select

from modelgrove_hub.errors import StorageError
from modelgrove_hub.hub import Hub
from modelgrove_hub.search.background import Background
from modelgrove_hub.store.disk import create_temporary, make_folder, publish, storage_errors
from modelgrove_hub.tables import Embedding

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

log = logging.getLogger(__name__)

FORMAT = 1
_HEADER_LIMIT = 4096
_BATCH = 20_000
_OVERLAP = timedelta(minutes=10)


@dataclass(frozen=True)
class Version:
    """Which rows an index holds: changes whenever a row of this side and space comes, goes or is made anew."""

    side: str
    space: str
    count: int
    id_sum: int
    newest: str
    background: str
    """Digest of the background prompts, which scale the vectors."""


class VectorIndex:
    """Vectors by revision id, searched by inner product, exactly."""

    def __init__(self, version: Version, index: Any) -> None:
        self.version, self._index = version, index

    @classmethod
    def empty(cls, version: Version, width: int) -> VectorIndex:
        """An index without vectors, for vectors of `width` numbers."""
        faiss = load_faiss()
        return cls(version, faiss.IndexIDMap2(faiss.IndexFlatIP(width)))

    def __len__(self) -> int:
        return int(self._index.ntotal)

    @property
    def ids(self) -> NDArray[np.int64]:
        """The revision ids held, (n,), in no order."""
        ids: NDArray[np.int64] = load_faiss().vector_to_array(self._index.id_map)
        return ids

    def search(
        self, query: NDArray[np.float32], limit: int, allowed: Sequence[int] | None = None
    ) -> list[tuple[int, float]]:
        """The `limit` best (revision id, inner product) for `query` (d,), best first; only `allowed` ids if given."""
        import numpy as np

        limit = min(limit, len(self) if allowed is None else len(allowed), len(self))
        if limit <= 0:
            return []
        faiss, parameters = load_faiss(), None
        if allowed is not None:
            parameters = faiss.SearchParameters(sel=faiss.IDSelectorBatch(np.asarray(allowed, np.int64)))
        scores, ids = self._index.search(np.ascontiguousarray(query[None], np.float32), limit, params=parameters)
        return [(int(i), float(s)) for i, s in zip(ids[0], scores[0], strict=True) if i >= 0]

    def replace(self, ids: NDArray[np.int64], vectors: NDArray[np.float32]) -> None:
        """Add vectors (n, d) under `ids`; vectors that had these ids go."""
        self.remove(ids)
        self._index.add_with_ids(vectors, ids)

    def remove(self, ids: NDArray[np.int64]) -> None:
        """Forget the vectors of `ids`; ids that are not held do not matter."""
        if len(self) and len(ids):
            self._index.remove_ids(ids)

    def to_bytes(self) -> bytes:
        """The header line and FAISS's bytes."""
        body: bytes = load_faiss().serialize_index(self._index).tobytes()
        header = {"format": FORMAT, "sha256": hashlib.sha256(body).hexdigest(), **asdict(self.version)}
        return json.dumps(header).encode() + b"\n" + body

    @classmethod
    def from_bytes(cls, data: bytes) -> VectorIndex:
        """Read what `to_bytes` wrote.

        Raises:
            ValueError: not such a file, cut short, or changed.
        """
        import numpy as np

        line, found, body = data[:_HEADER_LIMIT].partition(b"\n")
        body = data[len(line) + 1 :]
        header = json.loads(line) if found else None
        if not isinstance(header, dict) or header.pop("format", None) != FORMAT:
            raise ValueError(f"no header of format {FORMAT}")
        if header.pop("sha256", None) != hashlib.sha256(body).hexdigest():
            raise ValueError("the checksum does not fit the content")
        try:
            return cls(Version(**header), load_faiss().deserialize_index(np.frombuffer(body, np.uint8)))
        except (TypeError, RuntimeError) as error:
            raise ValueError(str(error)) from error


def open_index(hub: Hub, side: str, space: str, background: Background) -> VectorIndex:
    """The index of one side and text space, as the rows are now.

    Raises:
        StorageError: FAISS is not installed, or the index folder cannot be written.
    """
    path = hub.settings.index / f"{side}-{space}.faiss"
    with hub.reading() as session:
        wanted = version_of(session, side, space, background)
    with storage_errors(path):
        index = _read(path)
    if index is not None and index.version == wanted:
        return index
    with storage_errors(path), _single_writer(hub.settings.index):
        index = _read(path)  # another process may have been quicker
        with hub.reading() as session:
            fresh = _refresh(session, index, version_of(session, side, space, background), background)
        if index is None or fresh is not index:
            file, temporary = create_temporary(path.parent)
            file.write(fresh.to_bytes())
            publish(file, temporary, path)
    return fresh


def version_of(session: Session, side: str, space: str, background: Background) -> Version:
    """What the rows of this side and space are at now."""
    query = select(func.count(), func.sum(Embedding.id), func.max(Embedding.created_at)).where(
        Embedding.side == side, Embedding.text_space == space
    )
    count, id_sum, newest = session.exec(query).one()
    moment = newest.isoformat() if newest else ""
    return Version(side, space, int(count), int(id_sum or 0), moment, background.digest)


def load_faiss() -> Any:
    """The faiss module.

    Raises:
        StorageError: it is not installed; the message says how to get it.
    """
    try:
        import faiss
    except ImportError as error:
        raise StorageError(
            f"search needs FAISS ({error}): `pip install modelgrove[cpu]`, or modelgrove[gpu] on a machine with CUDA"
        ) from error
    return faiss


def _refresh(session: Session, index: VectorIndex | None, wanted: Version, background: Background) -> VectorIndex:
    """`index` itself if it reflects the rows, else one that does."""
    if index is not None and index.version == wanted:
        return index
    held = select(Embedding.revision_id).where(Embedding.side == wanted.side, Embedding.text_space == wanted.space)
    ids = set(session.exec(held))
    if index is not None and index.version.background == wanted.background and index.version.newest:
        updated = _updated(session, index, wanted, ids, background)
        if set(updated.ids.tolist()) == ids:
            return updated
    fresh = VectorIndex.empty(wanted, background.vectors.shape[1])
    for revisions, vectors in _rows(session, wanted, background):
        fresh.replace(revisions, vectors)
    return fresh


def _updated(
    session: Session, index: VectorIndex, wanted: Version, ids: set[int], background: Background
) -> VectorIndex:
    import numpy as np

    gone = np.array(sorted(set(index.ids.tolist()) - ids), np.int64)
    index.remove(gone)
    # A row gets its time when it is made, not when it is committed: look a little further back.
    since = datetime.fromisoformat(index.version.newest) - _OVERLAP
    for revisions, vectors in _rows(session, wanted, background, since):
        index.replace(revisions, vectors)
    return VectorIndex(wanted, index._index)


def _rows(
    session: Session, wanted: Version, background: Background, since: datetime | None = None
) -> Iterator[tuple[NDArray[np.int64], NDArray[np.float32]]]:
    """(revision ids, vectors scaled by their spread over the background), in batches."""
    import numpy as np

    width = background.vectors.shape[1]
    query = select(Embedding.revision_id, Embedding.vector).where(
        Embedding.side == wanted.side, Embedding.text_space == wanted.space
    )
    if since is not None:
        query = query.where(col(Embedding.created_at) >= since)
    for batch in session.exec(query.execution_options(yield_per=_BATCH)).partitions():
        vectors = np.frombuffer(b"".join(vector for _, vector in batch), "<f4").reshape(len(batch), width)
        yield np.array([revision for revision, _ in batch], np.int64), background.scale(vectors)


def _read(path: Path) -> VectorIndex | None:
    try:
        return VectorIndex.from_bytes(path.read_bytes())
    except FileNotFoundError:
        return None
    except ValueError as error:
        aside = path.with_suffix(f".bad-{time.time_ns()}")
        log.warning("%s is damaged (%s): renamed to %s, the index is made again", path, error, aside.name)
        with suppress(FileNotFoundError):  # another process was quicker
            path.rename(aside)
        return None


@contextmanager
def _single_writer(folder: Path) -> Iterator[None]:
    """Wait until no other process writes indexes. The kernel frees the lock of a writer that died."""
    make_folder(folder)
    with (folder / "writer.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield
