"""Where blobs lie: a folder on this machine, or any place fsspec reaches.

Both keep a blob at `xx/yy/<sha256>` and write under a temporary name first, so that a reader
never sees half a blob. A blob that is put again is written again: that renews its age for
garbage collection and heals a damaged one.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import os
import re
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from datetime import datetime
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, Protocol

from modelgrove_hub.errors import ConflictError, StorageError
from modelgrove_hub.store.disk import TEMPORARY, create_temporary, finish, make_folder, move, temporary_name

_DIGEST = re.compile(r"[0-9a-f]{64}")
_DRAFTS = "drafts"
_NO_LINK = {errno.EXDEV, errno.EPERM, errno.EACCES, errno.EMLINK, errno.EOPNOTSUPP, errno.ENOSYS}


class StoredBlob(NamedTuple):
    """A blob in the store."""

    sha256: str
    size: int
    mtime_ns: int | None
    """When the bytes last changed, in nanoseconds since 1970; None at a URL, where they cannot change in place."""
    added_ns: int
    """When it was last put or touched. For local files this is the inode's change time: a hard link
    counts from when it was made, not from the age of its original, and a write to the original
    moves it. Garbage collection counts its grace from here."""


class Shelf(Protocol):
    """What a place for blobs must do. Digests are checked by the caller; an OSError is let through."""

    def write(self, chunks: Iterable[bytes]) -> StoredBlob:
        """Store what the chunks add up to, under its hash."""

    def open(self, sha256: str) -> BinaryIO:
        """Open for reading. FileNotFoundError if it is not there."""

    def find(self, sha256: str) -> StoredBlob | None:
        """The blob, or None if it is not there."""

    def remove(self, sha256: str, unless_newer_than: float | None) -> bool:
        """Remove it, unless it was put later than that; whether it was removed."""

    def __iter__(self) -> Iterator[StoredBlob]: ...

    def sweep(self, older_than: float, *, dry_run: bool) -> int:
        """Remove drafts that writers left behind more than so many seconds ago, or only count them."""


class LocalShelf:
    """Blobs in a folder. Copies are read-only files, flushed to disk before they get their name."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def write(self, chunks: Iterable[bytes]) -> StoredBlob:
        """See `Shelf.write`."""
        file, draft = create_temporary(self._folder / _DRAFTS, 0o444)
        digest = hashlib.sha256()
        try:
            for chunk in chunks:
                digest.update(chunk)
                file.write(chunk)
            finish(file)
            return self._publish(draft, digest.hexdigest())
        finally:
            file.close()
            draft.unlink(missing_ok=True)

    def link(self, source: Path) -> StoredBlob | None:
        """Store a file as a hard link; None where the file system cannot link it.

        Raises:
            ConflictError: the file changed while it was hashed.
        """
        draft = self._folder / _DRAFTS / temporary_name()
        make_folder(draft.parent)
        try:
            os.link(source.resolve(), draft)
        except OSError as error:
            if error.errno in _NO_LINK:
                return None
            raise
        try:
            return self._publish(draft, _hash_at_rest(draft, source))
        finally:
            draft.unlink(missing_ok=True)

    def path(self, sha256: str) -> Path:
        """Where a blob lies or would lie."""
        return self._folder / sha256[:2] / sha256[2:4] / sha256

    def open(self, sha256: str) -> BinaryIO:
        """See `Shelf.open`."""
        return self.path(sha256).open("rb")

    def find(self, sha256: str) -> StoredBlob | None:
        """See `Shelf.find`."""
        try:
            return _stored(self.path(sha256))
        except FileNotFoundError:
            return None

    def remove(self, sha256: str, unless_newer_than: float | None) -> bool:
        """See `Shelf.remove`. No put can come between the look at the age and the removal."""
        with self._lock(fcntl.LOCK_EX):
            blob = self.find(sha256)
            if not _is_older(blob, unless_newer_than):
                return False
            self.path(sha256).unlink()
            return True

    def __iter__(self) -> Iterator[StoredBlob]:
        for path in self._folder.glob("??/??/*"):
            if _DIGEST.fullmatch(path.name) and (blob := self.find(path.name)):
                yield blob

    def sweep(self, older_than: float, *, dry_run: bool) -> int:
        """See `Shelf.sweep`."""
        swept = 0
        for draft in (self._folder / _DRAFTS).glob(f".*{TEMPORARY}"):
            with suppress(FileNotFoundError):  # its writer finished just now
                if time.time() - draft.stat().st_ctime > older_than:
                    swept += 1
                    if not dry_run:
                        draft.unlink()
        return swept

    def _publish(self, draft: Path, sha256: str) -> StoredBlob:
        target = self.path(sha256)
        make_folder(target.parent)
        with self._lock(fcntl.LOCK_SH):
            move(draft, target)
            return _stored(target)

    @contextmanager
    def _lock(self, how: int) -> Iterator[None]:
        make_folder(self._folder)
        with (self._folder / ".lock").open("a") as file:
            fcntl.flock(file, how)
            yield


