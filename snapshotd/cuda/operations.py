"""What both CUDA backends share: how long an operation may take, and the errors of failed ones."""

from __future__ import annotations

import re
from typing import Final

from dumont.errors import Aborted, DumontError, ResourceExhausted

# A checkpoint copies all GPU memory to the host.
LIMIT: Final = 300.0
# For operations that copy no memory; a lock gets its own timeout in addition.
SHORT_LIMIT: Final = 20.0
# Seconds after which a process that was too busy to be locked may be idle.
BUSY_RETRY: Final = 1.0

BUSY: Final = re.compile(r"not[ _]ready|time[d]?[ _]?out", re.IGNORECASE)
FULL: Final = re.compile(r"out[ _]of[ _]memory", re.IGNORECASE)


def limit(operation: str, most: float, lock_timeout: float = 0.0) -> float:
    """Seconds after which an operation is considered hung.

    Args:
        most: for operations that copy memory.
        lock_timeout: the driver's own timeout of a lock, in seconds.
    """
    if operation in ("checkpoint", "restore"):
        return most
    return min(most, SHORT_LIMIT) + lock_timeout


def refused(operation: str, pid: int, said: str) -> DumontError:
    """The error for an operation that the driver refused.

    Args:
        said: the driver's message.
    """
    metadata = {"operation": operation, "pid": str(pid)}
    if operation == "lock" and BUSY.search(said):
        return Aborted(
            "CUDA_LOCK_TIMEOUT",
            f"process {pid} could not be locked: its work on the GPU did not end in time; try again later",
            metadata=metadata,
            retry_after=BUSY_RETRY,
        )
    if FULL.search(said):
        return ResourceExhausted(
            "GPU_MEMORY",
            f"CUDA {operation} of process {pid} found too little GPU memory; park or stop another",
            metadata=metadata,
        )
    return Aborted("CUDA_FAILED", f"CUDA {operation} of process {pid} failed: {said}", metadata=metadata)


def overdue(operation: str, pid: int, seconds: float) -> Aborted:
    """The error for an operation that did not end in time."""
    return Aborted(
        "CUDA_TIMEOUT",
        f"CUDA {operation} of process {pid} did not end within {seconds:g} s; the driver's log may say why",
        metadata={"operation": operation, "pid": str(pid)},
    )


def lost(operation: str, pid: int, who: str, how: str) -> Aborted:
    """The error for an operation whose performer has ended, so that the state of the process is unknown.

    Args:
        who: the performer.
        how: how it ended.
    """
    return Aborted(
        "CUDA_AGENT_LOST",
        f"{who} {how} during CUDA {operation} of process {pid}; it is started again at its next use",
        metadata={"operation": operation, "pid": str(pid)},
    )
