"""The arguments of a deployment's engine."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0006"
down_revision = "0005"
branch_labels = None
depends_on = None


def upgrade() -> None:
    """Apply this revision."""
    op.add_column("deployments", sa.Column("engine_options", sa.JSON, nullable=False, server_default="{}"))


def downgrade() -> None:
    """Undo this revision."""
    op.drop_column("deployments", "engine_options")
