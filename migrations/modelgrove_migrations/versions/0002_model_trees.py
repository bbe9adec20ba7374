"""Model trees: the tree of every model and why, sketches of outputs, and what an expert is for.

Adapters keep the tree that they had, their family; `expert route` looks at their weights, and at checkpoints.
"""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0002"
down_revision = "0001"
branch_labels = None
depends_on = None

_MODEL = sa.table("model", sa.column("kind"), sa.column("family"), sa.column("tree"), sa.column("tree_reason", sa.JSON))
_REASON = {"by": "family", "said": "the family that its modules fit; its weights were not looked at"}


def upgrade() -> None:
    op.add_column("model", sa.Column("tree", sa.String(260), nullable=True))
    op.add_column("model", sa.Column("tree_reason", sa.JSON, nullable=True))
    op.create_index("ix_model_tree", "model", ["tree"])
    op.add_column("expert", sa.Column("kind", sa.String, nullable=False, server_default="adapter"))
    op.create_table(
        "sketch",
        sa.Column("revision_id", sa.Integer, primary_key=True),
        sa.Column("outputs", sa.LargeBinary, nullable=False),
        sa.ForeignKeyConstraint(["revision_id"], ["revision.id"], name="fk_sketch_revision_id", ondelete="CASCADE"),
    )
    told = (_MODEL.c.kind == "adapter") & (_MODEL.c.family != "unknown")
    op.execute(_MODEL.update().where(told).values(tree=_MODEL.c.family, tree_reason=_REASON))


def downgrade() -> None:
    op.drop_table("sketch")
    op.drop_column("expert", "kind")
    op.drop_index("ix_model_tree", "model")
    op.drop_column("model", "tree_reason")
    op.drop_column("model", "tree")
