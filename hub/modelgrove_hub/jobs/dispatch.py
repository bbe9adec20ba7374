"""Telling workers that jobs are there. Any message may be lost: the rows know, and say it again.

Who carries messages is an entry point of the group `modelgrove.dispatchers`, so that the hub
knows no broker. A dispatcher is a class made from the settings.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from datetime import datetime, timedelta
from functools import cache
from typing import Protocol

from sqlalchemy.orm import aliased
from sqlmodel import col, exists, select, update

from modelgrove_hub.entries import usable
from modelgrove_hub.errors import StorageError
from modelgrove_hub.hub import Hub
from modelgrove_hub.settings import Settings
from modelgrove_hub.tables import Job, JobState, now

LOG = logging.getLogger(__name__)
GROUP = "modelgrove.dispatchers"
NAME = "celery"
_BATCH = 1000


class Dispatcher(Protocol):
    """Carries job ids to workers."""

    def publish(self, job_id: str, queue: str) -> None:
        """Send one message. Raises `StorageError` when the broker does not take it."""

    def waiting(self, queue: str) -> int:
        """How many messages no worker has taken yet. Raises `StorageError` when the broker does not answer."""


def publish(hub: Hub, job: Job) -> bool:
    """Tell a worker about a queued job, once. A broker that is missing or down is logged: the reaper tells it later."""
    return _publish(hub, job, None)


def publish_due(hub: Hub) -> int:
    """The outbox: publish queued jobs whose time has come, and again those whose message was lost. Returns how many."""
    with hub.reading() as session:
        query = select(Job).where(
            col(Job.state) == JobState.QUEUED, col(Job.published_at).is_(None), col(Job.not_before) <= now()
        )
        due = session.exec(query.order_by(col(Job.not_before)).limit(_BATCH)).all()
    return _publish_all(hub, due) + _publish_all(hub, _lost(hub))


def _publish_all(hub: Hub, jobs: Sequence[Job]) -> int:
    for count, job in enumerate(jobs):
        if not _publish(hub, job, job.published_at):
            return count  # the broker is down, or someone else is at it: the next tick sees
    return len(jobs)


def _publish(hub: Hub, job: Job, last: datetime | None) -> bool:
    # Mark first: of any number of publishers one wins, and a message lost after the mark is
    # found by `_lost`. The mark is taken back when sending fails.
    moment = now()
    if not _mark(hub, job.id, last, moment):
        return False
    try:
        dispatcher(hub.settings).publish(job.id, job.queue)
    except StorageError as error:
        LOG.warning("job %s waits, its message was not sent: %s", job.id, error)
        _mark(hub, job.id, moment, None)
        return False
    return True


def _mark(hub: Hub, job_id: str, last: datetime | None, moment: datetime | None) -> bool:
    unchanged = col(Job.published_at).is_(None) if last is None else col(Job.published_at) == last
    statement = update(Job).where(col(Job.id) == job_id, col(Job.state) == JobState.QUEUED, unchanged)
    with hub.transaction() as session:
        return session.exec(statement.values(published_at=moment)).rowcount == 1


def _lost(hub: Hub) -> Sequence[Job]:
    """Queued jobs whose message is gone: the broker's queue is empty, or later messages were already taken.

    Age alone proves nothing: behind long jobs a message may wait for days, and sending it again
    every few seconds would bury the queue.
    """
    patience = now() - timedelta(seconds=hub.settings.lease_seconds / 2)
    later = aliased(Job)
    overtaken = exists().where(
        later.queue == Job.queue, col(later.started_at) > Job.published_at, col(later.published_at) > Job.published_at
    )
    old = select(Job, overtaken).where(
        col(Job.state) == JobState.QUEUED, col(Job.published_at) < patience, col(Job.not_before) <= now()
    )
    with hub.reading() as session:
        found = session.exec(old.order_by(col(Job.published_at)).limit(_BATCH)).all()
    empty = {queue: _is_empty(hub, queue) for queue in {job.queue for job, _ in found}}
    return [job for job, was_overtaken in found if was_overtaken or empty[job.queue]]


def _is_empty(hub: Hub, queue: str) -> bool:
    try:
        return dispatcher(hub.settings).waiting(queue) == 0
    except StorageError as error:
        LOG.warning("the broker does not say what waits in queue %r: %s", queue, error)
        return False


@cache
def dispatcher(config: Settings) -> Dispatcher:
    """The installed dispatcher.

    Raises:
        StorageError: none is installed, or it does not load.
    """
    found = usable(GROUP, config)
    if NAME not in found:
        raise StorageError(f"no dispatcher {NAME!r} is installed (entry-point group {GROUP})")
    try:
        made: Dispatcher = found[NAME].load()(config)
    except StorageError:
        raise
    except Exception as error:
        raise StorageError(f"dispatcher {NAME!r} does not load: {type(error).__name__}: {error}") from error
    return made
