"""Tells a caller how far the start is that its call waits for."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncGenerator, Callable
from typing import Any

from dumont import convert
from dumont.connection import Connection
from dumont.controller.v1 import deployment_service_pb2
from dumont.errors import DumontError
from dumont.types import StartProgress

OnProgress = Callable[[StartProgress], None]


async def watch(connection: Connection, deployment: str) -> AsyncGenerator[StartProgress]:
    """How far a deployment's start is, and again after each change.

    Args:
        connection: to the controller.
        deployment: its full name.
    """
    request = deployment_service_pb2.WatchStartRequest(name=deployment)
    call: Any = connection.deployments.WatchStart(request)
    try:
        with connection.errors():
            async for response in call:
                yield convert.start_progress(response)
    finally:
        call.cancel()


class Nobody:
    """In place of a task, where nobody wants to be told."""

    def cancel(self) -> None:
        """Nothing runs."""


def following(
    connection: Connection, deployment: str, progress: OnProgress | None
) -> asyncio.Task[None] | Nobody:
    """Call ``progress`` while a start runs, in a task that the caller cancels.

    What fails here fails nothing else: the call that waits for the start has an error of its own.
    """
    if progress is None:
        return Nobody()

    async def run() -> None:
        with contextlib.suppress(DumontError):
            async for found in watch(connection, deployment):
                if found.running:
                    progress(found)

    return asyncio.create_task(run())
