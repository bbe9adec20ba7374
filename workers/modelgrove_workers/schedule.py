"""The ticker: takes back silent jobs, publishes what was not told, starts sources that are due.

Everything it does is claimed by a conditional UPDATE, so any number of tickers may run.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from datetime import datetime

from sqlmodel import col, select, update

from modelgrove_hub.errors import ModelgroveError, UsageError
from modelgrove_hub.hub import Hub
from modelgrove_hub.ingest.runs import following, running, start_run
from modelgrove_hub.jobs.dispatch import publish, publish_due
from modelgrove_hub.jobs.rows import recover
from modelgrove_hub.jobs.run import sweep
from modelgrove_hub.tables import Source, now
from modelgrove_workers.watch import Watcher

LOG = logging.getLogger(__name__)
_SECONDS_BETWEEN_TICKS = 1.0
_TICKS_BETWEEN_SWEEPS = 60


class Ticker:
    """Ticks, and watches folders, in threads from `start` to `stop`."""

    def __init__(self, hub: Hub) -> None:
        self._hub = hub
        self._stop = threading.Event()
        self._watcher = Watcher(hub)
        self._thread = threading.Thread(target=self._run, name="ticker", daemon=True)

    def start(self) -> None:
        """Begin ticking."""
        self._thread.start()
        self._watcher.start()

    def stop(self) -> None:
        """Finish the tick under way, if any."""
        self._stop.set()
        self._thread.join()
        self._watcher.stop()

    def _run(self) -> None:
        ticks = 0
        while not self._stop.is_set():
            tick(self._hub)
            if ticks % _TICKS_BETWEEN_SWEEPS == 0:
                _guard("sweep", sweep, self._hub)
            ticks += 1
            self._stop.wait(_SECONDS_BETWEEN_TICKS)


def tick(hub: Hub) -> None:
    """Do once what is due. A database or broker that does not answer is logged and tried again."""
    _guard("take back silent jobs", reap, hub)
    _guard("start sources", start_sources, hub)
    _guard("publish", publish_due, hub)


def reap(hub: Hub) -> int:
    """Take back jobs whose lease ran out. Returns how many."""
    with hub.transaction() as session:
        count = recover(session, hub.settings.max_attempts)
    if count:
        LOG.warning("%d silent job(s) taken back", count)
    return count


def start_sources(hub: Hub) -> int:
    """Submit a job for every source whose time has come. Returns how many.

    Runs that were missed while nothing ticked become one run; a source that still runs is not started again.
    """
    with hub.transaction() as session:
        due = session.exec(select(Source).where(col(Source.next_run) <= now(), col(Source.paused).is_(False))).all()
    return sum(_start(hub, source) for source in due)


def _start(hub: Hub, source: Source) -> bool:
    with hub.reading() as session:
        busy = running(session, source) is not None
    if source.next_run is None or busy or not _advance(hub, source, source.next_run):
        return False
    try:
        job = start_run(hub, source, f"{source.next_run:%Y%m%dT%H%M%S%f}")
    except ModelgroveError as error:
        LOG.error("source %s: %s", source.name, error)
        return False
    publish(hub, job)
    return True


def _advance(hub: Hub, source: Source, due: datetime) -> bool:
    """Claim this run by moving the source to its next; one without a valid schedule runs this once."""
    try:
        next_run = following(source.schedule)
    except UsageError:
        next_run = None
    claimed = update(Source).where(col(Source.id) == source.id, col(Source.next_run) == due)
    with hub.transaction() as session:
        return session.exec(claimed.values(next_run=next_run)).rowcount == 1


def _guard(what: str, duty: Callable[[Hub], int], hub: Hub) -> None:
    try:
        duty(hub)
    except ModelgroveError as error:
        LOG.warning("cannot %s now: %s", what, error)
    except Exception:
        # The ticker must outlive any surprise: without it no lost job would come back.
        LOG.exception("cannot %s now", what)
