"""What is said of things, in the shapes that the API answers and `--json` prints."""

from __future__ import annotations

from datetime import datetime
from typing import Any

from pydantic import BaseModel, ConfigDict

from modelgrove_hub.registry.lineage import Link
from modelgrove_hub.tables import Job, JobState, Model, Revision


class Facts(BaseModel):
    """Base of all shapes: read from rows, never changed."""

    model_config = ConfigDict(from_attributes=True, frozen=True)


class ModelFacts(Facts):
    """A model, in a line of a list."""

    id: int
    name: str
    kind: str
    family: str
    adapter_type: str | None
    declared_base: str | None
    tree: str | None
    licence: str | None
    tags: list[str]
    trust: str
    private: bool
    size: int
    """Bytes of all files."""
    parameters: int
    revision: str
    """Digest of the newest content."""
    created_at: datetime
    updated_at: datetime

    @classmethod
    def of(cls, model: Model, revision: Revision) -> ModelFacts:
        """The facts of a model whose newest content is `revision`."""
        content = {"size": revision.size, "parameters": revision.parameters, "revision": revision.digest}
        return cls.model_validate({**model.model_dump(), **content})


class FileFacts(Facts):
    """A file of a revision."""

    path: str
    size: int
    sha256: str
    place: str | None
    """Where it is referenced; None for a file of the store."""


class LinkFacts(Facts):
    """A step in the lineage, towards a parent or a child."""

    name: str
    revision: str
    relation: str
    inferred: bool
    """Found in the weights; otherwise a card or a job declared it."""
    score: float
    evidence: dict[str, Any]
    text: str
    """The step in words."""

    @classmethod
    def of(cls, link: Link) -> LinkFacts:
        """The facts of a link."""
        edge = link.edge
        return cls(
            name=link.model.name, revision=link.revision.digest, relation=edge.relation, inferred=edge.inferred,
            score=edge.score, evidence=edge.evidence, text=link.describe(),
        )  # fmt: skip


class RevisionFacts(Facts):
    """One content of a model."""

    id: int
    digest: str
    weights_hash: str | None
    values_hash: str | None
    inventory_hash: str | None
    parameters: int
    size: int
    summary: dict[str, Any]
    """What recognition found: variant, ranks, targets, dtypes, reasons."""
    created_at: datetime


class ModelDetail(ModelFacts):
    """Everything known about a model."""

    tree_reason: dict[str, Any] | None
    card: str
    looks_like: list[str]
    """The words that its weights say, the best first."""
    content: RevisionFacts
    files: list[FileFacts]
    parents: list[LinkFacts]
    children: list[LinkFacts]
    attestations: dict[str, list[str]]
    """The sha256 of documents about it, by kind."""


class JobFacts(Facts):
    """A job, without its log."""

    id: str
    plugin: str
    params: dict[str, Any]
    inputs: list[int]
    target: str | None
    idempotency_key: str
    queue: str
    state: JobState
    attempts: int
    cancel_requested: bool
    progress: float
    message: str
    outputs: dict[str, Any]
    error: str | None
    created_at: datetime
    started_at: datetime | None
    finished_at: datetime | None

    @classmethod
    def of(cls, job: Job) -> JobFacts:
        """The facts of a row."""
        return cls.model_validate(job)
