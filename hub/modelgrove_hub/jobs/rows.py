"""Job rows: the truth about work. Broker messages only hint that a row is there.

Users' verbs take the hub and are whole transactions. Workers' verbs take a session; each is
one conditional UPDATE that names the owner, so a worker that lost its lease changes nothing.
A lease is compared with the clock of whoever looks, so clocks of workers that share a
database must agree to well within `lease_seconds`.
"""

from __future__ import annotations

import hashlib
import json
import os
import socket
from collections.abc import Mapping, Sequence
from datetime import timedelta
from enum import Enum
from typing import Any
from uuid import uuid4

from sqlalchemy import ColumnElement, tuple_
from sqlalchemy.exc import IntegrityError
from sqlmodel import Session, col, select, update

from modelgrove_hub.contracts import Kind, Plugin
from modelgrove_hub.errors import ConflictError, NotFoundError, UsageError
from modelgrove_hub.hub import Hub
from modelgrove_hub.plugins import check_params, get_plugin
from modelgrove_hub.tables import Job, JobState, Revision, now

_QUEUE_OF = {Kind.PREVIEWER: "preview", Kind.SOURCE: "io"}
_SHORTEST_PREFIX = 4


class Pulse(Enum):
    """What a worker learns when it touches its job's row."""

    ALIVE = "alive"
    CANCELLED = "cancelled"
    LOST = "lost"


# ---- what users do --------------------------------------------------------------------------


def submit(
    hub: Hub, plugin: str, params: Mapping[str, Any] | None = None, inputs: Sequence[int] = (), *,
    target: str | None = None, key: str | None = None, queue: str | None = None,
) -> Job:  # fmt: skip
    """The job that does this, new or already known by its idempotency key; `dispatch.publish` tells a worker.

    Without a `key`, plugin, parameters, inputs and target are the key. A failed or cancelled
    job that is asked for again is queued again.

    Raises:
        NotFoundError: no such plugin or input revision.
        UsageError: the parameters do not fit the plugin.
        ConflictError: the key belongs to a different request.
    """
    found = get_plugin(plugin, hub.settings)
    name = f"{found.kind}.{found.name}"
    values = check_params(found, params or {}).model_dump(mode="json")
    job = Job(
        id=uuid4().hex, plugin=name, params=values, inputs=list(inputs), target=target,
        idempotency_key=key or _content_key(name, values, inputs, target), queue=queue or _queue(found),
    )  # fmt: skip
    try:
        with hub.transaction() as session:
            return _known(session, job) or _insert(session, job)
    except IntegrityError:
        # Someone else wrote the same key between our look and our insert.
        with hub.transaction() as session:
            known = _known(session, job)
        if known is None:
            raise
        return known


def get(hub: Hub, reference: str) -> Job:
    """The job with this id, or whose id starts so.

    Raises:
        NotFoundError: there is none.
        UsageError: the beginning fits several jobs.
    """
    with hub.reading() as session:
        return _find(session, reference)


def list_jobs(hub: Hub, *, state: str | None = None, limit: int = 30, after: str | None = None) -> list[Job]:
    """Jobs, newest first, of one state or of all; for the next page give the last one's id as `after`.

    Raises:
        NotFoundError: there is no job `after`.
    """
    query = select(Job).order_by(col(Job.created_at).desc(), col(Job.id).desc()).limit(limit)
    with hub.reading() as session:
        if after:
            last = _find(session, after)
            query = query.where(tuple_(col(Job.created_at), col(Job.id)) < (last.created_at, last.id))
        return list(session.exec(query.where(Job.state == state) if state else query))


def cancel(hub: Hub, reference: str) -> Job:
    """Cancel a queued job at once; ask a running one to stop at its next step.

    Raises:
        ConflictError: the job is already done or has failed.
    """
    with hub.transaction() as session:
        job = _find(session, reference)
        ended = _change(
            session, job.id, col(Job.state) == JobState.QUEUED,
            state=JobState.CANCELLED, cancel_requested=True, finished_at=now(), message="",
        )  # fmt: skip
        asked = ended or _change(session, job.id, col(Job.state) == JobState.RUNNING, cancel_requested=True)
        session.refresh(job)
        if not asked and job.state != JobState.CANCELLED:
            raise ConflictError(f"job {job.id} is already {job.state}: nothing to cancel")
        return job


