"""Which of several serving instances answers a request."""

from __future__ import annotations

from collections.abc import Iterable

from controller.model import Instance


def choose(instances: Iterable[Instance]) -> Instance | None:
    """The instance with the fewest requests in flight; the oldest among equals."""
    return min(instances, key=lambda i: (i.in_flight, i.report.create_time, i.id), default=None)
