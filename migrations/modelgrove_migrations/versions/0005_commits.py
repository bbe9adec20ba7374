"""Commits, branches and tags; private models. What there is becomes a chain of commits on `main`, by age."""

from __future__ import annotations

import hashlib

import sqlalchemy as sa
from alembic import op

revision = "0005"
down_revision = "0004"
branch_labels = None
depends_on = None

_BATCH = 1000
_COMMIT = sa.table(
    "model_commit",
    sa.column("id"), sa.column("model_id"), sa.column("revision_id"), sa.column("parent_id"), sa.column("title"),
    sa.column("message"), sa.column("author"), sa.column("created_at"),
)  # fmt: skip
_REF = sa.table(
    "model_ref", sa.column("model_id"), sa.column("kind"), sa.column("name"), sa.column("commit_id")
)  # fmt: skip
_REVISION = sa.table(
    "revision", sa.column("id"), sa.column("model_id"), sa.column("digest"), sa.column("created_at")
)  # fmt: skip


def upgrade() -> None:
    op.add_column("model", sa.Column("private", sa.Boolean, nullable=False, server_default=sa.false()))
    op.create_table(
        "model_commit",
        sa.Column("id", sa.String(40), primary_key=True),
        sa.Column("model_id", sa.Integer, nullable=False),
        sa.Column("revision_id", sa.Integer, nullable=False),
        sa.Column("parent_id", sa.String(40), nullable=True),
        sa.Column("title", sa.String, nullable=False),
        sa.Column("message", sa.Text, nullable=False),
        sa.Column("author", sa.String, nullable=False),
        sa.Column("created_at", sa.DateTime(timezone=True), nullable=False),
        sa.ForeignKeyConstraint(["model_id"], ["model.id"], name="fk_model_commit_model_id", ondelete="CASCADE"),
        sa.ForeignKeyConstraint(
            ["revision_id"], ["revision.id"], name="fk_model_commit_revision_id", ondelete="CASCADE"
        ),
    )
    op.create_index("ix_model_commit_model_id", "model_commit", ["model_id"])
    op.create_index("ix_model_commit_revision_id", "model_commit", ["revision_id"])
    op.create_table(
        "model_ref",
        sa.Column("model_id", sa.Integer, primary_key=True),
        sa.Column("kind", sa.String, primary_key=True),
        sa.Column("name", sa.String(250), primary_key=True),
        sa.Column("commit_id", sa.String(40), nullable=False),
        sa.ForeignKeyConstraint(["model_id"], ["model.id"], name="fk_model_ref_model_id", ondelete="CASCADE"),
        sa.ForeignKeyConstraint(["commit_id"], ["model_commit.id"], name="fk_model_ref_commit_id", ondelete="CASCADE"),
    )
    op.create_index("ix_model_ref_commit_id", "model_ref", ["commit_id"])
    _chain(op.get_bind())


def downgrade() -> None:
    op.drop_table("model_ref")
    op.drop_table("model_commit")
    op.drop_column("model", "private")


def _chain(bind: sa.Connection) -> None:
    heads: dict[int, str] = {}
    commits: list[dict[str, object]] = []
    query = sa.select(_REVISION).order_by(_REVISION.c.id)
    for number, model, digest, created in bind.execute(query).all():
        parent = heads.get(model)
        heads[model] = hashlib.sha1(f"{model}:{parent}:{digest}".encode(), usedforsecurity=False).hexdigest()
        commits.append(
            {"id": heads[model], "model_id": model, "revision_id": number, "parent_id": parent,
             "title": "Next version" if parent else "First version", "message": "", "author": "", "created_at": created}
        )  # fmt: skip
    refs = [{"model_id": model, "kind": "branch", "name": "main", "commit_id": head} for model, head in heads.items()]
    for table, rows in ((_COMMIT, commits), (_REF, refs)):
        for start in range(0, len(rows), _BATCH):
            bind.execute(sa.insert(table), rows[start : start + _BATCH])
