"""Which faults there will be: drawn from a seed, before anything runs."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

ANY: Final = "any"
UPLOADING: Final = "uploading"

# Who is hit, and while an instance of its node is in which state; an upload is one as well. The more often a
# pair stands here, the more often it is drawn.
CASES: Final[tuple[tuple[str, str], ...]] = (
    ("controller", ANY),
    ("controller", "starting"),
    ("controller", "restoring"),
    ("controller", "capturing"),
    ("snapshotd", ANY),
    ("snapshotd", "starting"),
    ("snapshotd", "restoring"),
    ("snapshotd", "capturing"),
    ("snapshotd", "parking"),
    ("snapshotd", "parked"),
    ("snapshotd", UPLOADING),
    ("shim", ANY),
    ("shim", "starting"),
    ("shim", "restoring"),
    ("shim", "capturing"),
    ("shim", "parked"),
    ("spare", ANY),
    ("host", ANY),
    ("host", "starting"),
    ("host", "restoring"),
    ("host", "capturing"),
    ("host", "parked"),
    ("criu", "capturing"),
    ("criu", "restoring"),
    ("page_server", "capturing"),
    ("store", ANY),
    ("store", UPLOADING),
    # Nobody is left to end what is frozen.
    ("snapshotd+shim", "parked"),
    ("snapshotd+shim", "capturing"),
    ("controller+snapshotd", ANY),
)


@dataclass(frozen=True)
class Fault:
    """One thing that goes wrong.

    Attributes:
        victims: kinds of process; each is hit, on one node.
        phase: state of an instance to wait for; ``any``: at once.
        delay: seconds after the phase was seen.
        stopped: seconds between SIGSTOP and SIGCONT; 0: SIGKILL.
        pause: seconds before the fault is looked for.
    """

    victims: tuple[str, ...]
    phase: str
    delay: float
    stopped: float
    pause: float

    def __str__(self) -> str:
        how = f"stopped for {self.stopped:.1f} s" if self.stopped else "killed"
        when = "" if self.phase == ANY else f" while {self.phase}"
        return f"{' and '.join(self.victims)} {how}{when}"


def draw(seed: int, count: int, cases: Sequence[tuple[str, str]] = CASES) -> list[Fault]:
    """``count`` faults. Every case comes once before one comes twice; a quarter stop instead of killing."""
    generator = random.Random(seed)
    faults: list[Fault] = []
    while len(faults) < count:
        for victims, phase in generator.sample(list(cases), len(cases)):
            stopped = generator.uniform(0.3, 2.5) if generator.random() < 0.25 else 0.0
            delay, pause = generator.uniform(0.0, 0.4), generator.uniform(0.2, 1.5)
            faults.append(Fault(tuple(victims.split("+")), phase, delay, stopped, pause))
    return faults[:count]
