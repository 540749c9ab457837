"""A thousand callers at once wake one sleeping deployment: it is restored once, and all are answered."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

import dumont
from tests.e2e.stack import Controller
from tests.e2e.test_making_room import node

pytestmark = pytest.mark.node

CALLERS = 1000
# What the controller may hold for them: a quarter of a mebibyte each, of gRPC's and its own.
MEMORY = CALLERS << 18


async def test_a_thousand_first_requests_at_once_are_one_restore(
    criu: Path, controller: Controller, small_model: Path, free_port: Callable[[], int], tmp_path: Path
) -> None:
    with dumont.Client(controller.endpoint) as client, node(controller, tmp_path / "snapshotd", free_port()):
        # Given a deployment of which only a snapshot is left
        client.deploy(str(small_model), name="qa").generate("Hello", max_new_tokens=1)
        (known,) = client.instances.list()
        client.instances.stop(known.name)
        process = psutil.Process(controller.process.pid)
        before = process.memory_info().rss

        # When a thousand callers ask at once
        async with dumont.AsyncClient(controller.endpoint) as many:
            deployment = await many.deployments.get("qa")
            calls = [
                asyncio.ensure_future(deployment.generate("Hello", max_new_tokens=1, timeout=120))
                for _ in range(CALLERS)
            ]
            most = before
            while not all(call.done() for call in calls):
                await asyncio.wait(calls, timeout=0.1)
                most = max(most, process.memory_info().rss)
            answers = [call.result() for call in calls]

        # Then one start answered them all, from the one instance that there is
        assert len(answers) == CALLERS
        (alive,) = client.instances.list()
        assert {answer.start.instance for answer in answers} == {alive.name}
        begun = [a for a in answers if a.start.tier == "local" and "joined" not in " ".join(a.start.reasons)]
        assert len(begun) == 1
        assert most - before < MEMORY
