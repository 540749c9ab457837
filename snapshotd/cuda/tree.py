"""CUDA operations over all processes of an instance, all or none.

Every process is locked before the first is checkpointed, because one that still runs could talk to one
that no longer does. What was done is undone in reverse when a later one fails.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import structlog

from dumont.errors import DumontError
from snapshotd.ports import Cuda

log = structlog.get_logger(__name__)


async def suspend(cuda: Cuda, pids: Sequence[int], lock_timeout: float) -> None:
    """Lock and checkpoint ``pids``: their GPU memory is released, their state is in host memory.

    Raises:
        DumontError: none of them is suspended; all run as before, as far as the driver lets them.
    """
    locked: list[int] = []
    checkpointed: list[int] = []
    try:
        for pid in pids:
            await cuda.lock(pid, lock_timeout)
            locked.append(pid)
        for pid in pids:
            await cuda.checkpoint(pid)
            checkpointed.append(pid)
    except BaseException:
        for pid in reversed(checkpointed):
            await _try("restore", pid, cuda.restore(pid, {}))
        for pid in reversed(locked):
            await _try("unlock", pid, cuda.unlock(pid))
        raise


async def revive(cuda: Cuda, pids: Sequence[int], devices: Mapping[str, str]) -> None:
    """Restore and unlock ``pids``.

    Args:
        devices: GPU UUIDs, old to new, every GPU of the node; empty: the same GPUs.

    Raises:
        DumontError: some are not running; the instance must be ended.
    """
    for pid in pids:
        await cuda.restore(pid, devices)
    for pid in pids:
        await cuda.unlock(pid)


async def rouse(cuda: Cuda, pids: Sequence[int]) -> None:
    """Bring processes back to running from whatever state an interrupted operation left them in."""
    states = {pid: await cuda.state(pid) for pid in pids}
    for pid, state in states.items():
        if state == "checkpointed":
            await cuda.restore(pid, {})
    for pid, state in states.items():
        if state in ("checkpointed", "locked"):
            await cuda.unlock(pid)


def device_map(captured: Sequence[str], here: Sequence[str]) -> dict[str, str]:
    """UUIDs at capture to UUIDs here, in order; empty when they are the same.

    The driver wants every GPU of the node in it, also those that the process does not use.
    """
    if list(captured) == list(here):
        return {}
    return dict(zip(captured, here, strict=True))


async def _try(what: str, pid: int, work: object) -> None:
    try:
        await work  # type: ignore[misc]
    except DumontError as error:
        log.error("CUDA state could not be undone", operation=what, pid=pid, reason=error.reason)
