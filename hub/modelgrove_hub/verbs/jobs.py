"""Verbs of jobs: give work, watch it, stop it, try again."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any

from pydantic import BaseModel, Field

from modelgrove_hub.errors import NotFoundError, UsageError
from modelgrove_hub.hub import Hub
from modelgrove_hub.jobs import rows
from modelgrove_hub.jobs.dispatch import publish
from modelgrove_hub.plugins import get_plugin
from modelgrove_hub.registry.inputs import load_input
from modelgrove_hub.registry.models import find_revision
from modelgrove_hub.registry.privacy import public_jobs
from modelgrove_hub.tables import Job, JobState
from modelgrove_hub.verbs.facts import JobFacts
from modelgrove_hub.verbs.verb import Page, verb


class Work(BaseModel):
    """A job to do."""

    plugin: str = Field(description='As plugins are listed: "compressor.rtn".')
    params: dict[str, Any] = Field(default_factory=dict, description="Fit the plugin's own schema.")
    models: list[str] = Field(default_factory=list, description="References of the models to work on, in order.")
    target: str | None = Field(None, description="Name of what is made.")
    key: str | None = Field(
        None, max_length=200, description="Idempotency key: the same gives the same job; unset, the content is the key."
    )


class JobDetail(JobFacts):
    """A job with its log."""

    log: str


@verb("POST", "/jobs", "write", 202)
def submit_job(hub: Hub, *, work: Work) -> JobFacts:
    """Give work to the workers. A failed or cancelled job that is asked for again is queued again.

    Raises:
        NotFoundError: no such plugin or model.
        UsageError: the parameters do not fit the plugin.
        ConflictError: the key belongs to a different request.
    """
    job = create_job(hub, work)
    publish(hub, job)
    return JobFacts.of(job)


def create_job(hub: Hub, work: Work) -> Job:
    """The job that does this, new or known by its key; no worker is told.

    Raises:
        NotFoundError, UsageError, ConflictError: as `submit_job`.
    """
    with hub.reading() as session:
        inputs = [revision.id for ref in work.models if (revision := find_revision(session, ref)).id is not None]
    return rows.submit(hub, work.plugin, work.params, inputs, target=work.target, key=work.key)


@verb("POST", "/jobs/plan")
def plan_job(hub: Hub, *, work: Work) -> dict[str, Any]:
    """What a compression would make of each tensor; nothing is read, written or queued.

    Raises:
        NotFoundError, UsageError: as `submit_job`; or the method has no plan, or there is not one model.
        DataError: the model has no safetensors weights.
    """
    from modelgrove_hub.planning import plan

    if len(work.models) != 1:
        raise UsageError("a plan is for one model")
    with hub.reading() as session:
        revision = find_revision(session, work.models[0]).id or 0
    return plan(get_plugin(work.plugin, hub.settings), load_input(hub, revision), work.params)


@verb("GET", "/jobs")
def list_jobs(
    hub: Hub, *, state: JobState | None = None, limit: Annotated[int, Field(ge=1, le=10_000)] = 30,
    after: Annotated[str | None, Field(description="`next` of the page before.", max_length=32)] = None,
) -> Page[JobFacts]:  # fmt: skip
    """Jobs, newest first."""
    found = rows.list_jobs(hub, state=state, limit=limit + 1, after=after)
    shown = found[:limit]
    items = [JobFacts.of(job) for job in _seen(hub, shown)]
    return Page[JobFacts](items=items, next=shown[-1].id if len(found) > limit else None)


@verb("GET", "/jobs/{job}")
def show_job(hub: Hub, *, job: str) -> JobDetail:
    """One job, with its log.

    Raises:
        NotFoundError: there is none.
        UsageError: the beginning of an id fits several.
    """
    return JobDetail.model_validate(_get(hub, job))


@verb("POST", "/jobs/{job}/cancel", "write")
def cancel_job(hub: Hub, *, job: str) -> JobFacts:
    """Cancel a queued job; ask a running one to stop at its next step.

    Raises:
        NotFoundError, UsageError: as `show_job`.
        ConflictError: it has ended.
    """
    return JobFacts.of(rows.cancel(hub, _get(hub, job).id))


@verb("POST", "/jobs/{job}/retry", "write", 202)
def retry_job(hub: Hub, *, job: str) -> JobFacts:
    """Queue a failed or cancelled job again, with all its attempts.

    Raises:
        NotFoundError, UsageError: as `show_job`.
        ConflictError: it has not failed.
    """
    found = rows.retry(hub, _get(hub, job).id)
    publish(hub, found)
    return JobFacts.of(found)


def _get(hub: Hub, reference: str) -> Job:
    job = rows.get(hub, reference)
    if not _seen(hub, [job], logs=True):
        raise NotFoundError(f"no job {reference!r}: `modelgrove jobs ls` lists them")
    return job


def _seen(hub: Hub, jobs: Sequence[Job], *, logs: bool = False) -> list[Job]:
    if not hub.public_only:
        return list(jobs)
    with hub.reading() as session:
        return public_jobs(session, jobs, logs=logs)
