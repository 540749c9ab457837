"""Run a job: named steps in order and, when one fails, the undo of every step so far in reverse.

A step's name is its metric label, log field, progress stage, failure reason and failpoint.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import secrets
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
        undo: reverts ``run``, even when only half of it happened, and does nothing if there is nothing to
            revert. It runs when this step or a later one fails.
    """

    name: str
    run: Action
    undo: Action | None = None


class Observer(Protocol):
    """Is told of the progress of a job."""

    def step_started(self, name: str) -> None:
        """The step ``name`` begins."""
        ...

    def step_ended(self, job: str, phase: Phase, error: BaseException | None) -> None:
        """A step has ended; ``error`` is None if it succeeded."""
        ...


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
        phases: receives the name and duration of each step as the step ends.

    Raises:
        DumontError: a step's own error, with the step in its metadata, after everything has been undone.
        Internal: STEP_FAILED, a defect; its incident id names the log entry that has the traceback.
        asyncio.CancelledError: the job was cancelled; everything has been undone.
    """
    for position, step in enumerate(steps):
        _tell(observer.step_started, step.name)
        start = clock.monotonic()
        failure: BaseException | None = None
        try:
            failpoints.hit(f"{job}.{step.name}")
            await step.run()
            failpoints.hit(f"{job}.{step.name}.after")
        except BaseException as error:
            failure = error
        phases.append(Phase(step.name, clock.monotonic() - start))
        _tell(observer.step_ended, job, phases[-1], failure)
        if failure is not None:
            # Whoever learns of the failure must find nothing left behind, even if cancelled meanwhile.
            with contextlib.suppress(asyncio.CancelledError):
                await to_completion(_undo(job, steps[: position + 1]))
            raise _as_reported(job, step, failure) from failure


def _tell(hear: Callable[..., None], *what: object) -> None:
    """Whoever watches a job decides nothing in it, not even that it fails."""
    try:
        hear(*what)
    except Exception:
        log.exception("observer_failed")


async def _undo(job: str, steps: Sequence[Step]) -> None:
    for step in reversed(steps):
        if step.undo is None:
            continue
        try:
            await step.undo()
        except Exception:
            # The other steps must still be undone. The next daemon removes what this one left behind.
            log.exception("step_undo_failed", job=job, step=step.name)


def _as_reported(job: str, step: Step, failure: BaseException) -> BaseException:
    """The error that the caller of a job gets for ``failure``."""
    metadata = {"step": f"{job}.{step.name}"}
    if isinstance(failure, DumontError):
        failure.metadata.setdefault("step", metadata["step"])
        return failure
    if isinstance(failure, OSError) and failure.errno in (errno.ENOSPC, errno.EDQUOT):
        return ResourceExhausted(
            "DISK_FULL",
            f"{job}.{step.name} found no room on this node's disk; delete snapshots or models",
            metadata=metadata,
        )
    return as_defect(job, step.name, failure) if isinstance(failure, Exception) else failure


def as_defect(job: str, step: str, failure: Exception) -> Internal:
    """Log an exception that nobody foresaw, and make the error that tells a caller where to look for it.

    Args:
        step: the step that failed; empty if it was none.
    """
    where, incident = f"{job}.{step}" if step else job, secrets.token_hex(4)
    log.error("job_defect", incident=incident, job=job, step=step, exc_info=failure)
    return Internal(
        "STEP_FAILED",
        f"{where} failed unexpectedly; the log of this node's snapshotd has the details under incident "
        f"{incident}",
        metadata={"step": where, "incident": incident},
    )