def retry(hub: Hub, reference: str) -> Job:
    """Queue a failed or cancelled job again, with all its attempts; `dispatch.publish` tells a worker.

    Raises:
        ConflictError: the job is queued, running or done.
    """
    with hub.transaction() as session:
        job = _find(session, reference)
        if not _queue_again(session, job):
            raise ConflictError(f"job {job.id} is {job.state}: only a failed or cancelled job can be retried")
        return job


# ---- what workers do ------------------------------------------------------------------------


def new_owner() -> str:
    """A name for one run of one job by this process, never used before."""
    return f"{socket.gethostname()}:{os.getpid()}:{uuid4().hex[:8]}"


def claim(session: Session, job_id: str, owner: str, lease_seconds: float) -> Job | None:
    """Make `owner` the one who runs the job; None when it is not there to be had (any more, or yet)."""
    moment = now()
    taken = _change(
        session, job_id,
        col(Job.state) == JobState.QUEUED, col(Job.cancel_requested).is_(False), col(Job.not_before) <= moment,
        state=JobState.RUNNING, attempts=col(Job.attempts) + 1, owner=owner,
        lease_until=moment + timedelta(seconds=lease_seconds), started_at=moment, progress=0.0, message="", error=None,
    )  # fmt: skip
    return session.get(Job, job_id, populate_existing=True) if taken else None


def beat(session: Session, job_id: str, owner: str, lease_seconds: float, log: str = "", **report: Any) -> Pulse:
    """Extend the lease and write what there is to report (`progress`, `message`, more `log`)."""
    if log:
        report["log"] = col(Job.log) + log
    lease = now() + timedelta(seconds=lease_seconds)
    if not _change(session, job_id, *_held(owner), lease_until=lease, **report):
        return Pulse.LOST
    cancelled = session.exec(select(Job.cancel_requested).where(Job.id == job_id)).one()
    return Pulse.CANCELLED if cancelled else Pulse.ALIVE


def finish(session: Session, job_id: str, owner: str, outputs: Mapping[str, Any]) -> bool:
    """Mark the owner's job done, in the transaction that also writes what it made. False: not the owner any more."""
    return _end(session, job_id, owner, JobState.DONE, outputs=dict(outputs), progress=1.0)


def fail(session: Session, job_id: str, owner: str, error: str, log: str = "") -> bool:
    """Mark the owner's job failed with one line for people and more for the log."""
    return _end(session, job_id, owner, JobState.FAILED, error=error, log=col(Job.log) + log)


def stop(session: Session, job_id: str, owner: str) -> bool:
    """Mark the owner's job cancelled."""
    return _end(session, job_id, owner, JobState.CANCELLED, cancel_requested=True)


def give_back(session: Session, job_id: str, owner: str, *, error: str | None = None, delay: float = 0.0) -> bool:
    """Queue the owner's job again, not before `delay` seconds from now; one that was to be cancelled is cancelled.

    Without an `error` the worker had to stop through no fault of the job, and the attempt does not count.
    """
    used = col(Job.attempts) if error else col(Job.attempts) - 1
    changes = {**_queued(), "attempts": used, "not_before": now() + timedelta(seconds=delay), "error": error}
    wanted = col(Job.cancel_requested).is_(False)
    return _change(session, job_id, *_held(owner), wanted, **changes) or stop(session, job_id, owner)


