"""The data model. Everything that must survive is in these rows or in the blob store.

Times are UTC. Ids of models and revisions are integers (FAISS uses revision ids), ids of
jobs are random text, so that a client can make one up and retry safely.
"""

from __future__ import annotations  # noqa: I001  (sqlalchemy's names in one line)

from datetime import UTC, datetime
from enum import StrEnum
from typing import Any, ClassVar

from sqlalchemy import (
    JSON, BigInteger, Column, DateTime, Dialect, Index, LargeBinary, Text, TypeDecorator, UniqueConstraint, false,
)  # fmt: skip
from sqlmodel import Field, SQLModel


def now() -> datetime:
    """The present, in UTC."""
    return datetime.now(UTC)


class ModelKind(StrEnum):
    """What a model is, coarsely."""

    CHECKPOINT = "checkpoint"
    COMPONENT = "component"
    ADAPTER = "adapter"
    EMBEDDING = "embedding"
    UNKNOWN = "unknown"


NETWORKS = (ModelKind.CHECKPOINT, ModelKind.COMPONENT, ModelKind.UNKNOWN)
"""Kinds of models that are a whole network, or may be one."""


class Trust(StrEnum):
    """How far a model's files may be used. Quarantined files are listed and hashed, never loaded."""

    OK = "ok"
    QUARANTINED = "quarantined"


class Relation(StrEnum):
    """How a child came from its parent."""

    FINETUNE = "finetune"
    ADAPTER = "adapter"
    QUANTIZED = "quantized"
    MERGE = "merge"
    COPY = "copy"
    EDIT = "edit"
    DISTILLED = "distilled"


class JobState(StrEnum):
    """A job's life: queued → running → done, failed or cancelled. Only the last three are final."""

    QUEUED = "queued"
    RUNNING = "running"
    DONE = "done"
    FAILED = "failed"
    CANCELLED = "cancelled"


class UtcDateTime(TypeDecorator[datetime]):
    """A moment in UTC. SQLite keeps no time zone, so it is put back on reading."""

    impl = DateTime(timezone=True)
    cache_ok = True

    def process_result_value(self, value: datetime | None, dialect: Dialect) -> datetime | None:  # noqa: ARG002
        """The stored moment with its time zone."""
        return value.replace(tzinfo=UTC) if value is not None and value.tzinfo is None else value


def _time(*, index: bool = False, nullable: bool = False) -> Any:
    return Column(UtcDateTime, nullable=nullable, index=index)


class Model(SQLModel, table=True):
    """A named model; what it holds is in its revisions."""

    __tablename__: ClassVar[str] = "model"
    __table_args__ = ({"sqlite_autoincrement": True},)  # an id is never given twice

    id: int | None = Field(default=None, primary_key=True)
    name: str = Field(unique=True, index=True, max_length=193)
    kind: str = Field(default=ModelKind.UNKNOWN, index=True)
    family: str = Field(default="unknown", index=True)
    adapter_type: str | None = Field(default=None, index=True)
    declared_base: str | None = None
    tree: str | None = Field(default=None, index=True, max_length=260)
    """What shares one base network: the family's name, or family:founder for a further one; see `registry.trees`."""
    tree_reason: dict[str, Any] | None = Field(default=None, sa_column=Column(JSON, nullable=True))
    inferred_parent_id: int | None = Field(default=None, foreign_key="model.id")
    licence: str | None = None
    tags: list[str] = Field(default_factory=list, sa_column=Column(JSON, nullable=False))
    card: str = Field(default="", sa_column=Column(Text, nullable=False))
    trust: str = Field(default=Trust.OK, index=True)
    private: bool = Field(default=False, sa_column_kwargs={"server_default": false()})
    """Shown over HTTP to those with a token only."""
    created_at: datetime = Field(default_factory=now, sa_column=_time(index=True))
    updated_at: datetime = Field(default_factory=now, sa_column=_time())


class Blob(SQLModel, table=True):
    """A stored or referenced file. `path` is set when the file is referenced where it lies."""

    __tablename__: ClassVar[str] = "blob"
    __table_args__ = (Index("ix_blob_path", "path", postgresql_using="hash"),)

    sha256: str = Field(primary_key=True, max_length=64)
    size: int = Field(sa_column=Column(BigInteger, nullable=False))
    path: str | None = None
    mtime_ns: int | None = Field(default=None, sa_column=Column(BigInteger, nullable=True))
    created_at: datetime = Field(default_factory=now, sa_column=_time())


