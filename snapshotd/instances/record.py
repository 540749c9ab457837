"""What is kept of an instance while this daemon runs, and what is told of its changes."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass, field

from snapshotd.model import Instance, Phase
from snapshotd.ports import Host


@dataclass
class Record:
    """An instance and what is alive of it."""

    instance: Instance
    host: Host | None = None
    # The job under way; a stop cancels it.
    job: asyncio.Task[None] | None = None
    watch: asyncio.Task[None] | None = None
    # What the model host says its load was made of.
    load_parts: tuple[Phase, ...] = ()
    # Held by what ends its process: a stop must not answer while that still goes on.
    ending: asyncio.Lock = field(default_factory=asyncio.Lock)

    def with_parts(self, phases: Sequence[Phase]) -> tuple[Phase, ...]:
        """The phases of a job, with the model host's own parts of its load after the load."""
        shown: list[Phase] = []
        for phase in phases:
            shown.append(phase)
            if phase.name == "load":
                shown.extend(self.load_parts)
        return tuple(shown)


@dataclass(frozen=True)
class Change:
    """An instance as it is now, or the id of one that is gone."""

    instance: Instance | None
    removed: str = ""
