"""Whether a deployment's snapshots carry the weights."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0003"
down_revision = "0002"
branch_labels = None
depends_on = None


def upgrade() -> None:
    """Apply this revision."""
    op.add_column(
        "deployments",
        sa.Column("checkpoint_weights", sa.String(16), nullable=False, server_default="detached"),
    )


def downgrade() -> None:
    """Undo this revision."""
    op.drop_column("deployments", "checkpoint_weights")
