"""The service: tokens expire, and what was answered to a POST with a key is kept for a day."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0006"
down_revision = "0005"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.add_column("token", sa.Column("expires_at", sa.DateTime(timezone=True), nullable=True))
    op.create_table(
        "given_answer",
        sa.Column("caller", sa.String, primary_key=True),
        sa.Column("key", sa.String(200), primary_key=True),
        sa.Column("request", sa.String(64), nullable=False),
        sa.Column("answer", sa.JSON, nullable=True),
        sa.Column("created_at", sa.DateTime(timezone=True), nullable=False),
    )
    op.create_index("ix_given_answer_created_at", "given_answer", ["created_at"])


def downgrade() -> None:
    op.drop_table("given_answer")
    op.drop_column("token", "expires_at")
