"""Bytes of files over HTTP: whole or a range, with ETag, from this machine or from a remote store."""

from __future__ import annotations

import asyncio
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import BinaryIO
from urllib.parse import quote

from fastapi import Request, Response
from starlette.types import Receive, Scope, Send

from modelgrove_hub.errors import StorageError
from modelgrove_hub.hub import Hub
from modelgrove_hub.registry.inputs import place_of
from modelgrove_hub.store.disk import open_regular
from modelgrove_hub.tables import Blob

CHUNK = 1 << 20
"""Bytes in a read: with fewer, threads and event loop cost more than the bytes."""
_RANGE = re.compile(r"bytes=(\d{0,20})-(\d{0,20})")
_QUIET = {"X-Content-Type-Options": "nosniff", "Content-Security-Policy": "sandbox; default-src 'none'"}
"""A stranger's file is never a page of ours, whatever it is called."""


@dataclass(frozen=True)
class Span:
    """Bytes [start, stop) of a file."""

    start: int
    stop: int

    def __len__(self) -> int:
        return self.stop - self.start


def file_response(
    request: Request, hub: Hub, blob: Blob, *, model: str, path: str, etag: str, headers: Mapping[str, str]
) -> Response:
    """The file at `path` of a model, whose bytes are those of `blob`: all of it, or the one range that was asked for.

    Raises:
        StorageError: it is gone from where it was.
        DataError: it has changed there since it was registered.
    """
    quoted = f'"{etag}"'
    found = {
        **_QUIET, **headers, "ETag": quoted, "Accept-Ranges": "bytes", "Content-Type": "application/octet-stream",
        "Content-Disposition": disposition(path),
    }  # fmt: skip
    if quoted in [each.strip().removeprefix("W/") for each in request.headers.get("if-none-match", "").split(",")]:
        return Response(None, 304, found)
    wanted = request.headers.get("range") if request.headers.get("if-range", quoted) == quoted else None
    span = span_of(wanted, blob.size)
    if span is None:
        return Response(None, 416, {**found, "Content-Range": f"bytes */{blob.size}"})
    if len(span) < blob.size:
        found["Content-Range"] = f"bytes {span.start}-{span.stop - 1}/{blob.size}"
    found["Content-Length"] = str(len(span))
    status = 206 if "Content-Range" in found else 200
    file = _opened(hub, blob, model, path)
    if request.method == "HEAD":
        file.close()
        return Response(None, status, found)
    return _FileBody(file, span, status, found)


def span_of(wanted: str | None, size: int) -> Span | None:
    """The bytes that a Range header asks for; all where it asks for nothing we serve, None where there are none.

    Several ranges at once are answered with the whole file, as RFC 9110 allows.
    """
    found = _RANGE.fullmatch((wanted or "").strip())
    if found is None or found[0] == "bytes=-":
        return Span(0, size)
    first, last = found.groups()
    if not first:
        start, stop = max(0, size - int(last)), size
    else:
        start, stop = int(first), min(size, int(last) + 1) if last else size
        if last and int(last) < int(first):
            return Span(0, size)
    return Span(start, stop) if start < stop else None


def disposition(path: str) -> str:
    """A Content-Disposition that names the file, whatever characters its name has."""
    name = path.rpartition("/")[2]
    plain = re.sub(r"[^A-Za-z0-9._-]", "_", name)
    return f"attachment; filename*=UTF-8''{quote(name, safe='')}; filename=\"{plain}\""


def _opened(hub: Hub, blob: Blob, model: str, path: str) -> BinaryIO:
    # Opened before the answer begins: an error can still be said.
    if blob.path is None:
        return hub.store.open(blob.sha256)
    return open_regular(place_of(hub, model, path, blob))


class _FileBody(Response):
    """A part of an open file, sent as it is read. Starlette's own generator and task for it take half of the speed."""

    def __init__(self, file: BinaryIO, span: Span, status: int, headers: Mapping[str, str]) -> None:
        super().__init__(None, status, headers)
        self._file, self._span = file, span

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:  # noqa: ARG002
        """Send the answer; the file is closed whatever comes."""
        try:
            await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
            sent = 0
            while sent < len(self._span):
                count = min(CHUNK, len(self._span) - sent)
                offset = self._span.start + sent
                chunk = self._cached(offset, count) or await asyncio.to_thread(self._read, offset, count)
                if not chunk:
                    raise StorageError("the file is shorter than it was")  # the client sees that bytes are missing
                sent += len(chunk)
                await send({"type": "http.response.body", "body": chunk, "more_body": True})
            await send({"type": "http.response.body", "body": b"", "more_body": False})
        finally:
            self._file.close()

    def _cached(self, offset: int, count: int) -> bytearray | None:
        """What of it is in memory, which takes no waiting: a thread for each chunk would take half of the speed."""
        chunk = bytearray(count)
        try:
            got = os.preadv(self._file.fileno(), [chunk], offset, os.RWF_NOWAIT)
        except (OSError, AttributeError):  # not in memory, or no local file, or no Linux
            return None
        del chunk[got:]
        return chunk

    def _read(self, offset: int, count: int) -> bytes:
        try:
            return os.pread(self._file.fileno(), count, offset)
        except (OSError, AttributeError):  # a file of a remote store has no descriptor
            self._file.seek(offset)
            return self._file.read(count)
