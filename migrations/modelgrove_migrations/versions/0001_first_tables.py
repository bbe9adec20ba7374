"""First tables: models, revisions, blobs, edges, jobs, experts, embeddings, reports, sources, tokens, events."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0001"
down_revision = None
branch_labels = None
depends_on = None


def upgrade() -> None:
    _create_models()
    _create_lineage()
    _create_jobs()
    _create_search()
    _create_the_rest()


def downgrade() -> None:
    for table in ("event", "token", "source", "report", "embedding", "expert", "job", "edge"):
        op.drop_table(table)
    for table in ("revision_file", "revision", "blob", "model"):
        op.drop_table(table)


def _create_models() -> None:
    op.create_table(
        "model",
        _id(),
        _text("name", 193),
        _text("kind"),
        _text("family"),
        _text("adapter_type", nullable=True),
        _text("declared_base", nullable=True),
        sa.Column("inferred_parent_id", sa.Integer, nullable=True),
        _text("licence", nullable=True),
        _json("tags"),
        sa.Column("card", sa.Text, nullable=False),
        _text("trust"),
        _time("created_at"),
        _time("updated_at"),
        _points("model", "inferred_parent_id", "model.id"),
        sqlite_autoincrement=True,  # a removed model's id must never name another model
    )
    _index("model", "name", unique=True)
    _index("model", "kind", "family", "adapter_type", "trust", "created_at")
    op.create_table(
        "blob",
        sa.Column("sha256", sa.String(64), primary_key=True),
        _long("size"),
        _text("path", nullable=True),
        _long("mtime_ns", nullable=True),
        _time("created_at"),
    )
    op.create_table(
        "revision",
        _id(),
        sa.Column("model_id", sa.Integer, nullable=False),
        _text("digest", 64),
        _text("weights_hash", 64, nullable=True),
        _text("values_hash", 64, nullable=True),
        _text("inventory_hash", 64, nullable=True),
        _long("parameters"),
        _long("size"),
        _json("summary"),
        _time("created_at"),
        _points("revision", "model_id", "model.id", "CASCADE"),
        _unique("revision", "model_id", "digest"),
        sqlite_autoincrement=True,  # jobs and the FAISS index keep revision ids
    )
    _index("revision", "model_id", "digest", "weights_hash", "values_hash", "inventory_hash", "created_at")
    op.create_table(
        "revision_file",
        sa.Column("revision_id", sa.Integer, primary_key=True),
        sa.Column("path", sa.String(1024), primary_key=True),
        _text("sha256"),
        _text("manifest", nullable=True),
        _points("revision_file", "revision_id", "revision.id", "CASCADE"),
        _points("revision_file", "sha256", "blob.sha256"),
        _points("revision_file", "manifest", "blob.sha256"),
    )
    _index("revision_file", "sha256", "manifest")


def _create_lineage() -> None:
    op.create_table(
        "edge",
        _id(),
        sa.Column("child_id", sa.Integer, nullable=False),
        sa.Column("parent_id", sa.Integer, nullable=False),
        _text("relation"),
        sa.Column("inferred", sa.Boolean, nullable=False),
        sa.Column("score", sa.Float, nullable=False),
        _json("evidence"),
        _time("created_at"),
        _points("edge", "child_id", "revision.id", "CASCADE"),
        _points("edge", "parent_id", "revision.id", "CASCADE"),
        _unique("edge", "child_id", "parent_id", "relation", "inferred"),
    )
    _index("edge", "child_id", "parent_id")


def _create_jobs() -> None:
    op.create_table(
        "job",
        sa.Column("id", sa.String(32), primary_key=True),
        _text("plugin"),
        _json("params"),
        _json("inputs"),
        _text("target", nullable=True),
        _text("idempotency_key", 200),
        _text("queue"),
        _text("state"),
        sa.Column("attempts", sa.Integer, nullable=False),
        _text("owner", nullable=True),
        _time("lease_until", nullable=True),
        _time("not_before"),
        _time("published_at", nullable=True),
        sa.Column("cancel_requested", sa.Boolean, nullable=False),
        sa.Column("progress", sa.Float, nullable=False),
        _text("message"),
        sa.Column("log", sa.Text, nullable=False),
        _json("outputs"),
        sa.Column("error", sa.Text, nullable=True),
        _time("created_at"),
        _time("started_at", nullable=True),
        _time("finished_at", nullable=True),
    )
    _index("job", "idempotency_key", unique=True)
    _index("job", "plugin", "state", "lease_until", "not_before", "created_at")


def _create_search() -> None:
    op.create_table(
        "expert",
        _id(),
        _text("tree"),
        _text("encoder"),
        sa.Column("version", sa.Integer, nullable=False),
        _text("text_space"),
        _text("blob"),
        _json("layers"),
        _json("calibration"),
        _json("metrics"),
        _time("created_at"),
        _points("expert", "blob", "blob.sha256"),
        _unique("expert", "tree", "encoder", "version"),
    )
    _index("expert", "tree")
    op.create_table(
        "embedding",
        _id(),
        sa.Column("revision_id", sa.Integer, nullable=False),
        _text("side"),
        _text("text_space"),
        sa.Column("expert_id", sa.Integer, nullable=True),
        sa.Column("vector", sa.LargeBinary, nullable=False),
        _time("created_at"),
        _points("embedding", "revision_id", "revision.id", "CASCADE"),
        _points("embedding", "expert_id", "expert.id", "CASCADE"),
        _unique("embedding", "revision_id", "side", "text_space"),
    )
    _index("embedding", "revision_id", "expert_id")


def _create_the_rest() -> None:
    op.create_table(
        "report",
        _id(),
        sa.Column("revision_id", sa.Integer, nullable=False),
        _text("analyzer"),
        _text("version"),
        _text("params_hash", 64),
        _json("body"),
        _time("created_at"),
        _points("report", "revision_id", "revision.id", "CASCADE"),
        _unique("report", "revision_id", "analyzer", "version", "params_hash"),
    )
    _index("report", "revision_id")
    op.create_table(
        "source",
        _id(),
        _text("name"),
        _text("plugin"),
        _text("url"),
        _text("schedule"),
        _json("cursor"),
        sa.Column("paused", sa.Boolean, nullable=False),
        _time("next_run", nullable=True),
        _time("created_at"),
        _unique("source", "name"),
    )
    _index("source", "next_run")
    op.create_table(
        "token",
        _id(),
        _text("name"),
        _text("hash", 64),
        _json("scopes"),
        _time("created_at"),
        _time("revoked_at", nullable=True),
        _unique("token", "name"),
        _unique("token", "hash"),
    )
    op.create_table("event", _id(), _time("at"), _text("action"), _text("subject"), _json("detail"))
    _index("event", "at", "action", "subject")


def _id() -> sa.Column[int]:
    return sa.Column("id", sa.Integer, primary_key=True)


def _text(name: str, length: int | None = None, *, nullable: bool = False) -> sa.Column[str]:
    return sa.Column(name, sa.String(length), nullable=nullable)


def _long(name: str, *, nullable: bool = False) -> sa.Column[int]:
    return sa.Column(name, sa.BigInteger, nullable=nullable)


def _json(name: str) -> sa.Column[object]:
    return sa.Column(name, sa.JSON, nullable=False)


def _time(name: str, *, nullable: bool = False) -> sa.Column[object]:
    return sa.Column(name, sa.DateTime(timezone=True), nullable=nullable)


def _points(table: str, column: str, target: str, ondelete: str | None = None) -> sa.ForeignKeyConstraint:
    return sa.ForeignKeyConstraint([column], [target], name=f"fk_{table}_{column}", ondelete=ondelete)


def _unique(table: str, *columns: str) -> sa.UniqueConstraint:
    return sa.UniqueConstraint(*columns, name=f"uq_{table}_{'_'.join(columns)}")


def _index(table: str, *columns: str, unique: bool = False) -> None:
    for column in columns:
        op.create_index(f"ix_{table}_{column}", table, [column], unique=unique)
