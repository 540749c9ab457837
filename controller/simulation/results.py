"""What became of the requests under one policy, and what it cost."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Final

PERCENTILES: Final = (50.0, 90.0, 99.0, 99.9)


@dataclass(frozen=True, slots=True)
class Result:
    """One policy's figures.

    Args:
        policy: its name.
        first_token: seconds to the first token of every request that was answered, sorted.
        tiers: requests by the tier that they were answered from.
        failures: requests that failed, by reason.
        gpu_hours: hours of a whole GPU's memory that instances held.
        decisions_per_second: requests admitted, starts decided and actions planned, by second of processor
            time; 0 where it was not measured.
        decision_seconds: processor time of single decisions about a start, sorted.
    """

    policy: str
    first_token: tuple[float, ...]
    tiers: Mapping[str, int]
    failures: Mapping[str, int]
    gpu_hours: float
    decisions_per_second: float = 0.0
    decision_seconds: tuple[float, ...] = ()

    def percentile(self, percent: float) -> float:
        """Seconds to the first token within which so many percent of the answered requests had it."""
        return percentile(self.first_token, percent)

    def saved(self, warm: Result) -> float:
        """The share of the GPU-hours of always-warm that this policy does not take."""
        return 1.0 - self.gpu_hours / warm.gpu_hours if warm.gpu_hours else 0.0


@dataclass(slots=True)
class Tally:
    """Counts while a simulation runs."""

    first_token: list[float] = field(default_factory=list)
    tiers: Counter[str] = field(default_factory=Counter)
    failures: Counter[str] = field(default_factory=Counter)

    def answered(self, tier: str, seconds: float) -> None:
        """A request had its first token after so many seconds."""
        self.first_token.append(seconds)
        self.tiers[tier] += 1

    def result(
        self, policy: str, gpu_hours: float, speed: float = 0.0, decisions: Sequence[float] = ()
    ) -> Result:
        """The figures; see ``Result``."""
        return Result(
            policy,
            tuple(sorted(self.first_token)),
            dict(self.tiers),
            dict(self.failures),
            gpu_hours,
            speed,
            tuple(sorted(decisions)),
        )


def percentile(values: Sequence[float], percent: float) -> float:
    """The nearest-rank percentile of sorted values; 0 if there are none."""
    if not values:
        return 0.0
    return values[max(0, math.ceil(percent / 100 * len(values)) - 1)]
