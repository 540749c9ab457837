"""The priority of a deployment, how many instances it may have, and how large its model is."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0005"
down_revision = "0004"
branch_labels = None
depends_on = None


def upgrade() -> None:
    """Apply this revision."""
    op.add_column("deployments", sa.Column("priority", sa.Integer, nullable=False, server_default="0"))
    op.add_column("deployments", sa.Column("min_instances", sa.Integer))
    op.add_column("deployments", sa.Column("max_instances", sa.Integer))
    op.add_column(
        "deployments", sa.Column("weights_bytes", sa.BigInteger, nullable=False, server_default="0")
    )


def downgrade() -> None:
    """Undo this revision."""
    for column in ("weights_bytes", "max_instances", "min_instances", "priority"):
        op.drop_column("deployments", column)
