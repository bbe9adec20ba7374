"""Pages of jobs: all of them, and one with its progress, log and result."""

from __future__ import annotations

from collections.abc import Collection
from typing import Annotated

from fastapi import APIRouter, Depends, Request
from fastapi.responses import FileResponse, HTMLResponse, RedirectResponse, Response
from sqlmodel import col, select

from modelgrove_hub.api.access import hub_for
from modelgrove_hub.errors import NotFoundError
from modelgrove_hub.hub import Hub
from modelgrove_hub.tables import JobState, Model, Revision
from modelgrove_hub.verbs.jobs import cancel_job, list_jobs, retry_job, show_job
from modelgrove_hub.web.render import page

router = APIRouter(include_in_schema=False)
Reading = Annotated[Hub, Depends(hub_for("read"))]
Writing = Annotated[Hub, Depends(hub_for("write"))]
_PAGE = 40
_LOG = 200
_PICTURES = {"png": "image/png", "jpg": "image/jpeg", "jpeg": "image/jpeg", "webp": "image/webp", "gif": "image/gif"}


@router.get("/jobs")
def jobs(request: Request, hub: Reading, state: str = "", after: str = "") -> HTMLResponse:
    """All jobs, or those of one state, newest first."""
    wanted = JobState(state) if state in list(JobState) else None
    found = list_jobs(hub, state=wanted, limit=_PAGE, after=after[:32] or None)
    names = names_of(hub, {number for job in found.items for number in job.inputs})
    return page(request, "jobs.html", nav="jobs", jobs=found, states=list(JobState), state=wanted, names=names)


@router.get("/jobs/{job}")
def one(request: Request, hub: Reading, job: str) -> HTMLResponse:
    """A job: how far it is, what it said, and what came out."""
    found = show_job(hub, job=job)
    names = names_of(hub, set(found.inputs))
    artefacts = found.outputs.get("artefacts", {}) if _may_see(found.inputs, names) else {}
    lines = found.log.splitlines()
    report = found.outputs.get("report") or {}
    return page(
        request, "job.html", nav="jobs", job=found, names=names, log="\n".join(lines[-_LOG:]),
        cut=max(0, len(lines) - _LOG), report=report, live=found.finished_at is None,
        pictures=[name for name in artefacts if _kind(name)], others=[name for name in artefacts if not _kind(name)],
        made=list(found.outputs.get("models", ())),
    )  # fmt: skip


@router.post("/jobs/{job}/cancel")
def cancel(hub: Writing, job: str) -> RedirectResponse:
    """Stop it, and show it."""
    return RedirectResponse(f"/jobs/{cancel_job(hub, job=job).id}", 303)


@router.post("/jobs/{job}/retry")
def retry(hub: Writing, job: str) -> RedirectResponse:
    """Queue it again, and show it."""
    return RedirectResponse(f"/jobs/{retry_job(hub, job=job).id}", 303)


@router.get("/jobs/{job}/files/{name:path}")
def artefact(hub: Reading, job: str, name: str) -> Response:
    """A picture or another file that the job left. What is no picture is downloaded, never shown."""
    found = show_job(hub, job=job)
    sha256 = found.outputs.get("artefacts", {}).get(name)
    if sha256 is None or not _may_see(found.inputs, names_of(hub, set(found.inputs))):
        raise NotFoundError(f"job {job} left no file {name!r}")
    kind = _kind(name)
    headers = {"X-Content-Type-Options": "nosniff", "Cache-Control": "private, max-age=31536000, immutable"}
    return FileResponse(
        hub.store.path(sha256), media_type=kind or "application/octet-stream", headers=headers,
        filename=name.rpartition("/")[2], content_disposition_type="inline" if kind else "attachment",
    )  # fmt: skip


def names_of(hub: Hub, revisions: Collection[int]) -> dict[int, str]:
    """Names of the models of revisions, as far as the caller sees them."""
    if not revisions:
        return {}
    query = select(Revision.id, Model.name).join(Model, col(Model.id) == col(Revision.model_id))
    with hub.reading() as session:
        rows = session.exec(query.where(col(Revision.id).in_(revisions))).all()
    return {number: name for number, name in rows if number is not None}


def _may_see(inputs: Collection[int], names: dict[int, str]) -> bool:
    """Pictures show what a model does, so those of models that the caller does not see are not shown."""
    return set(inputs) <= names.keys()


def _kind(name: str) -> str | None:
    return _PICTURES.get(name.rpartition(".")[2].lower())