class Revision(SQLModel, table=True):
    """An immutable list of files, identified by `digest`, the sha256 of its sorted (path, sha256) lines."""

    __tablename__: ClassVar[str] = "revision"
    __table_args__ = (UniqueConstraint("model_id", "digest"), {"sqlite_autoincrement": True})

    id: int | None = Field(default=None, primary_key=True)
    model_id: int = Field(foreign_key="model.id", index=True, ondelete="CASCADE")
    digest: str = Field(index=True, max_length=64)
    weights_hash: str | None = Field(default=None, index=True, max_length=64)
    values_hash: str | None = Field(default=None, index=True, max_length=64)
    inventory_hash: str | None = Field(default=None, index=True, max_length=64)
    parameters: int = Field(default=0, sa_column=Column(BigInteger, nullable=False))
    size: int = Field(default=0, sa_column=Column(BigInteger, nullable=False))
    summary: dict[str, Any] = Field(default_factory=dict, sa_column=Column(JSON, nullable=False))
    created_at: datetime = Field(default_factory=now, sa_column=_time(index=True))


class RefKind(StrEnum):
    """What names a commit: a branch moves with what is committed, a tag stays."""

    BRANCH = "branch"
    TAG = "tag"


class Commit(SQLModel, table=True):
    """That a revision became the head of a branch, after the commit `parent_id`; see `registry.commits`."""

    __tablename__: ClassVar[str] = "model_commit"

    id: str = Field(primary_key=True, max_length=40)
    model_id: int = Field(foreign_key="model.id", index=True, ondelete="CASCADE")
    revision_id: int = Field(foreign_key="revision.id", index=True, ondelete="CASCADE")
    parent_id: str | None = Field(default=None, max_length=40)
    title: str
    message: str = Field(default="", sa_column=Column(Text, nullable=False))
    author: str = ""
    created_at: datetime = Field(default_factory=now, sa_column=_time())


class Ref(SQLModel, table=True):
    """A branch or tag of a model. `main` is what the hub shows of it."""

    __tablename__: ClassVar[str] = "model_ref"

    model_id: int = Field(foreign_key="model.id", primary_key=True, ondelete="CASCADE")
    kind: str = Field(primary_key=True)
    name: str = Field(primary_key=True, max_length=250)
    commit_id: str = Field(foreign_key="model_commit.id", index=True, max_length=40, ondelete="CASCADE")


class RevisionFile(SQLModel, table=True):
    """One file of a revision. `manifest` names the blob that lists the file's tensors."""

    __tablename__: ClassVar[str] = "revision_file"

    revision_id: int = Field(foreign_key="revision.id", primary_key=True, ondelete="CASCADE")
    path: str = Field(primary_key=True, max_length=1024)
    sha256: str = Field(foreign_key="blob.sha256", index=True)
    manifest: str | None = Field(default=None, foreign_key="blob.sha256", index=True)


class AttestationKind(StrEnum):
    """What a document says of a revision: how it was made, or that someone answers for its bytes."""

    PROVENANCE = "provenance"
    SIGNATURE = "signature"


class Attestation(SQLModel, table=True):
    """A document about a revision, kept as a blob beside its files: no part of its digest."""

    __tablename__: ClassVar[str] = "attestation"

    revision_id: int = Field(foreign_key="revision.id", primary_key=True, ondelete="CASCADE")
    kind: str = Field(primary_key=True)
    sha256: str = Field(foreign_key="blob.sha256", primary_key=True, index=True)
    created_at: datetime = Field(default_factory=now, sa_column=_time())


class Sketch(SQLModel, table=True):
    """Which outputs a revision's weights move (`formats.outputs`): tells to which tree it belongs."""

    __tablename__: ClassVar[str] = "sketch"

    revision_id: int = Field(foreign_key="revision.id", primary_key=True, ondelete="CASCADE")
    outputs: bytes = Field(sa_column=Column(LargeBinary, nullable=False))


