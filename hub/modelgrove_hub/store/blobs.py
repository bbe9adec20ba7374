"""The blob store: files by the sha256 of their content, on this machine or under any fsspec URL."""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import BinaryIO, Literal

from modelgrove_hub.errors import NotFoundError, StorageError, UsageError
from modelgrove_hub.store.disk import open_regular, storage_errors
from modelgrove_hub.store.shelves import LocalShelf, RemoteShelf, Shelf, StoredBlob

Mode = Literal["copy", "hardlink"]
_CHUNK = 2**20


def _cache_home() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "modelgrove" / "blobs"


class BlobStore:
    """Content-addressed files.

    A blob appears whole or not at all, and two processes may put the same one at once. Nothing
    checks a blob when it is read; `verify` does.

    Args:
        url: a folder, `file://` and a folder, or any URL that fsspec knows.
        cache: folder for copies of remote blobs (default: the user's cache folder). It may be
            emptied at any time.

    Raises:
        StorageError: the URL's file system is not known or not installed.
    """

    def __init__(self, url: str, cache: Path | None = None) -> None:
        self.url = url
        self._local = LocalShelf(Path(url.removeprefix("file://"))) if _is_local(url) else None
        self._shelf: Shelf = self._local or RemoteShelf(url)
        self._cache = self._local or LocalShelf(cache or _cache_home())

    def put(self, path: Path, mode: Mode = "copy") -> StoredBlob:
        """Store the file at `path` and return its hash and size.

        "hardlink" shares the file's bytes on disk instead of copying them (where that is not
        possible, it copies). A program that replaces the original does the blob no harm; one
        that writes into it damages the blob. `find(sha256)` then no longer equals what was
        returned here, and `verify` is False.

        Raises:
            NotFoundError, DataError: there is no regular file at `path`.
            ConflictError: the file changed while it was linked.
            StorageError: no space, no permission, no answer.
        """
        with open_regular(path) as file, storage_errors(f"storing {path} in {self.url}"):
            if mode == "hardlink" and self._local and (blob := self._local.link(path)):
                return blob
            return self._shelf.write(iter(lambda: file.read(_CHUNK), b""))

    def put_bytes(self, data: bytes) -> StoredBlob:
        """Store `data`. Raises StorageError."""
        with storage_errors(f"storing {len(data)} bytes in {self.url}"):
            return self._shelf.write([data])

    def put_chunks(self, chunks: Iterable[bytes]) -> StoredBlob:
        """Store what the chunks add up to; nothing stays if they end with an exception. Raises StorageError."""
        with storage_errors(f"storing in {self.url}"):
            return self._shelf.write(chunks)

    def path(self, sha256: str) -> Path:
        """A local path to read the blob from; a remote blob is first copied to the cache. Do not write to it.

        Raises:
            NotFoundError: the store has no such blob.
            StorageError: it cannot be fetched, or arrived damaged.
        """
        _check(sha256)
        if self._cache.find(sha256) is None:
            if self._local:
                raise self._missing(sha256)
            self._fetch(sha256)
        return self._cache.path(sha256)

    def open(self, sha256: str) -> BinaryIO:
        """Open a blob for reading, without the cache.

        Raises:
            NotFoundError: the store has no such blob.
            StorageError: it cannot be opened.
        """
        _check(sha256)
        with storage_errors(self.url):
            try:
                return self._shelf.open(sha256)
            except FileNotFoundError:
                raise self._missing(sha256) from None

    def find(self, sha256: str) -> StoredBlob | None:
        """The blob's size and times, or None if the store has no such blob. Raises StorageError."""
        _check(sha256)
        with storage_errors(self.url):
            return self._shelf.find(sha256)

    def exists(self, sha256: str) -> bool:
        """Whether the store has this blob."""
        return self.find(sha256) is not None

    def verify(self, sha256: str) -> bool:
        """Read the blob and say whether it still has its hash. Raises NotFoundError, StorageError."""
        digest = hashlib.sha256()
        with self.open(sha256) as file, storage_errors(self.url):
            while chunk := file.read(_CHUNK):
                digest.update(chunk)
        return digest.hexdigest() == sha256

    def delete(self, sha256: str, unless_newer_than: float | None = None) -> bool:
        """Remove a blob, from the cache too, unless it was put after that moment; whether it was removed.

        With the moment before which garbage is old enough, no blob is lost that is being put now.

        Raises:
            StorageError: the store refuses.
        """
        _check(sha256)
        with storage_errors(self.url):
            removed = self._shelf.remove(sha256, unless_newer_than)
            if removed and self._cache is not self._local:
                self._cache.remove(sha256, None)
            return removed

    def sweep(self, older_than: float, *, dry_run: bool = False) -> int:
        """Remove what killed writers left half-written more than `older_than` seconds ago; how many files.

        With `dry_run` they are only counted.

        Raises:
            StorageError: the store refuses.
        """
        with storage_errors(self.url):
            return self._shelf.sweep(older_than, dry_run=dry_run)

    def __iter__(self) -> Iterator[StoredBlob]:
        """All blobs, in no order; those put or deleted meanwhile may be seen or not."""
        with storage_errors(self.url):
            yield from self._shelf

    def _fetch(self, sha256: str) -> None:
        with self.open(sha256) as file, storage_errors(self.url):
            got = self._cache.write(iter(lambda: file.read(_CHUNK), b"")).sha256
        if got != sha256:
            self._cache.remove(got, None)
            raise StorageError(f"{self.url}: blob {sha256} arrived damaged, its bytes have the hash {got}")

    def _missing(self, sha256: str) -> NotFoundError:
        return NotFoundError(f"{self.url}: no blob {sha256}")


def _is_local(url: str) -> bool:
    return url.startswith("file://") or "://" not in url


def _check(sha256: str) -> None:
    # A digest becomes a path, and may come from a web request.
    if not re.fullmatch(r"[0-9a-f]{64}", sha256):
        raise UsageError(f"{sha256[:80]!a} is not a sha256: 64 digits, 0-9 and a-f")
