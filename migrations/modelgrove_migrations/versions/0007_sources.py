"""Sources fill the hub: their options, what they offered and what became of it; files are found by where they lie."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0007"
down_revision = "0006"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.add_column("source", sa.Column("params", sa.JSON, nullable=True))
    op.execute("UPDATE source SET params = '{}'")
    op.create_table(
        "source_item",
        sa.Column("source_id", sa.Integer, sa.ForeignKey("source.id", ondelete="CASCADE"), primary_key=True),
        sa.Column("key", sa.String, primary_key=True),
        sa.Column("stamp", sa.String, nullable=False),
        sa.Column("model_id", sa.Integer, sa.ForeignKey("model.id", ondelete="SET NULL"), nullable=True),
        sa.Column("reason", sa.Text, nullable=False),
        sa.Column("gone_at", sa.DateTime(timezone=True), nullable=True),
    )
    op.create_index("ix_source_item_model_id", "source_item", ["model_id"])
    # A path may be longer than a row of PostgreSQL's B-tree.
    op.create_index("ix_blob_path", "blob", ["path"], postgresql_using="hash")


def downgrade() -> None:
    op.drop_index("ix_blob_path", "blob")
    op.drop_table("source_item")
    op.drop_column("source", "params")
