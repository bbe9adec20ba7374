"""Git LFS: large files come before the commit that names them, whole or in parts, to addresses signed for them."""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

from anyio import to_thread
from fastapi import APIRouter, HTTPException, Request, Response
from fastapi.responses import JSONResponse
from pydantic import BaseModel, Field

from modelgrove_hub.api.bodies import keep_body, patiently, with_body
from modelgrove_hub.api.hf.answers import HubRoute
from modelgrove_hub.api.hf.repos import Writing, find_model
from modelgrove_hub.api.signed import read_signed, sign
from modelgrove_hub.errors import DataError
from modelgrove_hub.hub import Hub
from modelgrove_hub.ingest.committing import is_kept
from modelgrove_hub.store.disk import create_temporary, publish, storage_errors

router = APIRouter(route_class=HubRoute, include_in_schema=False)
LARGEST_PART = 256 << 20
"""Bytes of a part, and of the largest file that comes whole where the client knows parts."""
_CHUNK = 1 << 20
_MEDIA_TYPE = "application/vnd.git-lfs+json"


class LfsObject(BaseModel):
    """A large file by its SHA-256."""

    oid: str = Field(pattern="^[0-9a-f]{64}$")
    size: int = Field(ge=0)


class Batch(BaseModel):
    """What a client wants to send or fetch."""

    operation: str
    objects: list[LfsObject] = Field(max_length=1000)
    transfers: list[str] = ["basic"]


class Completion(BaseModel):
    """The parts of a file that was sent in parts."""

    class Part(BaseModel):
        """One of them; `etag` is what was answered to it."""

        number: int = Field(alias="partNumber", ge=1)
        etag: str

    oid: str = Field(pattern="^[0-9a-f]{64}$")
    parts: list[Part] = Field(max_length=100_000)


class Sent(BaseModel):
    """A file that a client believes to have sent."""

    oid: str = Field(pattern="^[0-9a-f]{64}$")
    size: int = 0


@router.post("/{owner}/{name}.git/info/lfs/objects/batch")
def batch(request: Request, hub: Writing, owner: str, name: str, wanted: Batch) -> Response:
    """Where to put each of the files; nothing is said of those that are here."""
    if wanted.operation != "upload":
        raise HTTPException(422, f"{wanted.operation} is not offered: files are under /{owner}/{name}/resolve/")
    most = hub.settings.max_upload_bytes
    in_parts = "multipart" in wanted.transfers
    with hub.reading() as session:
        find_model(session, owner, name)
        kept = {one.oid for one in wanted.objects if is_kept(session, hub, one.oid)}
    objects = []
    for one in wanted.objects:
        said: dict[str, Any] = {"oid": one.oid, "size": one.size}
        if one.size > most:
            said["error"] = {"code": 413, "message": f"more than the {most} bytes that this hub takes"}
        elif one.oid not in kept:
            base = f"{request.base_url}api/lfs"
            verify = {"href": f"{base}/verify/{sign(hub, f'verify {one.oid}')}"}
            said["authenticated"] = True
            said["actions"] = {"upload": _upload(hub, base, one, in_parts), "verify": verify}
        objects.append(said)
    transfer = "multipart" if in_parts else "basic"
    return _json({"transfer": transfer, "objects": objects, "hash_algo": "sha256"})


@router.put("/api/lfs/{token}")
async def put_whole(request: Request, token: str) -> Response:
    """A file, whole."""
    hub: Hub = request.app.state.hub
    oid, size = _said(hub, token, "whole")
    stored = await keep_body(request, hub, int(size))
    if (stored.sha256, stored.size) != (oid, int(size)):
        raise DataError(f"the {stored.size} bytes that came have the hash {stored.sha256}, not {oid} of {size} bytes")
    return Response(status_code=200, headers={"ETag": f'"{oid}"'})