class Edge(SQLModel, table=True):
    """Child revision came from parent revision. Declared by a card or a job, or inferred from weights."""

    __tablename__: ClassVar[str] = "edge"
    __table_args__ = (UniqueConstraint("child_id", "parent_id", "relation", "inferred"),)

    id: int | None = Field(default=None, primary_key=True)
    child_id: int = Field(foreign_key="revision.id", index=True, ondelete="CASCADE")
    parent_id: int = Field(foreign_key="revision.id", index=True, ondelete="CASCADE")
    relation: str
    inferred: bool = False
    score: float = 1.0
    evidence: dict[str, Any] = Field(default_factory=dict, sa_column=Column(JSON, nullable=False))
    created_at: datetime = Field(default_factory=now, sa_column=_time())


class Job(SQLModel, table=True):
    """Work to do. This row is the truth; a broker message only hints that it exists."""

    __tablename__: ClassVar[str] = "job"

    id: str = Field(primary_key=True, max_length=32)
    plugin: str = Field(index=True)
    params: dict[str, Any] = Field(default_factory=dict, sa_column=Column(JSON, nullable=False))
    inputs: list[int] = Field(default_factory=list, sa_column=Column(JSON, nullable=False))
    target: str | None = None
    idempotency_key: str = Field(unique=True, index=True, max_length=200)
    queue: str = "cpu"
    state: str = Field(default=JobState.QUEUED, index=True)
    attempts: int = 0
    owner: str | None = None
    lease_until: datetime | None = Field(default=None, sa_column=_time(index=True, nullable=True))
    not_before: datetime = Field(default_factory=now, sa_column=_time(index=True))
    published_at: datetime | None = Field(default=None, sa_column=_time(nullable=True))
    cancel_requested: bool = False
    progress: float = 0.0
    message: str = ""
    log: str = Field(default="", sa_column=Column(Text, nullable=False))
    outputs: dict[str, Any] = Field(default_factory=dict, sa_column=Column(JSON, nullable=False))
    error: str | None = Field(default=None, sa_column=Column(Text, nullable=True))
    created_at: datetime = Field(default_factory=now, sa_column=_time(index=True))
    started_at: datetime | None = Field(default=None, sa_column=_time(nullable=True))
    finished_at: datetime | None = Field(default=None, sa_column=_time(nullable=True))


class Expert(SQLModel, table=True):
    """A fitted encoder for the adapters or the checkpoints of one tree: a blob, calibration and metrics beside it."""

    __tablename__: ClassVar[str] = "expert"
    __table_args__ = (UniqueConstraint("tree", "encoder", "version"),)

    id: int | None = Field(default=None, primary_key=True)
    tree: str = Field(index=True)
    kind: str = Field(default=ModelKind.ADAPTER, sa_column_kwargs={"server_default": "adapter"})
    """Of the models that it places: adapter, or checkpoint for whole networks."""
    encoder: str
    version: int = 1
    text_space: str
    blob: str = Field(foreign_key="blob.sha256")
    layers: list[str] = Field(default_factory=list, sa_column=Column(JSON, nullable=False))
    calibration: dict[str, Any] = Field(default_factory=dict, sa_column=Column(JSON, nullable=False))
    metrics: dict[str, Any] = Field(default_factory=dict, sa_column=Column(JSON, nullable=False))
    created_at: datetime = Field(default_factory=now, sa_column=_time())


class Embedding(SQLModel, table=True):
    """A revision's vector (float32, little-endian) in a text space, made by one expert or from the card."""

    __tablename__: ClassVar[str] = "embedding"
    __table_args__ = (UniqueConstraint("revision_id", "side", "text_space"),)

    id: int | None = Field(default=None, primary_key=True)
    revision_id: int = Field(foreign_key="revision.id", index=True, ondelete="CASCADE")
    side: str
    text_space: str
    expert_id: int | None = Field(default=None, foreign_key="expert.id", index=True, ondelete="CASCADE")
    vector: bytes = Field(sa_column=Column(LargeBinary, nullable=False))
    created_at: datetime = Field(default_factory=now, sa_column=_time())


class Report(SQLModel, table=True):
    """What an analyzer found about a revision; cached by analyzer, version and parameters."""

    __tablename__: ClassVar[str] = "report"
    __table_args__ = (UniqueConstraint("revision_id", "analyzer", "version", "params_hash"),)

    id: int | None = Field(default=None, primary_key=True)
    revision_id: int = Field(foreign_key="revision.id", index=True, ondelete="CASCADE")
    analyzer: str
    version: str
    params_hash: str = Field(max_length=64)
    body: dict[str, Any] = Field(default_factory=dict, sa_column=Column(JSON, nullable=False))
    created_at: datetime = Field(default_factory=now, sa_column=_time())


