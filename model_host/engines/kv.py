"""Where the keys and values of sequences lie: extents of one long array of tokens, and whose prefix is
reused.

When a sequence is admitted, it reserves one extent for all the tokens it may ever have, so a running sequence
never lacks room. The extents of sequences that have ended are kept for later prompts that begin the same way,
until their room is needed.
"""

from __future__ import annotations

from bisect import insort
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Final

# Tokens. Extents begin and end at multiples of it, so that freed ones fit again.
GRAIN: Final = 16
# The first extent of the array belongs to nobody: rows that only fill up a batch write there.
FILLER: Final = GRAIN
# Tokens. A shorter common prefix is computed again; copying it would cost as much.
WORTH_SHARING: Final = 16


@dataclass(frozen=True, order=True)
class Extent:
    """``size`` tokens from ``start`` on."""

    start: int
    size: int

    @property
    def end(self) -> int:
        return self.start + self.size


class Extents:
    """Hands out extents of an array of ``total`` tokens, first fit."""

    def __init__(self, total: int) -> None:
        self.total = total // GRAIN * GRAIN
        self.used = 0
        self._free: list[Extent] = [Extent(FILLER, self.total - FILLER)] if self.total > FILLER else []

    @property
    def largest(self) -> int:
        """Tokens that one sequence can have when nothing else is there."""
        return max(self.total - FILLER, 0)

    def take(self, tokens: int) -> Extent | None:
        """An extent for at least ``tokens``; None if no gap is as large."""
        size = -(-tokens // GRAIN) * GRAIN
        for index, gap in enumerate(self._free):
            if gap.size >= size:
                if gap.size == size:
                    del self._free[index]
                else:
                    self._free[index] = Extent(gap.start + size, gap.size - size)
                self.used += size
                return Extent(gap.start, size)
        return None

    def give_back(self, extent: Extent) -> None:
        """Free an extent; neighbouring gaps become one."""
        self.used -= extent.size
        insort(self._free, extent)
        merged: list[Extent] = []
        for gap in self._free:
            if merged and merged[-1].end == gap.start:
                merged[-1] = Extent(merged[-1].start, merged[-1].size + gap.size)
            else:
                merged.append(gap)
        self._free = merged


@dataclass(eq=False)
class Kept:
    """Tokens whose keys and values are in an extent, from its start on."""

    extent: Extent
    tokens: list[int]


@dataclass
class Prefixes:
    """Extents of sequences that ended, by their first tokens, the least recently used first."""

    _kept: OrderedDict[int, Kept] = field(default_factory=OrderedDict)

    @property
    def tokens(self) -> int:
        """Room that is kept, in tokens."""
        return sum(kept.extent.size for kept in self._kept.values())

    def keep(self, extent: Extent, tokens: list[int]) -> Extent | None:
        """Keep what is in ``extent``; returns an extent that is not worth keeping, if there is one."""
        if len(tokens) < WORTH_SHARING:
            return extent
        for start, kept in self._kept.items():
            if common(kept.tokens, tokens) == len(tokens):
                self._kept.move_to_end(start)
                return extent
            if common(kept.tokens, tokens) == len(kept.tokens):
                del self._kept[start]
                self._kept[extent.start] = Kept(extent, tokens)
                return kept.extent
        self._kept[extent.start] = Kept(extent, tokens)
        return None

    def longest(self, tokens: Sequence[int]) -> tuple[Extent, int] | None:
        """The extent with the longest common prefix, and its length; None if none is worth it."""
        best: Kept | None = None
        length = WORTH_SHARING - 1
        for kept in self._kept.values():
            if (found := common(kept.tokens, tokens)) > length:
                best, length = kept, found
        if best is None:
            return None
        self._kept.move_to_end(best.extent.start)
        return best.extent, length

    def evict(self) -> Extent | None:
        """Forget the least recently used. Returns its extent, or None if nothing is kept."""
        return self._kept.popitem(last=False)[1].extent if self._kept else None


def common(one: Sequence[int], other: Sequence[int]) -> int:
    """How many tokens two sequences have in common at their start."""
    most = min(len(one), len(other))
    if one[:most] == other[:most]:
        return most
    low, high = 0, most  # the first `low` agree, the first `high` do not
    while high - low > 1:
        middle = (low + high) // 2
        if one[low:middle] == other[low:middle]:
            low = middle
        else:
            high = middle
    return low
