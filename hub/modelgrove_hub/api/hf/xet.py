"""Uploads as `hf_xet` sends them: chunks in xorbs, then a shard that says what files they make.

`huggingface_hub` 2 sends every large file so where `hf_xet` is installed, which it is by default. The files are put
together when their shard comes, checked by their SHA-256, and stored as if they had come by LFS. A xorb is then
replaced by a note of where its chunks lie in the files, because clients remember for weeks what they have sent to an
address and do not send it again. The address changes every day, so what they remember ends with it.
"""

from __future__ import annotations

import json
import re
import time
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import partial
from pathlib import Path

from anyio import to_thread
from fastapi import APIRouter, HTTPException, Request, Response
from fastapi.responses import JSONResponse

from modelgrove_hub.api.bodies import with_body
from modelgrove_hub.api.hf.answers import HubRoute
from modelgrove_hub.api.hf.repos import Writing, find_model
from modelgrove_hub.api.signed import LASTS, fingerprint, read_signed, sign
from modelgrove_hub.errors import CorruptFileError, DataError, NotFoundError
from modelgrove_hub.hub import Hub
from modelgrove_hub.store.disk import create_temporary, publish, storage_errors
from modelgrove_hub.store.xet import (
    LARGEST_SHARD,
    LARGEST_XORB,
    Chunk,
    Segment,
    ShardFile,
    list_chunks,
    read_shard,
    unpack,
)  # fmt: skip

router = APIRouter(route_class=HubRoute, include_in_schema=False)
_HASH = re.compile("[0-9a-f]{64}")
_PLACE = re.compile(r"\d{1,18}-\d{8}-[0-9a-f]{16}")
_NOTE = ".json"
Place = tuple[str, int, int]
"""Where a chunk lies: in which stored file, from which byte, how many."""


@router.get("/api/models/{owner}/{name}/xet-write-token/{revision:path}")
def write_token(request: Request, hub: Writing, owner: str, name: str) -> Response:
    """Where a client sends chunks, and its leave to do so."""
    with hub.reading() as session:
        model = find_model(session, owner, name)
    today = f"{datetime.now(UTC):%Y%m%d}"
    place = f"{model.id}-{today}-{fingerprint(hub, f'xet {model.id} {today}')[:16]}"
    url, token, end = f"{request.base_url}xet/{place}", sign(hub, f"xet {model.id}"), int(time.time()) + LASTS
    headers = {"X-Xet-Cas-Url": url, "X-Xet-Access-Token": token, "X-Xet-Token-Expiration": str(end)}
    return JSONResponse({"casUrl": url, "accessToken": token, "exp": end}, headers=headers)


@router.post("/xet/{place}/v1/xorbs/{prefix}/{xorb}")
async def put_xorb(request: Request, place: str, xorb: str) -> Response:
    """Keep a xorb."""
    shelf = _shelf(request, place)
    new = not shelf.has(_checked(xorb))
    if new:
        await with_body(request, LARGEST_XORB, partial(shelf.put, xorb))
    return JSONResponse({"was_inserted": new})


@router.post("/xet/{place}/v1/shards")
async def put_shard(request: Request, place: str) -> Response:
    """Put together the files that a shard describes."""
    shelf = _shelf(request, place)
    shard = await with_body(request, LARGEST_SHARD, b"".join)
    await to_thread.run_sync(partial(_assemble, shelf, read_shard(shard)))
    return JSONResponse({"result": 1})


