"""Jobs as they go on, by server-sent events. One read of the database serves every listener of a process."""

from __future__ import annotations

import asyncio
import json
import logging
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import suppress
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Annotated, Any

from anyio import CapacityLimiter, to_thread
from fastapi import APIRouter, Depends, Header, HTTPException, Request, Response
from fastapi.responses import StreamingResponse
from sqlalchemy import ColumnElement
from sqlalchemy.orm import defer
from sqlmodel import col, func, or_, select

from modelgrove_hub.api.access import hub_for
from modelgrove_hub.api.limits import BUSY, Places, address_of
from modelgrove_hub.errors import ModelgroveError
from modelgrove_hub.hub import Hub
from modelgrove_hub.registry.privacy import public_jobs
from modelgrove_hub.tables import Job, JobState, now
from modelgrove_hub.verbs.facts import JobFacts
from modelgrove_hub.verbs.jobs import show_job

LOG = logging.getLogger(__name__)
MEDIA_TYPE = "text/event-stream"
_SECONDS_BETWEEN_READS = 0.4
_HEARTBEAT_SECONDS = 15.0
_LATEST = timedelta(seconds=10)
_MOST_AT_ONCE = 200
_AT_ONCE_EACH = 64
_LIVE = (JobState.QUEUED, JobState.RUNNING)
_HEADERS = {"Cache-Control": "no-store", "X-Accel-Buffering": "no"}


@dataclass(frozen=True)
class Seen:
    """A job at a moment. `public` ones are shown to callers without a token."""

    facts: JobFacts
    log: str | None
    """None where nobody listens to this job alone."""
    public: bool

    @property
    def ended(self) -> bool:
        """Whether nothing more is going to happen, unless it is tried again."""
        return self.facts.state not in _LIVE


class Board:
    """Jobs that somebody listens to, as they were at the last read."""

    def __init__(self, hub: Hub) -> None:
        self.places = Places(_AT_ONCE_EACH)
        self._hub = hub
        self._listeners: Counter[str] = Counter()
        self._everything = 0
        self._jobs: dict[str, Seen] = {}
        self._reads, self._news = 0, asyncio.Event()
        self._reader: asyncio.Task[None] | None = None
        self._thread = CapacityLimiter(1)
        self._closed = False

    def close(self) -> None:
        """Have every stream end: the server stops."""
        self._closed = True
        self._news.set()
        if self._reader is not None:
            self._reader.cancel()

    async def follow(self, job: str) -> AsyncIterator[Seen | None]:
        """A job now and whenever it has changed, until it ends; None where nothing came for a while."""
        self._listeners[job] += 1
        try:
            async for jobs in self._changes():
                seen = jobs.get(job) if jobs is not None else None
                if jobs is None or (seen is not None and seen.log is not None):
                    yield seen
                if seen is not None and seen.ended and seen.log is not None:
                    return
        finally:
            self._listeners[job] -= 1
            if not self._listeners[job]:
                del self._listeners[job]

    async def follow_all(self) -> AsyncIterator[dict[str, Seen] | None]:
        """All jobs that have not ended, and those that just did; None where nothing came for a while."""
        self._everything += 1
        try:
            async for jobs in self._changes():
                yield jobs
        finally:
            self._everything -= 1

    async def _changes(self) -> AsyncIterator[dict[str, Seen] | None]:
        if self._reader is None or self._reader.done():
            self._reader = asyncio.create_task(self._read_on())
        seen = -1
        while not self._closed:
            if seen != self._reads:
                seen = self._reads
                yield self._jobs
                continue
            try:
                await asyncio.wait_for(self._news.wait(), _HEARTBEAT_SECONDS)
            except TimeoutError:
                yield None

    async def _read_on(self) -> None:
        while self._listeners or self._everything:
            wanted, everything, known = set(self._listeners), self._everything > 0, self._jobs
            try:
                found = await to_thread.run_sync(self._read, wanted, everything, known, limiter=self._thread)
            except ModelgroveError as error:
                LOG.warning("jobs cannot be followed now: %s", error)
                found = known
            self._jobs = found
            if found != known:
                self._reads += 1
                self._news.set()
                self._news = asyncio.Event()
            await asyncio.sleep(_SECONDS_BETWEEN_READS)
        self._jobs = {}

    def _read(self, wanted: set[str], everything: bool, known: dict[str, Seen]) -> dict[str, Seen]:
        which: list[ColumnElement[bool]] = [col(Job.id).in_(wanted)]
        if everything:
            which += [col(Job.state).in_(_LIVE), col(Job.created_at) > now() - _LATEST]
            which.append(col(Job.id).in_([job for job, seen in known.items() if not seen.ended]))
        length = func.length(Job.log)
        query = select(Job, length).options(defer(Job.log)).where(or_(*which))
        query = query.order_by(col(Job.created_at).desc()).limit(_MOST_AT_ONCE + len(wanted))
        with self._hub.reading() as session:
            found = {job.id: (job, size) for job, size in session.exec(query)}
            logs = {job: (known[job].log if job in known else None) or "" for job in wanted & found.keys()}
            for job, read in logs.items():
                if found[job][1] > len(read):
                    tail = select(func.substr(Job.log, len(read) + 1)).where(Job.id == job)
                    logs[job] = read + session.exec(tail).one()
            public = {job.id for job in public_jobs(session, [job for job, _ in found.values()])}
        return {job: Seen(JobFacts.of(row), logs.get(job), job in public) for job, (row, _) in found.items()}


