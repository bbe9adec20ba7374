"""Shared bases: the seed and size of each tree's basis, and which concept has which of its columns."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0003"
down_revision = "0002"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.create_table(
        "basis",
        sa.Column("tree", sa.String(260), primary_key=True),
        sa.Column("seed", sa.BigInteger, nullable=False),
        sa.Column("columns", sa.Integer, nullable=False),
        sa.Column("created_at", sa.DateTime(timezone=True), nullable=False),
    )
    op.create_table(
        "basis_range",
        sa.Column("tree", sa.String(260), primary_key=True),
        sa.Column("concept", sa.String(200), primary_key=True),
        sa.Column("start", sa.Integer, nullable=False),
        sa.Column("rank", sa.Integer, nullable=False),
        sa.Column("created_at", sa.DateTime(timezone=True), nullable=False),
        sa.ForeignKeyConstraint(["tree"], ["basis.tree"], name="fk_basis_range_tree", ondelete="CASCADE"),
        sa.UniqueConstraint("tree", "start", name="uq_basis_range_tree_start"),
    )


def downgrade() -> None:
    op.drop_table("basis_range")
    op.drop_table("basis")