@dataclass
class _Shelf:
    """The xorbs that came to one address."""

    hub: Hub
    folder: Path

    def has(self, xorb: str) -> bool:
        return (self.folder / xorb).exists() or self._note(xorb).exists()

    def put(self, xorb: str, chunks: Iterator[bytes]) -> None:
        with storage_errors(self.folder):
            file, draft = create_temporary(self.folder)
            try:
                for chunk in chunks:
                    file.write(chunk)
                list_chunks(file, file.tell())
                publish(file, draft, self.folder / xorb)
            finally:
                file.close()
                draft.unlink(missing_ok=True)

    def note(self, xorb: str, places: list[Place]) -> None:
        """Remember where a xorb's chunks lie in stored files instead of the xorb."""
        file, draft = create_temporary(self.folder)
        file.write(json.dumps(places).encode())
        publish(file, draft, self._note(xorb))
        (self.folder / xorb).unlink(missing_ok=True)

    def noted(self, xorb: str) -> list[Place]:
        return [(sha256, offset, size) for sha256, offset, size in json.loads(self._note(xorb).read_bytes())]

    def _note(self, xorb: str) -> Path:
        return self.folder / f"{xorb}{_NOTE}"


@dataclass
class _Opened:
    """The xorbs that a shard names: their chunks, and where those have been put."""

    shelf: _Shelf
    chunks: dict[str, list[Chunk]] = field(default_factory=dict)
    placed: dict[str, dict[int, Place]] = field(default_factory=lambda: defaultdict(dict))

    def read(self, segment: Segment) -> Iterator[tuple[int, bytes]]:
        """The chunks of a segment with their numbers."""
        if not self.shelf.has(segment.xorb):
            raise NotFoundError(f"xorb {segment.xorb} did not come: begin the upload again")
        raw = self.shelf.folder / segment.xorb
        if not raw.exists():
            for number, (sha256, offset, size) in enumerate(self.shelf.noted(segment.xorb)):
                if segment.first <= number < segment.last:
                    with self.shelf.hub.store.open(sha256) as file:
                        file.seek(offset)
                        yield number, file.read(size)
            return
        with raw.open("rb") as file:
            if segment.xorb not in self.chunks:
                self.chunks[segment.xorb] = list_chunks(file, raw.stat().st_size)
            listed = self.chunks[segment.xorb]
            if not 0 <= segment.first <= segment.last <= len(listed):
                raise CorruptFileError(f"the shard names chunks of xorb {segment.xorb} that it does not have")
            for number in range(segment.first, segment.last):
                yield number, unpack(file, listed[number])

    def settle(self) -> None:
        """Replace the xorbs of which every chunk now lies in a stored file."""
        for xorb, listed in self.chunks.items():
            placed = self.placed[xorb]
            if len(placed) == len(listed):
                self.shelf.note(xorb, [placed[number] for number in range(len(listed))])


def _assemble(shelf: _Shelf, files: list[ShardFile]) -> None:
    most = shelf.hub.settings.max_upload_bytes
    opened = _Opened(shelf)
    for file in files:
        if sum(segment.size for segment in file.segments) > most:
            raise DataError(f"file {file.sha256}: more than the {most} bytes that this hub takes")
        _store(shelf.hub, opened, file)
    opened.settle()


def _store(hub: Hub, opened: _Opened, file: ShardFile) -> None:
    places: list[tuple[str, int, int, int]] = []

    def contents() -> Iterator[bytes]:
        offset = 0
        for segment in file.segments:
            for number, data in opened.read(segment):
                places.append((segment.xorb, number, offset, len(data)))
                offset += len(data)
                yield data

    stored = hub.store.put_chunks(contents())
    if stored.sha256 != file.sha256:
        raise DataError(f"the chunks make a file with the hash {stored.sha256}, not {file.sha256}")
    for xorb, number, offset, size in places:
        opened.placed[xorb][number] = (stored.sha256, offset, size)


def _shelf(request: Request, place: str) -> _Shelf:
    hub: Hub = request.app.state.hub
    token = request.headers.get("authorization", "").removeprefix("Bearer ")
    said = read_signed(hub, token)
    if not _PLACE.fullmatch(place) or said != f"xet {place.partition('-')[0]}":
        raise HTTPException(403, "this token is not for this address")
    return _Shelf(hub, hub.settings.incoming / f"xet-{place}")


def _checked(xorb: str) -> str:
    if not _HASH.fullmatch(xorb):
        raise HTTPException(400, "a xorb is named by 64 hexadecimal digits")
    return xorb
