"""What leaves the node to make room for something else. Pure: what is held in, what goes out."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from dumont.errors import ResourceExhausted


@dataclass(frozen=True)
class Candidate:
    """A snapshot or a weight file that the node holds.

    Attributes:
        size: what it takes on the node, in bytes.
        last_use: in seconds since the epoch.
        removable: it can be had again, and nothing uses it now.
    """

    name: str
    size: int
    last_use: float
    removable: bool


def choose(held: Iterable[Candidate], budget: int, needed: int) -> tuple[list[str], int]:
    """The least recently used, as many as must go so that ``needed`` bytes fit the budget.

    Returns:
        Their names, and the bytes by which it does not fit even then.
    """
    everything = list(held)
    excess = sum(one.size for one in everything) + needed - budget
    leaving: list[str] = []
    for one in sorted(everything, key=lambda one: (one.last_use, one.name)):
        if excess <= 0:
            break
        if one.removable:
            leaving.append(one.name)
            excess -= one.size
    return leaving, max(excess, 0)


def snapshots_to_evict(held: Iterable[Candidate], budget: int, needed: int) -> list[str]:
    """The least recently used snapshots, as many as must go so that ``needed`` bytes fit the budget.

    Args:
        budget: bytes that all snapshots of the node may take; 0: no limit.

    Raises:
        ResourceExhausted: CACHE_FULL, it does not fit even then.
    """
    if not budget:
        return []
    leaving, excess = choose(held, budget, needed)
    if excess > 0 and needed:
        raise ResourceExhausted(
            "CACHE_FULL",
            f"the snapshot needs {needed} bytes and the node's budget of {budget} is short of {excess}, with "
            "what is in use or only here left alone; raise --cache-bytes, or delete snapshots",
            metadata={"needed": str(needed), "budget": str(budget)},
        )
    return leaving
