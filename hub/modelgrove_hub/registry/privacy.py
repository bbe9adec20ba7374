"""Which jobs and events tell of private models: callers without a token do not see those.

Rows of models are left out by every query of them (`registry.database`). Jobs and events only name models, by the ids
of revisions and in texts, so it is looked up what they name. What tells of a model that is gone tells of nothing here.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Sequence
from typing import TypeVar

from sqlmodel import Session, col, select

from modelgrove_hub.registry.database import EVERYTHING
from modelgrove_hub.tables import Event, Job, Model, Revision

_NAME = re.compile(r"[\w.-]+/[\w.-]+")
_ALL = {EVERYTHING: True}
_AT_ONCE = 500
Row = TypeVar("Row", Job, Event)
Value = TypeVar("Value")


def public_jobs(session: Session, jobs: Sequence[Job], *, logs: bool = False) -> list[Job]:
    """The jobs that neither have a private model among their inputs nor say the name of one; `logs` reads those too."""
    numbers = {number for job in jobs for number in job.inputs}
    hidden: set[int] = set()
    for some in _parts(sorted(numbers)):
        query = select(Revision.id).join(Model, col(Model.id) == col(Revision.model_id))
        query = query.where(col(Revision.id).in_(some), col(Model.private))
        hidden |= {number for number in session.exec(query.execution_options(**_ALL)) if number is not None}
    texts = [
        json.dumps([job.target, job.params, job.outputs, job.message, job.error, job.log if logs else ""],
                   ensure_ascii=False)
        for job in jobs
    ]  # fmt: skip
    return _without_names(session, [job if hidden.isdisjoint(job.inputs) else None for job in jobs], texts)


def public_events(session: Session, events: Sequence[Event]) -> list[Event]:
    """The events that do not say the name of a private model."""
    texts = [f"{event.subject} {json.dumps(event.detail, ensure_ascii=False)}" for event in events]
    return _without_names(session, events, texts)


def _without_names(session: Session, rows: Sequence[Row | None], texts: Sequence[str]) -> list[Row]:
    said = [set(_NAME.findall(text)) for text in texts]
    private: set[str] = set()
    for some in _parts(sorted(set().union(*said))):
        query = select(Model.name).where(col(Model.name).in_(some), col(Model.private))
        private |= set(session.exec(query.execution_options(**_ALL)))
    return [row for row, names in zip(rows, said, strict=True) if row is not None and private.isdisjoint(names)]


def _parts(values: Sequence[Value]) -> Iterable[Sequence[Value]]:
    return (values[start : start + _AT_ONCE] for start in range(0, len(values), _AT_ONCE))
