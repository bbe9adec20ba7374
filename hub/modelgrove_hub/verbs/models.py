"""Verbs of models: list, show, change, forget."""

from __future__ import annotations

from typing import Annotated

from pydantic import BaseModel, Field

from modelgrove_hub.hub import Hub
from modelgrove_hub.recipes import Recipe, recipe_of
from modelgrove_hub.registry import models as registry
from modelgrove_hub.registry.attestations import attestations_of
from modelgrove_hub.registry.inputs import load_input
from modelgrove_hub.registry.lineage import children, parents
from modelgrove_hub.tables import AttestationKind, Trust
from modelgrove_hub.verbs.facts import FileFacts, LinkFacts, ModelDetail, ModelFacts, RevisionFacts
from modelgrove_hub.verbs.verb import Page, verb

LONGEST_PAGE = 10_000


@verb("GET", "/models")
def list_models(
    hub: Hub, *, text: Annotated[str | None, Field(description="A part of the name.")] = None, kind: str | None = None,
    family: str | None = None, adapter_type: str | None = None, base: str | None = None, licence: str | None = None,
    tag: str | None = None, trust: Trust | None = None,
    limit: Annotated[int, Field(ge=1, le=LONGEST_PAGE)] = 50,
    after: Annotated[str | None, Field(description="`next` of the page before.", pattern=r"^\d{1,18}$")] = None,
) -> Page[ModelFacts]:  # fmt: skip
    """Models that fit every filter, newest first."""
    with hub.reading() as session:
        found = registry.list_models(
            session, text=text, kind=kind, family=family, adapter_type=adapter_type, base=base, licence=licence,
            tag=tag, trust=trust, limit=limit + 1, after=int(after) if after else None,
        )  # fmt: skip
        shown = found[:limit]
        revisions = registry.revisions_shown(session, shown)
        items = [ModelFacts.of(model, revisions[model.id]) for model in shown if model.id in revisions]
    return Page[ModelFacts](items=items, next=str(shown[-1].id) if len(found) > limit else None)


@verb("GET", "/models/{model:path}")
def show_model(hub: Hub, *, model: str) -> ModelDetail:
    """Everything known about one model.

    Raises:
        NotFoundError: there is none.
        UsageError: several are called so.
    """
    from modelgrove_hub.search.query import looks_like

    with hub.reading() as session:
        row, revision = registry.find(session, model), registry.find_revision(session, model)
        number = revision.id or 0
        facts = {
            **ModelFacts.of(row, revision).model_dump(),
            "tree_reason": row.tree_reason,
            "card": row.card,
            "content": RevisionFacts.model_validate(revision),
            "files": [FileFacts(**file) for file in registry.files_of(session, revision)],
            "parents": [LinkFacts.of(link) for link in parents(session, revision)],
            "children": [LinkFacts.of(link) for link in children(session, revision)],
            "attestations": {str(kind): attestations_of(session, number, kind) for kind in AttestationKind},
        }
    return ModelDetail(**facts, looks_like=list(looks_like(hub, number)))


class Document(BaseModel):
    """A document about a model, as it was kept."""

    sha256: str
    text: str


@verb("GET", "/documents/{model:path}")
def list_documents(
    hub: Hub, *, model: str, kind: AttestationKind = AttestationKind.PROVENANCE
) -> list[Document]:  # fmt: skip
    """Documents of a kind about a model, newest first: in-toto statements of jobs, or signatures.

    Raises:
        NotFoundError, UsageError: as `show_model`.
    """
    with hub.reading() as session:
        revision = registry.find_revision(session, model)
        found = attestations_of(session, revision.id or 0, kind)
    documents = []
    for sha256 in found:
        with hub.store.open(sha256) as file:
            documents.append(Document(sha256=sha256, text=file.read().decode("utf-8", "replace")))
    return documents


@verb("GET", "/recipes/{model:path}")
def show_recipe(hub: Hub, *, model: str) -> Recipe:
    """How a model was merged.

    Raises:
        NotFoundError, UsageError: as `show_model`.
        DataError: it was not merged here, or its files are not there.
    """
    with hub.reading() as session:
        revision = registry.find_revision(session, model).id or 0
    source = load_input(hub, revision)
    return recipe_of(source.metadata(), source.name)


class Choice(BaseModel):
    """Which models."""

    models: list[str] = Field(min_length=1, max_length=LONGEST_PAGE)
    dry_run: bool = False
    """Only say what would be done."""


class Removed(BaseModel):
    """Models that were forgotten, or would be."""

    names: list[str]


@verb("POST", "/models/remove", "write")
def remove_models(hub: Hub, *, choice: Choice) -> Removed:
    """Forget models, all or none of them. Files stay until garbage collection, or where they lie.

    Raises:
        NotFoundError, UsageError: as `show_model`.
        ConflictError: a job that has not ended needs one of them.
    """
    with hub.transaction() as session:
        names = list(dict.fromkeys(registry.find(session, model).name for model in choice.models))
        for name in [] if choice.dry_run else names:
            registry.remove(session, name)
    return Removed(names=names)


@verb("DELETE", "/models/{model:path}", "write")
def remove_model(hub: Hub, *, model: str) -> Removed:
    """Forget a model, or with "@" one revision of it.

    Raises:
        NotFoundError, UsageError, ConflictError: as `remove_models`.
    """
    with hub.transaction() as session:
        return Removed(names=[registry.remove(session, model)])