@router.put("/api/lfs/part/{token}")
async def put_part(request: Request, token: str) -> Response:
    """A part of a file; sent again it takes the place of the one before."""
    hub: Hub = request.app.state.hub
    oid, number, size = _said(hub, token, "part")
    digest = await with_body(request, int(size), partial(_keep_part, _folder(hub, oid), int(number), int(size)))
    return Response(status_code=200, headers={"ETag": f'"{digest}"'})


@router.post("/api/lfs/parts/{token}")
async def put_together(request: Request, token: str, sent: Completion) -> Response:
    """Make one file of the parts that came."""
    hub: Hub = request.app.state.hub
    oid, size = _said(hub, token, "parts")
    if oid != sent.oid:
        raise HTTPException(403, "this address is another file's")

    async def joined() -> dict[str, Any]:
        await to_thread.run_sync(partial(_join, hub, oid, int(size)))
        return {"oid": oid, "size": int(size)}

    return await patiently(joined())


@router.post("/api/lfs/verify/{token}")
def verify(request: Request, token: str, sent: Sent) -> Response:
    """Whether the file is here now."""
    hub: Hub = request.app.state.hub
    (oid,) = _said(hub, token, "verify")
    found = hub.store.find(oid)
    if oid != sent.oid or found is None:
        raise HTTPException(404, f"no file {sent.oid} came")
    return _json({"oid": oid, "size": found.size})


def _upload(hub: Hub, base: str, one: LfsObject, in_parts: bool) -> dict[str, Any]:
    if not in_parts or one.size <= LARGEST_PART:
        return {"href": f"{base}/{sign(hub, f'whole {one.oid} {one.size}')}"}
    sizes = [min(LARGEST_PART, one.size - start) for start in range(0, one.size, LARGEST_PART)]
    parts = {
        str(number): f"{base}/part/{sign(hub, f'part {one.oid} {number} {size}')}"
        for number, size in enumerate(sizes, 1)
    }
    joined = f"{base}/parts/{sign(hub, f'parts {one.oid} {one.size}')}"
    return {"href": joined, "header": {"chunk_size": str(LARGEST_PART), **parts}}


def _said(hub: Hub, token: str, what: str) -> list[str]:
    kind, *fields = read_signed(hub, token).split()
    if kind != what:
        raise HTTPException(403, f"this address is for {kind}, not for {what}")
    return fields


def _folder(hub: Hub, oid: str) -> Path:
    return hub.settings.incoming / f"parts-{oid}"


def _keep_part(folder: Path, number: int, size: int, chunks: Iterator[bytes]) -> str:
    digest, came = hashlib.sha256(), 0
    with storage_errors(folder):
        file, draft = create_temporary(folder)
        try:
            for chunk in chunks:
                digest.update(chunk)
                came += file.write(chunk)
            if came != size:
                raise DataError(f"part {number} has {came} bytes, not {size}")
            publish(file, draft, folder / str(number))
        finally:
            file.close()
            draft.unlink(missing_ok=True)
    return digest.hexdigest()


def _join(hub: Hub, oid: str, size: int) -> None:
    folder, count = _folder(hub, oid), -(-size // LARGEST_PART)
    if hub.store.exists(oid):  # a completion that was said again, its first answer lost
        shutil.rmtree(folder, ignore_errors=True)
        return
    parts = [folder / str(number) for number in range(1, count + 1)]
    if missing := [part.name for part in parts if not part.exists()]:
        raise DataError(f"part {missing[0]} of {oid} did not come: send it again")
    stored = hub.store.put_chunks(chunk for part in parts for chunk in _read(part))
    if stored.sha256 != oid:
        raise DataError(f"the parts make {stored.size} bytes with the hash {stored.sha256}, not {oid}")
    shutil.rmtree(folder, ignore_errors=True)


def _read(file: Path) -> Iterator[bytes]:
    with file.open("rb") as opened:
        while chunk := opened.read(_CHUNK):
            yield chunk


def _json(value: dict[str, Any]) -> Response:
    return JSONResponse(value, media_type=_MEDIA_TYPE)
