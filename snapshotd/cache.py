"""Which snapshots leave the node to make room for another. Pure: what is held in, what goes out."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from dumont.errors import ResourceExhausted


@dataclass(frozen=True)
class Held:
    """A snapshot that the node holds.

    Attributes:
        size: what it takes on the node, in bytes.
        last_use: when it was last restored or made, in seconds since the epoch.
        removable: it can be fetched again, and nothing uses it now.
    """

    snapshot: str
    size: int
    last_use: float
    removable: bool


def leavers(held: Iterable[Held], budget: int, needed: int) -> list[str]:
    """The least recently used snapshots, as many as must go so that ``needed`` bytes fit the budget.

    Args:
        budget: bytes that all snapshots of the node may take; 0: no limit.

    Raises:
        ResourceExhausted: CACHE_FULL, it does not fit even then.
    """
    if not budget:
        return []
    everything = list(held)
    excess = sum(one.size for one in everything) + needed - budget
    leaving: list[str] = []
    for one in sorted(everything, key=lambda one: (one.last_use, one.snapshot)):
        if excess <= 0:
            break
        if one.removable:
            leaving.append(one.snapshot)
            excess -= one.size
    if excess > 0 and needed:
        raise ResourceExhausted(
            "CACHE_FULL",
            f"the snapshot needs {needed} bytes and the node's budget of {budget} is short of {excess}, with "
            "what is in use or only here left alone; raise --cache-bytes, or delete snapshots",
            metadata={"needed": str(needed), "budget": str(budget)},
        )
    return leaving
