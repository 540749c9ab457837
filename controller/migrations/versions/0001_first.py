"""Deployments, their last use, nodes and intents."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0001"
down_revision = None
branch_labels = None
depends_on = None


def upgrade() -> None:
    """Apply this revision."""
    op.create_table(
        "deployments",
        sa.Column("id", sa.String(63), primary_key=True),
        sa.Column("uid", sa.String(36), nullable=False),
        sa.Column("model", sa.Text, nullable=False),
        sa.Column("engine", sa.String(63), nullable=False),
        sa.Column("start_mode", sa.String(16), nullable=False),
        sa.Column("checkpoint_enabled", sa.Boolean, nullable=False),
        sa.Column("checkpoint_ttl", sa.Double),
        sa.Column("idle_timeout", sa.Double),
        sa.Column("park_timeout", sa.Double),
        sa.Column("create_time", sa.Double, nullable=False),
        sa.Column("update_time", sa.Double, nullable=False),
        sa.Column("last_use_time", sa.Double),
        sa.Column("etag", sa.String(32), nullable=False),
        sa.Column("deleting", sa.Boolean, nullable=False),
        sa.Column("request_id", sa.String(36), unique=True),
    )
    op.create_table(
        "nodes",
        sa.Column("id", sa.String(63), primary_key=True),
        sa.Column("endpoint", sa.Text, nullable=False),
        sa.Column("facts", sa.JSON, nullable=False),
    )
    op.create_table(
        "intents",
        sa.Column("instance", sa.String(63), primary_key=True),
        sa.Column("deployment", sa.String(63), nullable=False),
        sa.Column("node", sa.String(63), nullable=False),
        sa.Column("snapshot", sa.String(63), nullable=False),
        sa.Column("create_time", sa.Double, nullable=False),
    )


def downgrade() -> None:
    """Undo this revision."""
    for table in ("intents", "nodes", "deployments"):
        op.drop_table(table)