class Source(SQLModel, table=True):
    """Where ingestion looks: plugin, its options, address and schedule; `cursor` tells of the last run."""

    __tablename__: ClassVar[str] = "source"

    id: int | None = Field(default=None, primary_key=True)
    name: str = Field(unique=True)
    plugin: str
    url: str
    params: dict[str, Any] = Field(default_factory=dict, sa_column=Column(JSON, nullable=True))
    schedule: str = ""
    cursor: dict[str, Any] = Field(default_factory=dict, sa_column=Column(JSON, nullable=False))
    paused: bool = False
    next_run: datetime | None = Field(default=None, sa_column=_time(index=True, nullable=True))
    created_at: datetime = Field(default_factory=now, sa_column=_time())


class SourceItem(SQLModel, table=True):
    """What a source offered under `key`, and what became of it; a model that was removed by hand leaves None."""

    __tablename__: ClassVar[str] = "source_item"

    source_id: int = Field(foreign_key="source.id", primary_key=True, ondelete="CASCADE")
    key: str = Field(primary_key=True)
    stamp: str
    model_id: int | None = Field(default=None, foreign_key="model.id", index=True, ondelete="SET NULL")
    reason: str = Field(default="", sa_column=Column(Text, nullable=False))  # of a refusal
    gone_at: datetime | None = Field(default=None, sa_column=_time(nullable=True))


class Basis(SQLModel, table=True):
    """The shared orthogonal basis of a tree, in which adapters are trained side by side (`registry.shared_bases`)."""

    __tablename__: ClassVar[str] = "basis"

    tree: str = Field(primary_key=True, max_length=260)
    seed: int = Field(sa_column=Column(BigInteger, nullable=False))
    columns: int
    """How many there are to hand out: the input width of the narrowest layer."""
    created_at: datetime = Field(default_factory=now, sa_column=_time())


class BasisRange(SQLModel, table=True):
    """Columns [start, start + rank) of a tree's basis, which one concept has in every layer. No two ranges overlap."""

    __tablename__: ClassVar[str] = "basis_range"
    __table_args__ = (UniqueConstraint("tree", "start"),)

    tree: str = Field(primary_key=True, max_length=260, foreign_key="basis.tree", ondelete="CASCADE")
    concept: str = Field(primary_key=True, max_length=200)
    start: int
    rank: int
    created_at: datetime = Field(default_factory=now, sa_column=_time())


class Token(SQLModel, table=True):
    """An API token: only its hash is kept."""

    __tablename__: ClassVar[str] = "token"

    id: int | None = Field(default=None, primary_key=True)
    name: str = Field(unique=True)
    hash: str = Field(unique=True, max_length=64)
    scopes: list[str] = Field(default_factory=list, sa_column=Column(JSON, nullable=False))
    created_at: datetime = Field(default_factory=now, sa_column=_time())
    revoked_at: datetime | None = Field(default=None, sa_column=_time(nullable=True))
    expires_at: datetime | None = Field(default=None, sa_column=_time(nullable=True))


class GivenAnswer(SQLModel, table=True):
    """What was answered to a request with an Idempotency-Key, so that sending it again does nothing again."""

    __tablename__: ClassVar[str] = "given_answer"

    caller: str = Field(primary_key=True)
    key: str = Field(primary_key=True, max_length=200)
    request: str = Field(max_length=64)
    """SHA-256 of what was asked for: another request may not have the same key."""
    answer: Any = Field(default=None, sa_column=Column(JSON(none_as_null=True), nullable=True))
    """None while it is worked on."""
    created_at: datetime = Field(default_factory=now, sa_column=_time(index=True))


class Event(SQLModel, table=True):
    """The audit trail: a hash chain, appended by `registry.events.record` alone, never changed, never removed."""

    __tablename__: ClassVar[str] = "event"

    id: int | None = Field(default=None, primary_key=True)
    at: datetime = Field(default_factory=now, sa_column=_time(index=True))
    action: str = Field(index=True)
    subject: str = Field(index=True)
    detail: dict[str, Any] = Field(default_factory=dict, sa_column=Column(JSON, nullable=False))
    previous: str = Field(index=True, unique=True, max_length=64)
    """The hash of the event before it: unique, so the chain cannot fork."""
    hash: str = Field(max_length=64)
