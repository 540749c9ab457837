"""Which of several serving instances answers a request: the one with the largest share of free capacity."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Final

from controller.model import Instance

# Assumed of an instance that does not report how many sequences it takes at once.
ASSUMED_SEQUENCES: Final = 64
# Shares of capacity in the same of so many steps are about equal.
STEPS: Final = 8


def has_room(instance: Instance, sequences: int = 1) -> bool:
    """Whether an instance takes so many more sequences. An idle instance takes any request."""
    return not instance.in_flight or instance.in_flight + sequences <= _capacity(instance)


def share(instance: Instance) -> float:
    """How much of what an instance takes at once it was asked for; above 1 if that is more."""
    return instance.in_flight / _capacity(instance)


def choose(instances: Iterable[Instance], sequences: int = 1) -> Instance | None:
    """The instance with the smallest share of its capacity taken; the oldest among those about equal.

    So the younger ones become idle when the load falls, and end.

    Args:
        instances: the ones that serve.
        sequences: how many the request takes; an instance without room for it comes last.
    """
    return min(
        instances,
        key=lambda i: (
            not has_room(i, sequences),
            int(share(i) * STEPS),
            i.report.create_time,
            i.id,
        ),
        default=None,
    )


def _capacity(instance: Instance) -> int:
    capacity = instance.report.capacity
    return capacity.sequences if capacity is not None else ASSUMED_SEQUENCES
