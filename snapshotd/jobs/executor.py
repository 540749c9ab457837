"""Run a job: named steps in order, and on failure what they did undone in reverse.

A step's name is its metric label, log field, progress stage, failure reason and failpoint.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import structlog

from dumont.aio import to_completion
from dumont.errors import DumontError, Internal, ResourceExhausted
from snapshotd.failpoints import Failpoints
from snapshotd.model import Phase
from snapshotd.ports import Clock

log = structlog.get_logger(__name__)

Action = Callable[[], Awaitable[None]]


@dataclass(frozen=True)
class Step:
    """One step of a job.

    Attributes:
        undo: takes back what ``run`` did, also half of it, and does nothing if there is nothing to
            take back. It runs when this step or a later one fails.
    """

    name: str
    run: Action
    undo: Action | None = None


class Observer(Protocol):
    """Hears of a job's progress."""

    def step_started(self, name: str) -> None: ...

    def step_ended(self, job: str, phase: Phase, error: BaseException | None) -> None: ...


async def run_job(
    job: str,
    steps: Sequence[Step],
    clock: Clock,
    observer: Observer,
    failpoints: Failpoints,
    phases: list[Phase],
) -> None:
    """Run ``steps`` in order.

    Args:
        phases: what each step took is appended here as it ends.

    Raises:
        DumontError: a step's own error with the step in its metadata, after everything is undone.
        asyncio.CancelledError: cancelled, after everything is undone.
    """
    for position, step in enumerate(steps):
        observer.step_started(step.name)
        start = clock.monotonic()
        failure: BaseException | None = None
        try:
            failpoints.hit(f"{job}.{step.name}")
            await step.run()
            failpoints.hit(f"{job}.{step.name}.after")
        except BaseException as error:
            failure = error
        phases.append(Phase(step.name, clock.monotonic() - start))
        observer.step_ended(job, phases[-1], failure)
        if failure is not None:
            # Whoever hears of the failure must find nothing left behind, even if cancelled meanwhile.
            with contextlib.suppress(asyncio.CancelledError):
                await to_completion(_unwind(job, steps[: position + 1]))
            raise _as_reported(job, step, failure) from failure


async def _unwind(job: str, steps: Sequence[Step]) -> None:
    for step in reversed(steps):
        if step.undo is None:
            continue
        try:
            await step.undo()
        except Exception:
            # The rest must still be undone; what this left behind is looked for at the next start.
            log.exception("undo failed", job=job, step=step.name)


def _as_reported(job: str, step: Step, failure: BaseException) -> BaseException:
    if isinstance(failure, DumontError):
        failure.metadata.setdefault("step", f"{job}.{step.name}")
        return failure
    if isinstance(failure, OSError) and failure.errno in (errno.ENOSPC, errno.EDQUOT):
        return ResourceExhausted(
            "DISK_FULL",
            f"{job}.{step.name} found no room on this node's disk; delete snapshots or models",
            metadata={"step": f"{job}.{step.name}"},
        )
    if isinstance(failure, Exception):
        return Internal(
            "STEP_FAILED",
            f"{job}.{step.name} failed: {failure}",
            metadata={"step": f"{job}.{step.name}"},
        )
    return failure
