"""Pages of one model: what it is, its files, layers, family, what is like it, and what was done with it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any

from fastapi import APIRouter, Depends, Query, Request
from fastapi.responses import HTMLResponse, RedirectResponse
from sqlmodel import Session, col, func, select

from modelgrove_hub.api.access import hub_for
from modelgrove_hub.errors import ModelgroveError
from modelgrove_hub.hub import Hub
from modelgrove_hub.registry.lineage import tree
from modelgrove_hub.registry.models import find, find_revision
from modelgrove_hub.registry.privacy import public_jobs
from modelgrove_hub.registry.trees import find_root
from modelgrove_hub.tables import Job, Model, Report
from modelgrove_hub.verbs.facts import JobFacts, ModelDetail
from modelgrove_hub.verbs.layers import layers
from modelgrove_hub.verbs.models import show_model
from modelgrove_hub.verbs.previews import list_previews
from modelgrove_hub.verbs.search import similar
from modelgrove_hub.web.actions import offered
from modelgrove_hub.web.cards import card_html
from modelgrove_hub.web.faces import faces, picture_url
from modelgrove_hub.web.family import family_svg
from modelgrove_hub.web.heat import MEASURES, heat_maps, measures_of
from modelgrove_hub.web.render import model_url, page

router = APIRouter(include_in_schema=False)
Reading = Annotated[Hub, Depends(hub_for("read"))]
Ref = Annotated[str, Query(max_length=250)]
_LIKE = 24
_STRIP = 6
_JOBS = 50


@dataclass(frozen=True)
class _Head:
    """A model as all of its pages show it."""

    model: ModelDetail
    revision: str
    """What `?revision=` names; empty for the newest."""


@router.get("/m/{owner}/{name}")
def overview(request: Request, hub: Reading, owner: str, name: str, revision: Ref = "") -> HTMLResponse:
    """Card, facts, pictures, relatives and how to use it."""
    head = _head(hub, owner, name, revision)
    reference, model = _reference(head), head.model
    paths = [file.path for file in model.files]
    return page(
        request, "model.html", tab="", card=card_html(model.card, model.name, paths), previews=_painted(hub, reference),
        face=faces(hub, [model.name]).get(model.name), near=_near(hub, reference, _STRIP),
        snippets=_snippets(request, model), family=_family(hub, reference), **_around(head),
    )  # fmt: skip


@router.get("/m/{owner}/{name}/files")
def files(request: Request, hub: Reading, owner: str, name: str, revision: Ref = "") -> HTMLResponse:
    """Files with sizes, hashes and links."""
    return page(request, "files.html", tab="files", **_around(_head(hub, owner, name, revision)))


@router.get("/m/{owner}/{name}/layers")
def heat(request: Request, hub: Reading, owner: str, name: str, revision: Ref = "", by: str = "") -> HTMLResponse:
    """Heat maps of the layers, and their numbers."""
    head = _head(hub, owner, name, revision)
    found, problem = None, ""
    try:
        found = layers(hub, model=_reference(head))
    except ModelgroveError as error:
        problem = str(error)
    offered_measures = measures_of(found) if found else []
    measure = by if by in offered_measures else next(iter(offered_measures), "norm")
    return page(
        request, "layers.html", tab="layers", layers=found, problem=problem, measure=measure, measures=offered_measures,
        MEASURES=MEASURES, maps=heat_maps(found, measure) if found else [], **_around(head),
    )  # fmt: skip


@router.get("/m/{owner}/{name}/family")
def family(request: Request, hub: Reading, owner: str, name: str, revision: Ref = "") -> HTMLResponse:
    """Parents and children, declared and inferred apart."""
    head = _head(hub, owner, name, revision)
    return page(request, "family.html", tab="family", **_family(hub, _reference(head)), **_around(head))


@router.get("/m/{owner}/{name}/similar")
def alike(request: Request, hub: Reading, owner: str, name: str, revision: Ref = "") -> HTMLResponse:
    """Models that do most nearly the same."""
    head = _head(hub, owner, name, revision)
    return page(request, "similar.html", tab="similar", near=_near(hub, _reference(head), _LIKE), **_around(head))


@router.get("/m/{owner}/{name}/jobs")
def work(request: Request, hub: Reading, owner: str, name: str, revision: Ref = "") -> HTMLResponse:
    """What was done with it, and what reports say."""
    head = _head(hub, owner, name, revision)
    with hub.reading() as session:
        found = session.exec(_jobs_of(session, head.model.content.id)).all()
        jobs = [JobFacts.of(job) for job in (public_jobs(session, found) if hub.public_only else found)]
        query = select(Report).where(Report.revision_id == head.model.content.id).order_by(col(Report.id).desc())
        reports = list(session.exec(query.limit(_JOBS)))
    return page(request, "model_jobs.html", tab="jobs", jobs=jobs, reports=reports, **_around(head))


@router.get("/m/{owner}/{name}/actions")
def actions(request: Request, hub: Reading, owner: str, name: str, revision: Ref = "") -> HTMLResponse:
    """What the installed plugins can do with it."""
    head = _head(hub, owner, name, revision)
    return page(request, "actions.html", tab="actions", kinds=offered(hub), **_around(head))


def _head(hub: Hub, owner: str, name: str, revision: str) -> _Head:
    full = f"{owner}/{name}"
    return _Head(show_model(hub, model=f"{full}@{revision}" if revision else full), revision)


def _reference(head: _Head) -> str:
    return f"{head.model.name}@{head.revision}" if head.revision else head.model.name


def _around(head: _Head) -> dict[str, Any]:
    """What the head of every page of the model shows."""
    trust = head.model.content.summary.get("trust", head.model.trust)
    return {"model": head.model, "revision": head.revision, "nav": "model",
            "quarantined": "quarantined" in (head.model.trust, trust)}  # fmt: skip


def _near(hub: Hub, reference: str, limit: int) -> dict[str, Any]:
    answer = similar(hub, model=reference, limit=limit)
    return {"answer": answer, "faces": faces(hub, [hit.name for hit in answer.hits])}


def _painted(hub: Hub, reference: str) -> list[dict[str, Any]]:
    return [
        {**preview.model_dump(), "url": picture_url(preview.job) if preview.picture else None}
        for preview in list_previews(hub, model=reference)
    ]


def _family(hub: Hub, reference: str) -> dict[str, Any]:
    """The family's picture, and the founder of the model's tree where the lineage does not say it."""
    with hub.reading() as session:
        model, revision = find(session, reference), find_revision(session, reference)
        drawn = tree(session, revision)
        founder = _founder(session, model)
    known = {parent.name for parent in drawn.parents}
    reason = model.tree_reason or {}
    said = f"by its tree, likeness {reason['score']:.2f}" if isinstance(reason.get("score"), float) else "by its tree"
    likely = [(founder, said)] if founder and founder not in known else []
    return {"svg": family_svg(drawn, likely), "likely": likely}


def _founder(session: Session, model: Model) -> str | None:
    if model.tree is None or (model.tree_reason or {}).get("by") == "family":
        return None
    root = find_root(session, model.tree)
    return None if root is None or root.id == model.id else root.name


def _jobs_of(session: Session, revision: int) -> Any:
    """Jobs that the revision went into, newest first."""
    postgresql = session.get_bind().dialect.name == "postgresql"
    each = func.json_array_elements_text if postgresql else func.json_each
    inputs = each(col(Job.inputs)).table_valued("value")
    used = select(inputs.c.value).where(inputs.c.value == (str(revision) if postgresql else revision)).exists()
    return select(Job).where(used).order_by(col(Job.created_at).desc()).limit(_JOBS)


def _snippets(request: Request, model: ModelDetail) -> Sequence[tuple[str, str]]:
    """How to use the model elsewhere."""
    endpoint = str(request.base_url).rstrip("/")
    name = model.name
    yaml = [("hf", f"HF_ENDPOINT={endpoint} hf download {name}"),
            ("modelgrove", f"modelgrove --hub {endpoint} show {name}")]  # fmt: skip
    weights = next((file.path for file in model.files if file.path.endswith(".safetensors")), None)
    if model.kind == "adapter" and weights:
        code = f'pipe.load_lora_weights("{name}", weight_name="{weights}")'
        return [("diffusers", f"# HF_ENDPOINT={endpoint} must be set before Python starts\n{code}"), *yaml]
    if any(file.path == "model_index.json" for file in model.files):
        code = f'from diffusers import DiffusionPipeline\n\npipe = DiffusionPipeline.from_pretrained("{name}")'
        return [("diffusers", f"# HF_ENDPOINT={endpoint} must be set before Python starts\n{code}"), *yaml]
    return yaml


@router.get("/m/{reference}")
def short(hub: Reading, reference: str) -> RedirectResponse:
    """A model by its name without an owner, or by its number."""
    with hub.reading() as session:
        return RedirectResponse(model_url(find(session, reference).name), 303)
