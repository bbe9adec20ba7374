"""Bytes of files over HTTP: whole or a range, with ETag, from this machine or from a remote store."""

from __future__ import annotations

import asyncio
import os
import re
from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass
from typing import BinaryIO
from urllib.parse import quote

from fastapi import Request, Response
from fastapi.responses import StreamingResponse

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
    return StreamingResponse(_chunks(file, span), status, found)


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


async def _chunks(file: BinaryIO, span: Span) -> AsyncIterator[bytes]:
    loop = asyncio.get_running_loop()
    try:
        local = isinstance(file.fileno(), int)
    except (OSError, AttributeError):
        local = False
    try:
        if not local:
            await loop.run_in_executor(None, file.seek, span.start)
        offset = span.start
        while offset < span.stop:
            count = min(CHUNK, span.stop - offset)
            if local:
                chunk = await loop.run_in_executor(None, os.pread, file.fileno(), count, offset)
            else:
                chunk = await loop.run_in_executor(None, file.read, count)
            if not chunk:
                return  # shorter than it was: the client sees that bytes are missing
            offset += len(chunk)
            yield chunk
    finally:
        file.close()
