"""CUDA operations over all processes of an instance, all or none.

Every process is locked before the first is checkpointed, because one that still runs could talk to one
that no longer does. What was done is undone in reverse when a later one fails, and what that is, the
processes themselves are asked: whoever performed the failed operation may have ended in the middle of it.
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

# What a process without CUDA is answered.
NOT_CUDA: Final = "CUDA_FAILED"


async def find(cuda: Cuda, pids: Sequence[int]) -> list[int]:
    """Those of a process and its descendants that use CUDA, in their order.

    Args:
        family: pids, the model host's own first.
    """
    if len(pids) == 1:
        # It was loaded on a GPU: nobody else can be it.
        return list(pids)
    answers = await asyncio.gather(*map(cuda.state, pids), return_exceptions=True)
    for answer in answers:
        if isinstance(answer, BaseException) and getattr(answer, "reason", "") != NOT_CUDA:
            raise answer
    found = [pid for pid, answer in zip(pids, answers, strict=True) if isinstance(answer, str)]
    # None at all: the driver says why when the first is locked.
    return found or list(pids[:1])


async def suspend(cuda: Cuda, pids: Sequence[int], lock_timeout: float) -> None:
    """Lock and checkpoint ``pids``: their GPU memory is released, their state is in host memory.

    Raises:
        DumontError: none of them is suspended; all run as before, as far as the driver lets them.
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
            log.error("CUDA state could not be undone", pids=touched, reason=error.reason)
        raise


async def resume(cuda: Cuda, pids: Sequence[int], devices: Mapping[str, str]) -> None:
    """Restore and unlock ``pids``.

    Args:
        devices: GPU UUIDs, old to new, every GPU of the node; empty: the same GPUs.

    Raises:
        DumontError: some are not running; the instance must be ended.
    """
    for pid in pids:
        await to_completion(cuda.restore(pid, devices))
    for pid in pids:
        await to_completion(cuda.unlock(pid))


async def recover(cuda: Cuda, pids: Sequence[int]) -> None:
    """Bring processes back to running from whatever state an interrupted operation left them in.

    Raises:
        DumontError: some are not running; all that could be done for the others is done.
    """
    failures: list[DumontError] = []
    states: dict[int, str] = {}
    for pid in reversed(pids):
        try:
            states[pid] = await to_completion(cuda.state(pid))
            if states[pid] == "failed":
                raise Aborted(
                    "CUDA_FAILED", f"process {pid} cannot be brought back: its CUDA state is failed"
                )
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
