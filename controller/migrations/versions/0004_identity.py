"""Which controller this is, and which deployment each of its snapshots belongs to."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0004"
down_revision = "0003"
branch_labels = None
depends_on = None


def upgrade() -> None:
    """Apply this revision."""
    op.create_table(
        "controller",
        sa.Column("id", sa.String(63), primary_key=True),
        sa.Column("starts", sa.Integer, nullable=False),
    )
    op.add_column("captured", sa.Column("deployment_uid", sa.String(36), nullable=False, server_default=""))
    op.add_column("captured", sa.Column("adopt_time", sa.Double, nullable=False, server_default="0"))
    op.add_column("captured", sa.Column("node", sa.String(63), nullable=False, server_default=""))
    op.execute(
        "UPDATE captured SET deployment_uid = COALESCE("
        "(SELECT uid FROM deployments WHERE deployments.id = captured.deployment), '')"
    )
    # Snapshots of deployments that are gone become orphans, so that they are kept.
    op.execute("DELETE FROM captured WHERE deployment_uid = ''")


def downgrade() -> None:
    """Undo this revision."""
    for column in ("node", "adopt_time", "deployment_uid"):
        op.drop_column("captured", column)
    op.drop_table("controller")
