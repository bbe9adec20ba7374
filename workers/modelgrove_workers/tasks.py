"""The one Celery task: run a job. Imported by worker processes only.

The process that Celery listens in loads no more than this; its pool imports the hub.
"""

from __future__ import annotations

import logging
import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import cache
from types import FrameType
from typing import TYPE_CHECKING, Any

from billiard.util import set_pdeathsig  # type: ignore[import-untyped]  # billiard has no types
from celery import signals
from celery.worker import state

from modelgrove_hub.settings import settings
from modelgrove_workers.app import TASK, make_app

if TYPE_CHECKING:
    from modelgrove_hub.hub import Hub

LOG = logging.getLogger(__name__)
HUNG = 70

app = make_app(settings())


@app.task(name=TASK)  # type: ignore[untyped-decorator]  # celery has no types
def run(job_id: str) -> None:
    """Run the job with this id, if it is there to be had."""
    from modelgrove_hub.jobs import rows
    from modelgrove_hub.jobs.run import Interrupted, run_job

    hub, owner = _hub(), rows.new_owner()

    def leave() -> None:
        # The plugin hangs and does not see that its job was cancelled. Celery replaces this process.
        LOG.error("job %s: the plugin does not stop; ending its process", job_id)
        with hub.transaction() as session:
            rows.stop(session, job_id, owner)
        os._exit(HUNG)

    try:
        with _terminable():
            run_job(hub, job_id, owner, on_hang=leave)
    except Interrupted:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        os.kill(os.getpid(), signal.SIGTERM)


@signals.worker_process_init.connect  # type: ignore[untyped-decorator]  # celery has no types
def open_hub(**_options: Any) -> None:
    """Import and open before the first job comes."""
    from modelgrove_hub.jobs import run  # noqa: F401

    _hub()


@cache
def _hub() -> Hub:
    from modelgrove_hub.hub import Hub

    return Hub.open(settings())


@contextmanager
def _terminable() -> Iterator[None]:
    """Turn SIGTERM into `Interrupted`, so that a job is given back before the process ends."""
    from modelgrove_hub.jobs.run import Interrupted

    def interrupt(_number: int, _frame: FrameType | None) -> None:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        raise Interrupted

    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


@signals.setup_logging.connect  # type: ignore[untyped-decorator]  # celery has no types
def write_log(**_options: Any) -> None:
    """Our lines and everyone's warnings, on stderr, in one format."""
    form = "%(asctime)s %(levelname)-7s %(message)s"
    logging.basicConfig(stream=sys.stderr, level=logging.WARNING, format=form, datefmt="%H:%M:%S")
    for name in ("modelgrove_hub", "modelgrove_workers"):
        logging.getLogger(name).setLevel(logging.INFO)


@signals.worker_init.connect  # type: ignore[untyped-decorator]  # celery has no types
def end_with_supervisor(**_options: Any) -> None:
    """Finish running jobs and stop when the supervisor is killed (Linux only)."""
    with suppress(OSError):
        set_pdeathsig(signal.SIGTERM)


@signals.worker_shutting_down.connect  # type: ignore[untyped-decorator]  # celery has no types
def leave_when_idle(**_options: Any) -> None:
    """End at once when nothing runs: Celery's own way out takes seconds. The pool's processes end with this one."""
    if not state.reserved_requests:
        os._exit(0)