def recover(session: Session, max_attempts: int) -> int:
    """Take back every job whose lease ran out: cancelled, parked as failed or queued again. Returns how many."""
    moment = now()
    expired = (col(Job.state) == JobState.RUNNING, col(Job.lease_until) < moment)
    gone: dict[str, Any] = {"owner": None, "lease_until": None, "finished_at": moment}
    parked = f"parked after {max_attempts} attempts: each time the worker died or fell silent (killed, out of memory?)"
    changes: tuple[tuple[tuple[ColumnElement[bool], ...], dict[str, Any]], ...] = (
        ((col(Job.cancel_requested).is_(True),), {"state": JobState.CANCELLED, **gone}),
        ((col(Job.attempts) >= max_attempts,), {"state": JobState.FAILED, "error": parked, **gone}),
        ((), {**_queued(), "not_before": moment}),
    )
    return sum(_change_all(session, *expired, *conditions, **values) for conditions, values in changes)


# ---- the parts ------------------------------------------------------------------------------


def _known(session: Session, wanted: Job) -> Job | None:
    known = session.exec(select(Job).where(Job.idempotency_key == wanted.idempotency_key)).first()
    if known is None:
        return None
    for field in ("plugin", "params", "inputs", "target"):
        if getattr(known, field) != getattr(wanted, field):
            raise ConflictError(
                f"idempotency key {wanted.idempotency_key!r} belongs to job {known.id}, "
                f"whose {field} is {getattr(known, field)!r}, not {getattr(wanted, field)!r}"
            )
    _queue_again(session, known)
    return known


def _insert(session: Session, job: Job) -> Job:
    inputs = set(job.inputs)
    missing = inputs - set(session.exec(select(Revision.id).where(col(Revision.id).in_(inputs)))) if inputs else set()
    if missing:
        raise NotFoundError(f"no revision with id {', '.join(map(str, sorted(missing)))} to give to {job.plugin}")
    session.add(job)
    session.flush()
    return job


def _queue_again(session: Session, job: Job) -> bool:
    ended = col(Job.state).in_([JobState.FAILED, JobState.CANCELLED])
    fresh = {"attempts": 0, "not_before": now(), "progress": 0.0, "error": None, "finished_at": None}
    again = _change(session, job.id, ended, **_queued(), cancel_requested=False, **fresh)
    session.refresh(job)
    return again


def _find(session: Session, reference: str) -> Job:
    job = session.get(Job, reference)
    if job is not None:
        return job
    found: Sequence[Job] = ()
    if len(reference) >= _SHORTEST_PREFIX:
        found = session.exec(select(Job).where(col(Job.id).startswith(reference, autoescape=True)).limit(2)).all()
    if not found:
        raise NotFoundError(f"no job {reference!r}: `modelgrove jobs ls` lists them")
    if len(found) > 1:
        raise UsageError(f"several jobs start with {reference!r}: give more of the id")
    return found[0]


def _content_key(plugin: str, params: Mapping[str, Any], inputs: Sequence[int], target: str | None) -> str:
    content = json.dumps([plugin, params, list(inputs), target], sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(content.encode()).hexdigest()


def _queue(plugin: type[Plugin]) -> str:
    return _QUEUE_OF.get(Kind(plugin.kind), "cpu")


def _held(owner: str) -> tuple[ColumnElement[bool], ...]:
    return col(Job.owner) == owner, col(Job.state) == JobState.RUNNING


def _queued() -> dict[str, Any]:
    return {"state": JobState.QUEUED, "owner": None, "lease_until": None, "published_at": None, "message": ""}


def _end(session: Session, job_id: str, owner: str, state: JobState, **values: Any) -> bool:
    gone = {"owner": None, "lease_until": None, "finished_at": now(), "message": ""}
    return _change(session, job_id, *_held(owner), state=state, **gone, **values)


def _change(session: Session, job_id: str, *conditions: ColumnElement[bool], **values: Any) -> bool:
    return _change_all(session, col(Job.id) == job_id, *conditions, **values) == 1


def _change_all(session: Session, *conditions: ColumnElement[bool], **values: Any) -> int:
    # Objects in the session are refreshed where they are wanted, not by evaluating this in Python.
    statement = update(Job).where(*conditions).values(**values)
    return session.exec(statement, execution_options={"synchronize_session": False}).rowcount
