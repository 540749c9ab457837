"""Where a deployment's snapshots are kept, and the manifest digest of every snapshot made."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0002"
down_revision = "0001"
branch_labels = None
depends_on = None


def upgrade() -> None:
    """Apply this revision."""
    op.add_column(
        "deployments",
        sa.Column("checkpoint_storage", sa.String(16), nullable=False, server_default="local"),
    )
    op.create_table(
        "captured",
        sa.Column("id", sa.String(63), primary_key=True),
        sa.Column("deployment", sa.String(63), nullable=False),
        sa.Column("manifest_digest", sa.String(64), nullable=False),
    )


def downgrade() -> None:
    """Undo this revision."""
    op.drop_table("captured")
    op.drop_column("deployments", "checkpoint_storage")
