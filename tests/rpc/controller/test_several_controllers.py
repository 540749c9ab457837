"""Two controllers on one database: each answers every request, and one takes the other's place."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field
from typing import Any, cast

import grpc
import pytest
from google.longrunning import operations_pb2, operations_pb2_grpc
from google.protobuf.message import Message

from controller.adapters.clock import SystemClock
from controller.adapters.operation_store import OperationStore
from controller.assembly import Controller, assemble
from controller.config import Config
from controller.identity import Established, Identity
from controller.main import DOMAIN, LIMITS, SERVICES, add_services
from controller.membership import Membership
from controller.model import InstanceState, Node, NodeState
from controller.ports import Nodes
from controller.service import forwarding
from controller.service.forwarding import ANYWHERE, ForwardingInterceptor, names_in
from dumont.client import AsyncClient
from dumont.controller.v1 import deployment_service_pb2 as deployments
from dumont.controller.v1 import inference_service_pb2 as inference
from dumont.controller.v1 import instance_service_pb2 as instances
from dumont.controller.v1 import snapshot_service_pb2 as snapshots
from dumont.controller.v1.deployment_service_pb2_grpc import DeploymentServiceStub
from dumont.errors import Aborted, Unavailable
from dumont.rpc import operations
from dumont.rpc.operations import Operations
from dumont.rpc.server import add_standard_services, bind, new_server
from tests.fakes.memory_nodes import MemoryNodes
from tests.fakes.memory_registry import MemoryDatabase, MemoryRegistry
from tests.fakes.reachable_nodes import Fences, ReachableNodes

LEASE = 0.6


@dataclass
class One:
    """A controller, as ``main`` puts it together."""

    controller: Controller
    server: grpc.aio.Server
    reach: ReachableNodes
    running: Operations
    forwarding: ForwardingInterceptor
    address: str
    client: AsyncClient

    async def kill(self) -> None:
        """It is gone, and nobody was told."""
        self.reach.freeze()
        await self.server.stop(0)
        await self.controller.core.tasks.close()

    async def close(self) -> None:
        self.reach.thaw()
        await self.client.close()
        await self.server.stop(0)
        await self.running.close()
        await self.controller.core.tasks.close()
        await self.forwarding.close()


@dataclass
class Several:
    nodes: MemoryNodes
    free_port: Callable[[], int]
    clock: SystemClock = field(default_factory=SystemClock)
    fences: Fences = field(default_factory=Fences)
    ones: list[One] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.database = MemoryDatabase(self.clock)

    async def taken_over_by(self, one: One) -> None:
        while self.database.holders["qa"] != one.controller.core.membership.number:
            await self.clock.sleep(LEASE / 10)

    async def start(self) -> One:
        interceptor = ForwardingInterceptor(5 * LEASE)
        server = new_server(DOMAIN, LIMITS, (interceptor,))
        health = add_standard_services(server, SERVICES)
        address = bind(server, f"127.0.0.1:{self.free_port()}")
        registry = MemoryRegistry(self.database)

        def decide(stored: Identity | None, empty: bool) -> Established:
            return Established(Identity("fleet", (stored.starts if stored else 0) + 1))

        who = await registry.join(decide, address, LEASE)
        membership = Membership(who.identity.starts)
        reach = ReachableNodes(self.nodes, self.fences, membership)
        controller = await assemble(
            cast(Nodes, reach), registry, self.clock, who, lease=LEASE, membership=membership
        )
        running = Operations(DOMAIN, store=OperationStore(registry))
        interceptor.attach(controller)
        add_services(server, controller, running, Config(), asyncio.Event())
        await server.start()
        await health.set_all(True)
        for node in self.nodes.world:
            await controller.core.fleet.register(Node(node, f"{node}:7071", checkpoint_capable=True))
        await controller.core.inventory.until(
            lambda: all(n.state is NodeState.READY for n in controller.core.inventory.nodes.values())
        )
        one = One(controller, server, reach, running, interceptor, address, AsyncClient(address))
        self.ones.append(one)
        return one


@pytest.fixture
async def several(free_port: Callable[[], int]) -> AsyncIterator[Several]:
    nodes = MemoryNodes(SystemClock())
    nodes.add_node("n1")
    made = Several(nodes, free_port)
    async with asyncio.timeout(30):
        yield made
        nodes.release_all()
        for one in made.ones:
            await one.close()


async def ask(one: One, deployment: str = "qa") -> Any:
    handle = await one.client.deployments.get(deployment)
    return await handle.generate("hello")


async def test_what_one_controller_holds_the_other_one_answers_too(several: Several) -> None:
    first, second = await several.start(), await several.start()
    await first.client.deploy("org/model", name="qa")

    answers = await asyncio.gather(ask(first), ask(second), ask(second))

    # One start, of which both know.
    assert len(several.nodes.named("start")) == 1
    assert len({answer.start.instance for answer in answers}) == 1
    assert [d.name for d in await second.client.deployments.list()] == ["deployments/qa"]
    assert (
        second.controller.core.inventory.instances.keys() == first.controller.core.inventory.instances.keys()
    )


async def test_a_request_that_gives_only_the_id_is_answered_by_the_holder(several: Several) -> None:
    first, second = await several.start(), await several.start()
    await first.client.deploy("org/model", name="qa")
    async with grpc.aio.insecure_channel(second.address) as channel:
        generate: Any = channel.unary_stream("/dumont.controller.v1.InferenceService/Generate")
        async for _ in generate(
            inference.GenerateRequest(deployment="qa", prompt="hello").SerializeToString()
        ):
            pass
    assert first.controller.core.deployments.last_use.keys() == {"qa"}
    assert not second.controller.core.deployments.last_use


async def test_a_command_about_an_instance_goes_to_its_holder(several: Several) -> None:
    first, second = await several.start(), await several.start()
    await first.client.deploy("org/model", name="qa")
    await ask(first)
    (instance,) = await second.client.instances.list("qa")
    await second.client.instances.park(instance.name)
    (known,) = first.controller.core.inventory.instances.values()
    assert known.state is InstanceState.PARKED
    await second.client.deployments.delete("qa")
    assert first.controller.core.deployments.by_id == {}
    assert await second.client.deployments.list() == []


async def test_a_request_waits_for_the_successor_of_a_killed_controller(several: Several) -> None:
    # given: a request that the first controller has begun to start an instance for
    first, second = await several.start(), await several.start()
    await first.client.deploy("org/model", name="qa")
    several.nodes.hold("start")
    asked = asyncio.create_task(ask(second))
    await several.nodes.called("start")
    # when: it dies
    several.nodes.abandoned = True
    await first.kill()
    several.nodes.abandoned = False
    several.nodes.release_all()
    several.nodes.finish_starts("n1")
    # then: the other one answers, from the instance that was started already
    answer = await asked
    assert answer.text
    assert len(several.nodes.named("start")) == 1
    assert several.database.holders == {"qa": second.controller.core.membership.number}


async def test_what_a_stopped_controller_sends_late_is_refused(several: Several) -> None:
    # given: a controller that stops as it starts an instance
    first, second = await several.start(), await several.start()
    await first.client.deploy("org/model", name="qa")
    first.reach.freeze()
    stuck = asyncio.create_task(ask(first))
    while not several.database.intents:
        await several.clock.sleep(LEASE / 50)
    # A controller that is stopped renews nothing either.
    several.database.stopped.add(first.controller.core.membership.number)
    # when: the other one has taken its place, and it goes on
    await several.taken_over_by(second)
    answer = await ask(second)
    several.database.stopped.clear()
    first.reach.thaw()
    # then: its command is refused, and it knows why
    with pytest.raises(Aborted) as failure:
        await stuck
    assert failure.value.reason == "SESSION_ENDED"
    assert several.fences.refused
    assert first.controller.core.membership.ended.is_set()
    assert len(several.nodes.world["n1"].instances) == 1
    assert answer.text


async def test_an_operation_is_known_to_every_controller(several: Several) -> None:
    first, second = await several.start(), await several.start()
    await first.client.deploy("org/model", name="qa")
    made = await second.client.snapshots.create("qa")
    assert made.name in {f"snapshots/{snapshot}" for snapshot in several.nodes.world["n1"].snapshots}


async def test_an_operation_is_known_to_every_controller_by_its_id_alone(several: Several) -> None:
    first, second = await several.start(), await several.start()
    await first.client.deploy("org/model", name="qa")
    held = several.nodes.hold("capture")
    making = asyncio.create_task(first.client.snapshots.create("qa"))
    await several.nodes.called("capture")
    (name,) = several.database.operations
    async with grpc.aio.insecure_channel(second.address) as channel:
        request = operations_pb2.GetOperationRequest(name=name.removeprefix("operations/"))
        found = await operations_pb2_grpc.OperationsStub(channel).GetOperation(request)
    assert (found.name, found.done) == (name, False)
    held.set()
    await making


async def test_an_operation_whose_controller_died_is_told_as_a_failure(several: Several) -> None:
    first, second = await several.start(), await several.start()
    await first.client.deploy("org/model", name="qa")
    held = several.nodes.hold("capture")
    making = asyncio.create_task(second.client.snapshots.create("qa"))
    await several.nodes.called("capture")
    await first.kill()
    with pytest.raises(Aborted) as failure:
        await making
    assert failure.value.reason == "OPERATION_INTERRUPTED"
    held.set()


async def test_commands_are_not_repeated_when_their_controller_is_lost(several: Several) -> None:
    first, second = await several.start(), await several.start()
    await first.client.deploy("org/model", name="qa")
    await ask(first)
    (instance,) = await second.client.instances.list("qa")
    held = several.nodes.hold("park")
    parking = asyncio.create_task(second.client.instances.park(instance.name))
    await several.nodes.called("park")
    await first.kill()
    with pytest.raises(Unavailable) as failure:
        await parking
    assert failure.value.reason == "HOLDER_LOST"
    held.set()


def test_every_method_is_answered_anywhere_or_says_whom_it_is_about() -> None:
    methods = {
        f"/{service.full_name}/{method.name}": method
        for service in forwarding.SERVICES
        for method in service.methods
    }
    operation_methods = {f"/{operations.SERVICE_NAME}/ListOperations"}
    assert methods.keys() | operation_methods >= ANYWHERE
    for name, method in methods.items():
        fields = method.input_type.fields_by_name
        about = {"deployment", "name", "instance", "snapshot"} & set(fields)
        assert name in ANYWHERE or about, f"{name} names nothing by which its holder is found"


def test_the_deployment_that_a_request_names_counts_more_than_its_snapshot() -> None:
    adopt = snapshots.AdoptSnapshotRequest(name="snapshots/s", deployment="deployments/qa")
    assert names_in(adopt) == ["deployments/qa", "snapshots/s"]
    update = deployments.UpdateDeploymentRequest(deployment=deployments.Deployment(name="deployments/qa"))
    assert names_in(update) == ["deployments/qa"]


@pytest.mark.parametrize(
    ("request_", "named"),
    [
        (inference.GenerateRequest(deployment="qa"), "deployments/qa"),
        (deployments.DeleteDeploymentRequest(name="qa"), "deployments/qa"),
        (deployments.UpdateDeploymentRequest(deployment=deployments.Deployment(name="qa")), "deployments/qa"),
        (instances.ParkInstanceRequest(name="qa-1"), "instances/qa-1"),
        (snapshots.DeleteSnapshotRequest(name="qa-1"), "snapshots/qa-1"),
        (snapshots.CreateSnapshotRequest(deployment="qa"), "deployments/qa"),
    ],
)
def test_an_id_alone_names_what_the_whole_name_does(request_: Message, named: str) -> None:
    assert names_in(request_) == [named]


async def test_a_client_that_knows_both_does_without_the_one_that_is_gone(several: Several) -> None:
    first, second = await several.start(), await several.start()
    async with AsyncClient(f"localhost:{first.address.rpartition(':')[2]},{second.address}") as client:
        handle = await client.deploy("org/model", name="qa")
        await handle.generate("hello")
        await first.kill()
        answer = await handle.generate("hello")
    assert answer.text
    assert len(several.nodes.named("start")) == 1


async def test_names_of_which_nothing_is_known_are_told() -> None:
    async with AsyncClient("a.invalid:1,b.invalid:2") as client:
        with pytest.raises(Unavailable) as failure:
            await client.nodes.list()
    assert failure.value.reason == "ENDPOINT_UNREACHABLE"


async def test_a_repeated_request_starts_nothing_beside_the_holder(several: Several) -> None:
    ones = [await several.start(), await several.start()]
    request = deployments.CreateDeploymentRequest(
        deployment_id="qa",
        deployment=deployments.Deployment(model="org/model", start_mode=deployments.START_MODE_CHECKPOINT),
        prewarm=True,
        request_id="6c4a2a6e-3f5b-4b5e-9d6c-0a6f3f1f5a10",
    )
    for one in ones:
        async with grpc.aio.insecure_channel(one.address) as channel:
            created = await DeploymentServiceStub(channel).CreateDeployment(request)
    await asyncio.sleep(0)

    second = ones[1].controller
    assert created.name == "deployments/qa"
    assert not second.starts.starting("qa")
    assert not second.starts.failures
