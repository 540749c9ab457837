"""When something that has failed may be tried again."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(slots=True)
class Backoff:
    """Doubling waits by key, from ``first`` to ``limit`` seconds.

    ``at`` maps a key to the monotonic time from which it may be tried; a key that is absent may be tried now.
    """

    first: float
    limit: float
    at: dict[str, float] = field(default_factory=dict)
    _failures: dict[str, int] = field(default_factory=dict)

    def failed(self, key: str, now: float) -> None:
        """Note a failure at monotonic time ``now``: the next try waits longer each time."""
        count = self._failures.get(key, 0)
        self._failures[key] = count + 1
        self.at[key] = now + min(self.limit, self.first * 2.0 ** min(count, 32))

    def succeeded(self, key: str) -> None:
        """Note a success: forget the failures."""
        self._failures.pop(key, None)
        self.at.pop(key, None)
