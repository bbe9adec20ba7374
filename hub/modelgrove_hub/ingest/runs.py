"""When a source runs, and the job that is a run of it."""

from __future__ import annotations

import re
from collections.abc import Mapping
from datetime import UTC, datetime, timedelta
from typing import Any
from zoneinfo import ZoneInfo

from sqlmodel import Session, col, select

from modelgrove_hub.errors import UsageError
from modelgrove_hub.hub import Hub
from modelgrove_hub.jobs.rows import submit
from modelgrove_hub.tables import Job, JobState, Source, now

_UNITS = {"m": "minutes", "h": "hours", "d": "days"}
_FIELDS = 5


def following(schedule: str, after: datetime | None = None) -> datetime | None:
    """The first moment after `after` (the present) at which a schedule is due; None without a schedule.

    A schedule is how long between two runs, as in "15m", "6h" or "1d", or five fields of cron with a time zone (UTC
    if none is named), as in "0 3 * * * Europe/Berlin".

    Raises:
        UsageError: it is not written so, or never due.
    """
    after = after or now()
    if not schedule:
        return None
    found = re.fullmatch(r"([1-9]\d{0,4})([mhd])", schedule, re.ASCII)
    if found is not None:
        return after + timedelta(**{_UNITS[found[2]]: int(found[1])})
    fields = schedule.split()
    if len(fields) not in (_FIELDS, _FIELDS + 1):
        raise UsageError(
            f"schedule {schedule!r}: write a number and m, h or d, as in 15m, 6h, 1d, or cron as in '0 3 * * * UTC'"
        )
    from croniter import CroniterError, croniter

    try:
        zone = ZoneInfo(fields[_FIELDS]) if len(fields) > _FIELDS else UTC
        moment: datetime = croniter(" ".join(fields[:_FIELDS]), after.astimezone(zone)).get_next(datetime)
    except (CroniterError, KeyError, ValueError, OSError) as error:
        raise UsageError(f"schedule {schedule!r}: {error}") from error
    return moment.astimezone(UTC)


def start_run(hub: Hub, source: Source, key: str, **more: Any) -> Job:
    """The job that is a run of a source; the same `key` gives the same job.

    Raises:
        NotFoundError, UsageError, PluginError: there is no such plugin, or it does not take the source's options.
        ConflictError: the key belongs to another run.
    """
    return submit(hub, source.plugin, run_params(source, **more), key=f"{_prefix(source)}{key}")


def run_params(source: Source, **more: Any) -> Mapping[str, Any]:
    """The parameters of a run."""
    return {**source.params, "url": source.url, "source": source.name, **more}


def running(session: Session, source: Source) -> Job | None:
    """The source's newest job that has not ended."""
    unfinished = col(Job.state).in_([JobState.QUEUED, JobState.RUNNING])
    found: Job | None = session.exec(_jobs(source).where(unfinished)).first()
    return found


def last_job(session: Session, source: Source) -> Job | None:
    """The source's newest job."""
    found: Job | None = session.exec(_jobs(source)).first()
    return found


def _jobs(source: Source) -> Any:
    mine = select(Job).where(col(Job.idempotency_key).startswith(_prefix(source)))
    return mine.order_by(col(Job.created_at).desc()).limit(1)


def _prefix(source: Source) -> str:
    return f"source:{source.id}:"
