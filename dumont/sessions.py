"""Which controllers of a fleet live: what one tells the nodes, so that they refuse the commands of the dead.

Every start of a controller begins a session with a number that is higher than all before. A session ends once
and for all, so what two controllers say can be merged in any order.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

# Metadata of a controller's commands to a node: its session, "7", and the number of the connection, "7.2".
SESSION_KEY: Final = "dumont-session"
# The sessions as that controller knows them, "9:3,7".
SESSIONS_KEY: Final = "dumont-sessions"


@dataclass(frozen=True, slots=True)
class Sessions:
    """What is known of a fleet's sessions.

    Args:
        highest: the number of the newest one that is known.
        living: the numbers up to it that have not ended.
    """

    highest: int = 0
    living: frozenset[int] = frozenset()

    def ended(self, number: int) -> bool:
        """Whether this session is known to have ended."""
        return number <= self.highest and number not in self.living

    def merge(self, other: Sessions) -> Sessions:
        """What is known from both."""
        living = {n for n in self.living | other.living if not (self.ended(n) or other.ended(n))}
        return Sessions(max(self.highest, other.highest), frozenset(living))

    def __str__(self) -> str:
        return f"{self.highest}:{','.join(map(str, sorted(self.living)))}"

    @classmethod
    def parse(cls, text: str) -> Sessions:
        """The inverse of ``str``. Raises: ValueError."""
        highest, _, living = text.partition(":")
        return cls(int(highest), frozenset(int(number) for number in living.split(",") if number))
