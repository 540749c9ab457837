"""What is evicted from a cache to make room for something else. Pure: candidates in, names out."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from dumont.errors import ResourceExhausted


@dataclass(frozen=True)
class Candidate:
    """A snapshot or a weight file that is in a cache of this node.

    Attributes:
        size: bytes that it takes.
        last_use: in seconds since the epoch.
        removable: it can be fetched again, and nothing uses it now.
    """

    name: str
    size: int
    last_use: float
    removable: bool


def choose(candidates: Iterable[Candidate], budget: int, needed: int) -> tuple[list[str], int]:
    """Choose the least recently used entries, as many as must go so that ``needed`` bytes fit the budget.

    Returns:
        Their names, and the number of bytes that are lacking even without them.
    """
    everything = list(candidates)
    excess = sum(one.size for one in everything) + needed - budget
    evicted: list[str] = []
    for one in sorted(everything, key=lambda one: (one.last_use, one.name)):
        if excess <= 0:
            break
        if one.removable:
            evicted.append(one.name)
            excess -= one.size
    return evicted, max(excess, 0)


def snapshots_to_evict(candidates: Iterable[Candidate], budget: int, needed: int) -> list[str]:
    """The least recently used snapshots, as many as must go so that ``needed`` bytes fit the budget.

    Args:
        budget: bytes that all snapshots of the node may take; 0 for no limit.

    Raises:
        ResourceExhausted: CACHE_FULL, the snapshot does not fit even without them.
    """
    if not budget:
        return []
    evicted, excess = choose(candidates, budget, needed)
    if excess > 0 and needed:
        raise ResourceExhausted(
            "CACHE_FULL",
            f"the snapshot needs {needed} bytes, and the node's budget of {budget} lacks {excess} even if "
            "everything is evicted that is unused and published; raise --cache-bytes, or delete snapshots",
            metadata={"needed": str(needed), "budget": str(budget)},
        )
    return evicted
