"""Bodies of requests, streamed: into the blob store, or line by line, each within its bound."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator
from typing import Any, TypeVar

from anyio import CapacityLimiter, from_thread, to_thread
from fastapi import HTTPException, Request, Response
from fastapi.responses import JSONResponse, StreamingResponse

from modelgrove_hub.hub import Hub
from modelgrove_hub.store.shelves import StoredBlob

Result = TypeVar("Result")
_SIDE_BY_SIDE = 8
_PATIENCE = 3.0
_uploads = CapacityLimiter(_SIDE_BY_SIDE)
"""Uploads have threads of their own: slow ones must not keep those that answer everybody else."""


async def keep_body(request: Request, hub: Hub, most: int) -> StoredBlob:
    """Store the body as a blob; what is left of one that breaks off is removed.

    Raises:
        HTTPException: 413, it has more than `most` bytes.
        StorageError: the store refuses.
    """
    return await with_body(request, most, hub.store.put_chunks)


async def with_body(request: Request, most: int, work: Callable[[Iterator[bytes]], Result]) -> Result:
    """What `work` makes of the body's chunks, in a thread.

    Raises:
        HTTPException: 413, it has more than `most` bytes.
    """
    if int(request.headers.get("content-length") or 0) > most:
        raise _too_large(most)
    stream = request.stream().__aiter__()

    async def following() -> bytes | None:
        return await anext(stream, None)

    def chunks() -> Iterator[bytes]:
        seen = 0
        while (chunk := from_thread.run(following)) is not None:
            seen += len(chunk)
            if seen > most:
                raise _too_large(most)
            yield chunk

    return await to_thread.run_sync(lambda: work(chunks()), limiter=_uploads)


async def patiently(work: Coroutine[Any, Any, dict[str, Any]]) -> Response:
    """The work's result as JSON, behind a space every few seconds: clients hang up on a server that is still for ten.

    What fails after the first of them cannot be said any more: the answer breaks off, and the log tells why.
    """
    task = asyncio.ensure_future(work)

    async def waited() -> AsyncIterator[bytes]:
        while not task.done():
            yield b" "
            await asyncio.wait({task}, timeout=_PATIENCE)
        yield json.dumps(task.result()).encode()

    await asyncio.wait({task}, timeout=_PATIENCE)
    return JSONResponse(task.result()) if task.done() else StreamingResponse(waited(), media_type="application/json")


async def lines(request: Request, most: int) -> AsyncIterator[bytes]:
    """The body's lines, without their ends; empty ones are left out.

    Raises:
        HTTPException: 413, a line has more than `most` bytes.
    """
    begun = bytearray()
    async for chunk in request.stream():
        begun += chunk
        while (end := begun.find(b"\n")) >= 0:
            line = bytes(begun[:end])
            del begun[: end + 1]
            if line.strip():
                yield line
        if len(begun) > most:
            raise _too_large(most)
    if begun.strip():
        yield bytes(begun)


def _too_large(most: int) -> HTTPException:
    return HTTPException(413, f"more than {most} bytes")
