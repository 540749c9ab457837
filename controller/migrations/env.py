"""Run by alembic; ``registry_sql.migrate`` hands over the connection."""

from __future__ import annotations

from alembic import context

from controller.adapters.registry_sql import METADATA

connection = context.config.attributes["connection"]
context.configure(connection=connection, target_metadata=METADATA)
with context.begin_transaction():
    context.run_migrations()
