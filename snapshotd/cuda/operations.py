"""What both backends share: how long an operation may take, and what its failures are called."""

from __future__ import annotations

import re
from typing import Final

from dumont.errors import Aborted, DumontError, ResourceExhausted

# A checkpoint copies all GPU memory to the host.
LIMIT: Final = 300.0
# Beyond the lock's own timeout, and for what moves no memory.
SHORT_LIMIT: Final = 20.0
# Seconds after which work that kept a process from being locked may have ended.
BUSY_RETRY: Final = 1.0

BUSY: Final = re.compile(r"not[ _]ready|time[d]?[ _]?out", re.IGNORECASE)
FULL: Final = re.compile(r"out[ _]of[ _]memory", re.IGNORECASE)


def limit(operation: str, most: float, lock_timeout: float = 0.0) -> float:
    """Seconds that an operation is given before it counts as one that never ends.

    Args:
        most: for those that copy memory.
        lock_timeout: the driver's own, in seconds.
    """
    if operation in ("checkpoint", "restore"):
        return most
    return min(most, SHORT_LIMIT) + lock_timeout


def refused(operation: str, pid: int, said: str) -> DumontError:
    """The driver's refusal, in its own words, as the error it is to a caller."""
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
    return Aborted(
        "CUDA_TIMEOUT",
        f"CUDA {operation} of process {pid} did not end within {seconds:g} s; the driver's log may say why",
        metadata={"operation": operation, "pid": str(pid)},
    )


def lost(operation: str, pid: int, who: str, how: str) -> Aborted:
    """Who performed the operation ended in the middle of it: only the process itself knows its state now."""
    return Aborted(
        "CUDA_AGENT_LOST",
        f"{who} {how} during CUDA {operation} of process {pid}; it is started again at its next use",
        metadata={"operation": operation, "pid": str(pid)},
    )
