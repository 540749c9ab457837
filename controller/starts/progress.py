"""How far the start of a deployment is, for a person who waits for it."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncGenerator
from dataclasses import dataclass
from typing import Any, Final

from controller.core import Core
from controller.model import InstanceState
from controller.starts.starts import Starts
from dumont.errors import DumontError

# Seconds between two questions to a node, while a start runs and somebody watches.
LOOK_SECONDS: Final = 0.25
UNDER_WAY: Final = {
    InstanceState.STARTING: "starting",
    InstanceState.RESUMING: "resuming",
    InstanceState.CAPTURING: "capturing",
    # A start may have this one answer already, and still have to conclude.
    InstanceState.SERVING: "serving",
}


@dataclass(frozen=True, slots=True)
class StartProgress:
    """What is being done for a start, and where; all empty if none runs."""

    running: bool = False
    stage: str = ""
    instance: str = ""
    node: str = ""
    snapshot: str = ""


async def watch(core: Core, starts: Starts, deployment: str) -> AsyncGenerator[StartProgress]:
    """How far the start of ``deployment`` is now, and again after each change; ends when it is deleted."""
    told: StartProgress | None = None
    with core.inventory.watched(f"deployments/{deployment}") as changed:
        while deployment in core.deployments.by_id:
            changed.clear()
            found = await _progress(core, starts, deployment)
            if found != told:
                told = found
                yield found
            waits: list[asyncio.Future[Any]] = [asyncio.ensure_future(changed.wait())]
            if found.running:
                # A node's steps are no facts of the controller's, so they have to be asked for.
                waits.append(asyncio.ensure_future(core.clock.sleep(LOOK_SECONDS)))
            try:
                await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
            finally:
                for one in waits:
                    one.cancel()


async def _progress(core: Core, starts: Starts, deployment: str) -> StartProgress:
    if not starts.starting(deployment):
        return StartProgress()
    busy = [i for i in core.inventory.instances_of(deployment) if i.state in UNDER_WAY]
    if not busy:
        return StartProgress(running=True, stage="waiting")
    # Of several, the one that began last is the one that is waited for.
    instance = max(busy, key=lambda i: i.since)
    step = ""
    with contextlib.suppress(DumontError):
        step = await core.nodes.stage(instance.node, instance.id)
    return StartProgress(
        True, step or UNDER_WAY[instance.state], instance.id, instance.node, instance.report.snapshot
    )
