"""Ask model hosts for their capacity and load regularly, and report changes to the watchers of instances."""

from __future__ import annotations

import asyncio
from typing import Final

from snapshotd.instances.manager import Instances
from snapshotd.model import State

INTERVAL_SECONDS: Final = 2.0


async def follow_load(instances: Instances, interval: float = INTERVAL_SECONDS) -> None:
    """Ask every serving instance until cancelled, and at once when it begins to serve.

    Args:
        interval: seconds between two rounds.
    """
    serving: set[str] = set()
    async with instances.changes() as changes:
        while True:
            try:
                async with asyncio.timeout(interval):
                    while True:
                        change = await changes.get()
                        if change.instance is None or change.instance.state is not State.SERVING:
                            serving.discard(change.instance.id if change.instance else change.removed)
                        elif change.instance.id not in serving:
                            serving.add(change.instance.id)
                            await asyncio.shield(instances.measure(change.instance.id))
            except TimeoutError:
                for instance in sorted(serving):
                    await instances.measure(instance)