class RemoteShelf:
    """Blobs at an fsspec URL: s3://, gs://, sftp://, memory:// and so on."""

    def __init__(self, url: str) -> None:
        # Here, not above: fsspec costs the command line a tenth of a second.
        from fsspec.core import url_to_fs

        try:
            self._system, self._root = url_to_fs(url)
        except (ImportError, ValueError) as error:
            raise StorageError(f"blob store {url}: {error}") from error

    def write(self, chunks: Iterable[bytes]) -> StoredBlob:
        """See `Shelf.write`."""
        draft = f"{self._root}/{_DRAFTS}/{temporary_name()}"
        digest = hashlib.sha256()
        self._system.makedirs(f"{self._root}/{_DRAFTS}", exist_ok=True)
        try:
            with self._system.open(draft, "wb") as file:
                for chunk in chunks:
                    digest.update(chunk)
                    file.write(chunk)
            target = self._path(digest.hexdigest())
            self._system.makedirs(target.rpartition("/")[0], exist_ok=True)
            self._system.mv(draft, target)
        except BaseException:
            with suppress(OSError):
                self._system.rm_file(draft)
            raise
        return self._describe(target, self._system.info(target))

    def open(self, sha256: str) -> BinaryIO:
        """See `Shelf.open`."""
        file: BinaryIO = self._system.open(self._path(sha256), "rb")
        return file

    def find(self, sha256: str) -> StoredBlob | None:
        """See `Shelf.find`."""
        path = self._path(sha256)
        try:
            return self._describe(path, self._system.info(path))
        except FileNotFoundError:
            return None

    def remove(self, sha256: str, unless_newer_than: float | None) -> bool:
        """See `Shelf.remove`. Between the look at the age and the removal there is a moment."""
        self._system.invalidate_cache()
        blob = self.find(sha256)
        if not _is_older(blob, unless_newer_than):
            return False
        self._system.rm_file(self._path(sha256))
        return True

    def __iter__(self) -> Iterator[StoredBlob]:
        self._system.invalidate_cache()
        for path, info in self._system.find(self._root, detail=True).items():
            if _DIGEST.fullmatch(path.rpartition("/")[2]):
                yield self._describe(path, info)

    def sweep(self, older_than: float, *, dry_run: bool) -> int:
        """See `Shelf.sweep`."""
        self._system.invalidate_cache()
        drafts = self._system.find(f"{self._root}/{_DRAFTS}", detail=True).items()
        stale = [path for path, info in drafts if time.time() - self._moment(path, info) > older_than]
        for path in [] if dry_run else stale:
            self._system.rm_file(path)
        return len(stale)

    def _path(self, sha256: str) -> str:
        return f"{self._root}/{sha256[:2]}/{sha256[2:4]}/{sha256}"

    def _describe(self, path: str, info: dict[str, Any]) -> StoredBlob:
        added_ns = int(self._moment(path, info) * 1e9)
        return StoredBlob(path.rpartition("/")[2], int(info["size"]), None, added_ns)

    def _moment(self, path: str, info: dict[str, Any]) -> float:
        # Every file system of fsspec names and types its time as it likes.
        for key in ("LastModified", "last_modified", "updated", "mtime", "created"):
            moment = info.get(key)
            if isinstance(moment, datetime):
                return moment.timestamp()
            if isinstance(moment, int | float):
                return float(moment)
        modified: datetime = self._system.modified(path)
        return modified.timestamp()


def _stored(path: Path) -> StoredBlob:
    status = path.stat()
    return StoredBlob(path.name, status.st_size, status.st_mtime_ns, status.st_ctime_ns)


def _is_older(blob: StoredBlob | None, unless_newer_than: float | None) -> bool:
    return blob is not None and (unless_newer_than is None or blob.added_ns <= unless_newer_than * 1e9)


def _hash_at_rest(draft: Path, source: Path) -> str:
    with draft.open("rb") as file:
        before = os.fstat(file.fileno())
        digest = hashlib.file_digest(file, "sha256").hexdigest()
        after = os.fstat(file.fileno())
    if (before.st_size, before.st_mtime_ns) != (after.st_size, after.st_mtime_ns):
        raise ConflictError(f"{source}: changed while it was hashed; try again when nobody writes to it")
    return digest
