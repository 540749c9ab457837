"""Suspend and resume the CUDA processes of an instance, all or none of them.

Every process is locked before the first is checkpointed, because one that still runs could communicate with
one that does not. If an operation fails, the earlier ones are undone in reverse. Which ones those are, the
processes themselves are asked, because the performer of the failed operation may have ended meanwhile.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from typing import Final

import structlog

from dumont.aio import to_completion
from dumont.errors import Aborted, DumontError
from snapshotd.ports import Cuda

log = structlog.get_logger(__name__)

# The reason with which the driver refuses a process that does not use CUDA.
NOT_CUDA: Final = "CUDA_FAILED"


async def find(cuda: Cuda, pids: Sequence[int]) -> list[int]:
    """The CUDA processes among a process and its descendants, in their order.

    Args:
        pids: the process tree, with the model host first.
    """
    if len(pids) == 1:
        # The model was loaded on a GPU, so a single process must be the one that uses CUDA.
        return list(pids)
    answers = await asyncio.gather(*map(cuda.state, pids), return_exceptions=True)
    for answer in answers:
        if isinstance(answer, BaseException) and getattr(answer, "reason", "") != NOT_CUDA:
            raise answer
    found = [pid for pid, answer in zip(pids, answers, strict=True) if isinstance(answer, str)]
    # If there is none, locking the first one makes the driver say why.
    return found or list(pids[:1])


async def suspend(cuda: Cuda, pids: Sequence[int], lock_timeout: float) -> None:
    """Lock and checkpoint processes: their state goes to host memory, and their GPU memory is freed.

    Raises:
        DumontError: none of them is suspended. All run as before, as far as the driver allows.
    """
    touched: list[int] = []
    try:
        for pid in pids:
            touched.append(pid)
            await to_completion(cuda.lock(pid, lock_timeout))
        for pid in pids:
            await to_completion(cuda.checkpoint(pid))
    except BaseException:
        try:
            await recover(cuda, touched)
        except DumontError as error:
            log.error("cuda_suspension_not_undone", pids=touched, reason=error.reason)
        raise


async def resume(cuda: Cuda, pids: Sequence[int], devices: Mapping[str, str]) -> None:
    """Restore and unlock suspended processes.

    Args:
        devices: old GPU UUIDs to new ones, for every GPU of the node; empty for the same GPUs.

    Raises:
        DumontError: some are not running, so the instance must be ended.
    """
    for pid in pids:
        await to_completion(cuda.restore(pid, devices))
    for pid in pids:
        await to_completion(cuda.unlock(pid))


async def recover(cuda: Cuda, pids: Sequence[int]) -> None:
    """Make processes run again, whatever state an interrupted operation has left them in.

    Raises:
        DumontError: some are not running; the others are, as far as possible.
    """
    failures: list[DumontError] = []
    states: dict[int, str] = {}
    for pid in reversed(pids):
        try:
            states[pid] = await to_completion(cuda.state(pid))
            if states[pid] == "failed":
                raise Aborted("CUDA_FAILED", f"process {pid} cannot run again: its CUDA state is failed")
            if states[pid] == "checkpointed":
                await to_completion(cuda.restore(pid, {}))
        except DumontError as error:
            failures.append(error)
            states[pid] = ""
    for pid, state in states.items():
        try:
            if state in ("checkpointed", "locked"):
                await to_completion(cuda.unlock(pid))
        except DumontError as error:
            failures.append(error)
    if failures:
        raise failures[0]
