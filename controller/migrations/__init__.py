"""The registry's schema, as alembic revisions that run when the controller starts."""