router = APIRouter(tags=["jobs"])
Reading = Annotated[Hub, Depends(hub_for("read"))]
LastId = Annotated[str | None, Header(alias="Last-Event-ID", max_length=64, description="Goes on after that event.")]
_STREAM: dict[int | str, dict[str, Any]] = {
    200: {"description": "Events, as they happen.", "content": {MEDIA_TYPE: {"schema": {"type": "string"}}}},
    204: {"description": "It has ended, and all of it was sent: do not ask again."},
}


@router.get("/jobs/events", response_class=StreamingResponse, responses={200: _STREAM[200]}, operation_id="watch_jobs")
async def watch_jobs(request: Request, hub: Reading) -> Response:
    """Jobs as they begin, go on and end: an event `job` with the facts of each that is new or has changed."""
    return _stream(request, _all_events(_board(request), public_only=hub.public_only))


@router.get("/jobs/{job}/events", response_class=StreamingResponse, responses=_STREAM, operation_id="watch_job")
async def watch_job(request: Request, hub: Reading, job: str, last_event_id: LastId = None) -> Response:
    """One job as it goes on.

    Events are `state` (the job's facts: at first, and when its state changes), `progress` (`progress` and `message`),
    `log` (`text`, what was added) and `end` (the facts, when it has ended; then the stream ends).
    """
    found = await to_thread.run_sync(lambda: show_job(hub, job=job))
    sent, ended = _read_id(last_event_id)
    if ended and found.state not in _LIVE and sent >= len(found.log):
        return Response(status_code=204)
    return _stream(request, _events(_board(request), found.id, sent))


def _board(request: Request) -> Board:
    board: Board = request.app.state.board
    return board


def _stream(request: Request, events: AsyncIterator[str]) -> Response:
    board, address = _board(request), address_of(request.scope)
    if not board.places.take(address):
        raise HTTPException(429, f"{board.places.most} streams of events are open already", BUSY)

    async def guarded() -> AsyncIterator[str]:
        try:
            yield ": hello\n\n"
            async for event in events:
                yield event
        finally:
            board.places.leave(address)
            with suppress(RuntimeError):
                await events.aclose()  # type: ignore[attr-defined]

    return StreamingResponse(guarded(), media_type=MEDIA_TYPE, headers=_HEADERS)


async def _events(board: Board, job: str, sent: int) -> AsyncIterator[str]:
    before: JobFacts | None = None
    async for seen in board.follow(job):
        if seen is None:
            yield ": still here\n\n"
            continue
        facts, log = seen.facts, seen.log or ""
        mark = f"{len(log)}.{'end' if seen.ended else 'on'}"
        if before is None or (before.state, before.attempts) != (facts.state, facts.attempts):
            yield _event("state", facts.model_dump(mode="json"), mark)
        if before is not None and (before.progress, before.message) != (facts.progress, facts.message):
            yield _event("progress", {"progress": facts.progress, "message": facts.message}, mark)
        if len(log) > sent:
            yield _event("log", {"text": log[sent:]}, mark)
            sent = len(log)
        before = facts
        if seen.ended:
            yield _event("end", facts.model_dump(mode="json"), mark)


async def _all_events(board: Board, *, public_only: bool) -> AsyncIterator[str]:
    before: dict[str, JobFacts] = {}
    async for jobs in board.follow_all():
        if jobs is None:
            yield ": still here\n\n"
            continue
        shown = {job: seen.facts for job, seen in jobs.items() if seen.public or not public_only}
        for job, facts in shown.items():
            if before.get(job) != facts:
                yield _event("job", facts.model_dump(mode="json"), f"{job}.{_stamp(facts)}")
        before = shown


def _stamp(facts: JobFacts) -> str:
    last: datetime = facts.finished_at or facts.started_at or facts.created_at
    return f"{last.timestamp():.3f}.{facts.progress:.4f}"


def _event(name: str, data: dict[str, Any], mark: str) -> str:
    return f"event: {name}\nid: {mark}\ndata: {json.dumps(data)}\n\n"


def _read_id(last: str | None) -> tuple[int, bool]:
    """How much of the log a client has, and whether it has seen the end."""
    number, _, rest = (last or "").partition(".")
    return (int(number), rest == "end") if number.isdigit() and len(number) < 12 else (0, False)
