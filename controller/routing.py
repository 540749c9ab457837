"""Which of several serving instances answers a request: the one that has most of itself to spare."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Final

from controller.model import Instance

# Of an instance that does not tell how many sequences it takes at once.
ASSUMED_SEQUENCES: Final = 64


def has_room(instance: Instance, sequences: int = 1) -> bool:
    """Whether it takes so many sequences more. One without any takes every request, however large."""
    return not instance.in_flight or instance.in_flight + sequences <= _capacity(instance)


def choose(instances: Iterable[Instance], sequences: int = 1) -> Instance | None:
    """The instance of whose capacity the smallest part is taken, the oldest among equals.

    Args:
        instances: those that serve.
        sequences: what the request takes; instances without room for it come last.
    """
    return min(
        instances,
        key=lambda i: (
            not has_room(i, sequences),
            i.in_flight / _capacity(i),
            i.report.create_time,
            i.id,
        ),
        default=None,
    )


def _capacity(instance: Instance) -> int:
    told = instance.report.capacity
    return told.sequences if told is not None else ASSUMED_SEQUENCES
