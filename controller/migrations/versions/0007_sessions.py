"""Several controllers: their sessions, who acts on which deployment, and the operations that outlive them."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0007"
down_revision = "0006"
branch_labels = None
depends_on = None


def upgrade() -> None:
    """Apply this revision."""
    op.create_table(
        "sessions",
        sa.Column("number", sa.Integer, primary_key=True, autoincrement=False),
        sa.Column("address", sa.Text, nullable=False),
        sa.Column("expire_time", sa.Double, nullable=False),
    )
    op.create_table(
        "operations",
        sa.Column("name", sa.String(127), primary_key=True),
        sa.Column("session", sa.Integer, nullable=False),
        sa.Column("done", sa.Boolean, nullable=False),
        sa.Column("update_time", sa.Double, nullable=False),
        sa.Column("content", sa.LargeBinary, nullable=False),
    )
    op.add_column("controller", sa.Column("revision", sa.Integer, nullable=False, server_default="0"))
    op.add_column("deployments", sa.Column("holder", sa.Integer, nullable=False, server_default="0"))


def downgrade() -> None:
    """Undo this revision."""
    op.drop_column("deployments", "holder")
    op.drop_column("controller", "revision")
    for table in ("operations", "sessions"):
        op.drop_table(table)
