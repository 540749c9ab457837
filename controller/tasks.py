"""The owner of background tasks: none outlives it, and none fails unnoticed."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from typing import Any

import structlog

from dumont.errors import DumontError, Unavailable

log = structlog.get_logger()


class Tasks:
    """Spawns tasks, logs what they raise, and ends them all in ``close``."""

    def __init__(self) -> None:
        self._tasks: set[asyncio.Task[Any]] = set()
        self._closed = False

    def spawn(self, work: Coroutine[Any, Any, Any], name: str) -> asyncio.Task[Any]:
        """Run ``work`` in a task of this owner; ``name`` is for the log.

        Raises:
            Unavailable: SERVICE_STOPPING, nothing new is begun.
        """
        if self._closed:
            work.close()
            raise Unavailable(
                "SERVICE_STOPPING", "the service is stopping; try again in a moment", retry_after=1.0
            )
        task = asyncio.create_task(work, name=name)
        self._tasks.add(task)
        task.add_done_callback(self._done)
        return task

    def _done(self, task: asyncio.Task[Any]) -> None:
        self._tasks.discard(task)
        if task.cancelled() or (error := task.exception()) is None:
            return
        if isinstance(error, DumontError):
            log.info("task_failed", task=task.get_name(), reason=error.reason, error=error.message)
        else:
            log.error("task_failed", task=task.get_name(), exc_info=error)

    async def close(self) -> None:
        """Cancel every task and wait until each has ended."""
        self._closed = True
        for task in self._tasks:
            task.cancel()
        if self._tasks:
            await asyncio.wait(self._tasks)
