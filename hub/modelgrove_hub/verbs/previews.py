"""Verbs of previews: have a model painted with, and list what was painted."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from datetime import datetime
from typing import Annotated, Any

from pydantic import BaseModel, Field
from sqlalchemy import JSON, cast
from sqlmodel import Session, col, func, select

from modelgrove_hub import previews
from modelgrove_hub.hub import Hub
from modelgrove_hub.plugins import check_params, get_plugin
from modelgrove_hub.registry.models import find, find_revision
from modelgrove_hub.registry.privacy import public_jobs
from modelgrove_hub.tables import Job, JobState, ModelKind
from modelgrove_hub.verbs.facts import Facts, JobFacts
from modelgrove_hub.verbs.jobs import Work, submit_job
from modelgrove_hub.verbs.verb import verb

PICTURE = "preview.png"
_PAINTERS = "previewer."


class Worn(BaseModel):
    """An adapter, and how strongly it is fused in."""

    model: str
    weight: float = Field(1.0, allow_inf_nan=False)


class Painting(BaseModel):
    """What to paint, with which model."""

    model: str = Field(description="A model; an adapter is shown on its base.")
    params: dict[str, Any] = Field(
        default_factory=dict, description="Fit the previewer's schema: at least `prompts`, the texts to paint."
    )
    loras: list[Worn] = Field(default_factory=list, description="Adapters to fuse in.")
    method: str = Field("diffusers", description="Which previewer.")
    key: str | None = Field(None, max_length=200, description="Idempotency key; unset, what decides the picture.")


class PaintingPlan(BaseModel):
    """The work that paints, and the name of the picture that it makes, which its content decides."""

    work: Work
    name: str


class PreviewFacts(Facts):
    """A preview that was asked for."""

    job: str
    state: JobState
    prompts: list[str]
    seed: int | None
    created_at: datetime
    picture: str | None
    """sha256 of the PNG, when it is painted."""


@verb("POST", "/previews", "write", 202)
def paint(hub: Hub, *, painting: Painting) -> JobFacts:
    """Have pictures painted. The same request is the same job, so it is painted once.

    Raises:
        NotFoundError: there is no such model or previewer, or no base here to show the adapter on.
        UsageError: the parameters do not fit, or several bases are possible.
    """
    return submit_job(hub, work=plan_preview(hub, painting=painting).work)


@verb("POST", "/previews/plan")
def plan_preview(hub: Hub, *, painting: Painting) -> PaintingPlan:
    """The work that paints: give it to `submit_job`.

    Raises:
        NotFoundError, UsageError: as `paint`.
    """
    name, loras = f"{_PAINTERS}{painting.method}", list(painting.loras)
    with hub.reading() as session:
        model = find(session, painting.model)
        if model.kind == ModelKind.ADAPTER:
            base = previews.find_base(session, model)
            loras = [Worn(model=painting.model), *loras]
        else:
            base = find_revision(session, painting.model)
        chosen = [base, *(find_revision(session, lora.model) for lora in loras)]
    weights = {"lora_weights": [lora.weight for lora in loras]} if loras else {}
    params = check_params(get_plugin(name, hub.settings), {**painting.params, **weights}).model_dump(mode="json")
    picture = previews.preview_key(name, params, [revision.digest for revision in chosen])
    ids = [revision.id for revision in chosen if revision.id is not None]
    key = painting.key or previews.job_key(picture, ids)
    work = Work(plugin=name, params=params, models=[f"@#{number}" for number in ids], key=key)
    return PaintingPlan(work=work, name=picture)


@verb("GET", "/previews/{model:path}")
def list_previews(hub: Hub, *, model: str, limit: Annotated[int, Field(ge=1, le=100)] = 12) -> list[PreviewFacts]:
    """Previews of a model alone, or of an adapter on its base, newest first.

    Raises:
        NotFoundError: there is no such model.
        UsageError: several are called so.
    """
    with hub.reading() as session:
        revision = find_revision(session, model)
        jobs = session.exec(_painted(session, [revision.id or 0]).limit(10 * limit)).all()
        own = [job for job in jobs if _shown(job) == revision.id and job.state != JobState.CANCELLED][:limit]
        found = public_jobs(session, own) if hub.public_only else own
    return [
        PreviewFacts(
            job=job.id, state=JobState(job.state), prompts=list(job.params.get("prompts", ())),
            seed=job.params.get("seed"), created_at=job.created_at, picture=_picture(job),
        )
        for job in found
    ]  # fmt: skip


def newest_pictures(hub: Hub, revisions: Collection[int]) -> Mapping[int, str]:
    """The job that painted the newest preview of each of these revisions, where there is one."""
    if not revisions:
        return {}
    with hub.reading() as session:
        jobs = session.exec(_painted(session, revisions).where(Job.state == JobState.DONE).limit(1000))
        found: dict[int, Job] = {}
        for job in jobs:
            if (shown := _shown(job)) in revisions and _picture(job):
                found.setdefault(shown, job)
        seen = public_jobs(session, list(found.values())) if hub.public_only else list(found.values())
    return {_shown(job): job.id for job in seen}


def _painted(session: Session, revisions: Collection[int]) -> Any:
    """Jobs of previewers that any of these revisions went into, newest first."""
    postgresql = session.get_bind().dialect.name == "postgresql"
    each = func.json_array_elements_text if postgresql else func.json_each
    inputs = each(cast(Job.inputs, JSON) if postgresql else col(Job.inputs)).table_valued("value")
    wanted = [str(one) for one in revisions] if postgresql else list(revisions)
    used = select(inputs.c.value).where(inputs.c.value.in_(wanted)).exists()
    return select(Job).where(col(Job.plugin).startswith(_PAINTERS), used).order_by(col(Job.created_at).desc())


def _shown(job: Job) -> int:
    """The revision that a preview is of: the one adapter, or the network where there is none; 0 for several."""
    return job.inputs[-1] if len(job.inputs) in (1, 2) else 0


def _picture(job: Job) -> str | None:
    found: str | None = (job.outputs or {}).get("artefacts", {}).get(PICTURE)
    return found
