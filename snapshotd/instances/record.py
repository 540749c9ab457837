"""What the daemon knows of an instance beyond its facts, and the changes that it reports."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass, field

from snapshotd.model import Instance, Phase
from snapshotd.ports import Host


@dataclass
class Record:
    """An instance, and its process and tasks.

    Attributes:
        job: the job under way, which a stop cancels.
        watch: waits for the loss of the process.
        load_parts: the phases that the model host reported for its load.
        ending: held while the process is being ended, so that a stop does not answer before it has ended.
    """

    instance: Instance
    host: Host | None = None
    job: asyncio.Task[None] | None = None
    watch: asyncio.Task[None] | None = None
    load_parts: tuple[Phase, ...] = ()
    ending: asyncio.Lock = field(default_factory=asyncio.Lock)

    def with_parts(self, phases: Sequence[Phase]) -> tuple[Phase, ...]:
        """The phases of a job, with the model host's own phases of its load inserted after the load."""
        shown: list[Phase] = []
        for phase in phases:
            shown.append(phase)
            if phase.name == "load":
                shown.extend(self.load_parts)
        return tuple(shown)


@dataclass(frozen=True)
class Change:
    """A change to an instance: its new facts, or the id of one that is gone."""

    instance: Instance | None
    removed: str = ""
