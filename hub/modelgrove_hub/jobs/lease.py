"""The hold on a running job: a thread that tells the row, three times a lease, that its worker lives."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from types import TracebackType
from typing import Any

from modelgrove_hub.contracts import Cancelled
from modelgrove_hub.errors import StorageError
from modelgrove_hub.hub import Hub
from modelgrove_hub.jobs import rows
from modelgrove_hub.jobs.rows import Pulse

LOG = logging.getLogger(__name__)


class LostLease(Cancelled):
    """Another worker may have the job now: what this one does no longer counts."""


class Lease:
    """Holds a claimed job while the block runs. `pulse` is what the row said last.

    When a cancel is not obeyed for a whole lease, `on_hang` is called from the thread: a plugin
    that hangs cannot be stopped otherwise than with its process.
    """

    def __init__(self, hub: Hub, job_id: str, owner: str, on_hang: Callable[[], None] | None = None) -> None:
        self.job_id, self.owner = job_id, owner
        self.pulse = Pulse.ALIVE
        self._hub, self._on_hang = hub, on_hang
        self._seconds = hub.settings.lease_seconds
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._hold, name=f"lease-{job_id[:8]}", daemon=True)

    def __enter__(self) -> Lease:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._done.set()
        self._thread.join()

    def beat(self, log: str = "", **report: Any) -> Pulse:
        """Extend the lease and report.

        Raises:
            StorageError: the database does not answer; the lease runs on until it is over.
        """
        with self._hub.transaction() as session:
            self.pulse = rows.beat(session, self.job_id, self.owner, self._seconds, log, **report)
        return self.pulse

    def check(self) -> None:
        """Return while the work is wanted.

        Raises:
            Cancelled: the user gave up.
            LostLease: the job is not ours any more.
        """
        if self.pulse is Pulse.LOST:
            raise LostLease(f"job {self.job_id} was taken back")
        if self.pulse is Pulse.CANCELLED:
            raise Cancelled(f"job {self.job_id} was cancelled")

    def _hold(self) -> None:
        cancelled_at: float | None = None
        while not self._done.wait(self._seconds / 3):
            try:
                pulse = self.beat()
            except StorageError as error:
                LOG.warning("job %s: no heartbeat: %s", self.job_id, error)
                continue
            if pulse is Pulse.LOST:
                return
            if pulse is Pulse.CANCELLED:
                cancelled_at = cancelled_at or time.monotonic()
                if self._on_hang and time.monotonic() - cancelled_at >= self._seconds:
                    self._on_hang()
                    return
