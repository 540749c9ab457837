"""Somebody who waits for a start is told what is done for it, and where."""

from __future__ import annotations

import asyncio
from typing import Any

from controller.service.deployments import DeploymentService
from dumont.controller.v1 import deployment_service_pb2 as pb
from tests.unit.controller.controller_world import World


async def test_a_cold_start_is_told_from_its_beginning_to_its_end(world: World) -> None:
    # given a deployment that nothing runs for, and somebody who watches
    await world.node()
    parts = world.controller
    service = DeploymentService(parts.core, parts.starts)
    created = pb.Deployment(model="org/model", start_mode=pb.START_MODE_COLD)
    await service.CreateDeployment(pb.CreateDeploymentRequest(deployment_id="qa", deployment=created), None)
    watching = service.WatchStart(pb.WatchStartRequest(name="deployments/qa"), None)
    assert await anext(watching) == pb.WatchStartResponse()

    # when a start begins, which the node holds at a step
    held = world.nodes.hold("start")
    parts.starts.begin("qa")
    told = await _until(watching, lambda one: bool(one.instance))
    assert (told.running, told.stage, told.node, told.snapshot) == (True, "starting", "nodes/n1", "")
    world.nodes.stages[told.instance.removeprefix("instances/")] = "load"
    step = asyncio.ensure_future(_until(watching, lambda one: one.stage == "load"))
    await _settle(world)

    # then each step is told, and that the start has ended
    assert (await step).running
    held.set()
    assert not (await _until(watching, lambda one: not one.running)).running
    await watching.aclose()


async def _settle(world: World) -> None:
    for _ in range(20):
        await asyncio.sleep(0)
    world.clock.advance(1)


async def _until(watching: Any, wanted: Any) -> Any:
    async for one in watching:
        if wanted(one):
            return one
    raise AssertionError("the watch has ended")
