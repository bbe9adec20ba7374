"""Integrity: events become a hash chain, those that are there in the order of their ids; documents about revisions."""

from __future__ import annotations

import hashlib
import json
from datetime import UTC, datetime
from typing import Any

import sqlalchemy as sa
from alembic import op

revision = "0004"
down_revision = "0003"
branch_labels = None
depends_on = None

_EVENT = sa.table(
    "event",
    sa.column("id", sa.Integer),
    sa.column("at", sa.DateTime(timezone=True)),
    sa.column("action", sa.String),
    sa.column("subject", sa.String),
    sa.column("detail", sa.JSON),
    sa.column("previous", sa.String),
    sa.column("hash", sa.String),
)
_START = "0" * 64
_BATCH = 1000


def upgrade() -> None:
    op.add_column("event", sa.Column("previous", sa.String(64), nullable=True))
    op.add_column("event", sa.Column("hash", sa.String(64), nullable=True))
    _chain(op.get_bind())
    with op.batch_alter_table("event") as batch:
        batch.alter_column("previous", existing_type=sa.String(64), nullable=False)
        batch.alter_column("hash", existing_type=sa.String(64), nullable=False)
    op.create_index("ix_event_previous", "event", ["previous"], unique=True)
    op.create_table(
        "attestation",
        sa.Column("revision_id", sa.Integer, primary_key=True),
        sa.Column("kind", sa.String, primary_key=True),
        sa.Column("sha256", sa.String, primary_key=True),
        sa.Column("created_at", sa.DateTime(timezone=True), nullable=False),
        sa.ForeignKeyConstraint(
            ["revision_id"], ["revision.id"], name="fk_attestation_revision_id", ondelete="CASCADE"
        ),
        sa.ForeignKeyConstraint(["sha256"], ["blob.sha256"], name="fk_attestation_sha256"),
    )
    op.create_index("ix_attestation_sha256", "attestation", ["sha256"])


def downgrade() -> None:
    op.drop_table("attestation")
    op.drop_index("ix_event_previous", "event")
    op.drop_column("event", "hash")
    op.drop_column("event", "previous")
    if op.get_bind().dialect.name == "postgresql":
        # Events of a chain were given their ids; those of the older schema come from the sequence.
        op.execute(
            "SELECT setval(pg_get_serial_sequence('event', 'id'), (SELECT coalesce(max(id), 0) + 1 FROM event), false)"
        )


def _chain(connection: sa.Connection) -> None:
    previous, done = _START, -1
    fields = [_EVENT.c[name] for name in ("id", "at", "action", "subject", "detail")]
    some = sa.select(*fields).order_by(_EVENT.c.id).limit(_BATCH)
    write = (
        sa.update(_EVENT)
        .where(_EVENT.c.id == sa.bindparam("number"))
        .values(previous=sa.bindparam("before"), hash=sa.bindparam("own"))
    )
    while rows := connection.execute(some.where(_EVENT.c.id > done)).all():
        changes = []
        for row in rows:
            own = _hash({**row._mapping, "at": _utc(row.at), "previous": previous})
            changes.append({"number": row.id, "before": previous, "own": own})
            previous, done = own, row.id
        connection.execute(write, changes)


def _utc(at: datetime) -> str:
    aware = at.replace(tzinfo=UTC) if at.tzinfo is None else at
    return aware.astimezone(UTC).isoformat(timespec="microseconds")


def _hash(fields: dict[str, Any]) -> str:
    text = json.dumps(fields, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()
