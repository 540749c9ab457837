"""Requests that nobody can answer yet: who waits, in which order, how long, and who is sent where."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from typing import Any

import pytest

from controller import convert, routing
from controller.model import Capacity, Instance, InstanceState, Load, Report, StartInfo, StartMode, Tier
from controller.queue import MOST_BYTES, Queue, Ticket
from dumont.errors import DeadlineExceeded, Internal, ResourceExhausted, Unavailable
from dumont.snapshotd.v1 import instance_service_pb2 as node_pb
from tests.unit.controller.controller_world import Answered, World

# The queue by itself


def test_the_first_to_arrive_is_the_first_also_when_it_comes_back() -> None:
    queue = Queue("qa")
    first, second, third = (Ticket(arrived) for arrived in (1.0, 2.0, 2.0))
    for ticket in (first, second, third):
        queue.enter(ticket)
    queue.leave(first)
    queue.enter(first)

    assert queue.tickets == (first, second, third)
    assert queue.head == first


def test_beyond_its_length_a_request_is_refused_with_advice() -> None:
    queue = Queue("qa", length=2)
    queue.enter(Ticket(1.0))
    queue.enter(Ticket(2.0))

    with pytest.raises(ResourceExhausted) as refused:
        queue.enter(Ticket(3.0))

    assert (refused.value.reason, refused.value.retry_after) == ("QUEUE_FULL", 1.0)
    assert refused.value.metadata == {"deployment": "deployments/qa", "waiting": "2"}
    assert len(queue) == 2


def test_beyond_its_bytes_a_request_is_refused_with_advice() -> None:
    queue = Queue("qa")
    largest = 4 << 20
    for number in range(MOST_BYTES // largest):
        queue.enter(Ticket(float(number), size=largest))

    with pytest.raises(ResourceExhausted) as refused:
        queue.enter(Ticket(1000.0, size=1))

    assert (refused.value.reason, refused.value.retry_after) == ("QUEUE_FULL", 1.0)
    assert refused.value.metadata["waiting_bytes"] == str(MOST_BYTES)


def test_it_knows_whose_time_is_up_and_when_that_of_the_next_is() -> None:
    queue = Queue("qa")
    patient, hasty, later = Ticket(1.0), Ticket(2.0, deadline=10.0), Ticket(3.0, deadline=12.0)
    for ticket in (patient, hasty, later):
        queue.enter(ticket)

    assert queue.next_deadline == 10.0
    assert queue.expired(9.9) == []
    assert queue.expired(10.0) == [hasty]
    queue.leave(hasty)
    queue.leave(hasty)
    assert queue.next_deadline == 12.0


# Routing by itself


def instance(name: str, in_flight: int, sequences: int | None = None) -> Instance:
    capacity = None if sequences is None else Capacity(sequences)
    report = Report(name, "qa", InstanceState.SERVING, capacity=capacity)
    return Instance("n1", InstanceState.SERVING, report, since=0.0, idle_since=0.0, in_flight=in_flight)


def test_a_request_goes_where_the_smallest_part_of_the_capacity_is_taken() -> None:
    small, large = instance("small", 4, sequences=8), instance("large", 32, sequences=128)

    assert routing.choose([small, large]) is large
    assert routing.choose([small, replace(large, in_flight=96)]) is small


def test_an_instance_without_room_comes_last_and_an_empty_one_takes_anything() -> None:
    full, busy = instance("full", 8, sequences=8), instance("busy", 120, sequences=128)

    assert routing.choose([full, busy]) is busy
    assert routing.choose([full, busy], sequences=9) is not None
    assert not routing.has_room(busy, sequences=9)
    assert routing.has_room(instance("empty", 0, sequences=8), sequences=9)


def test_of_an_instance_that_tells_nothing_a_usual_capacity_is_assumed() -> None:
    assert routing.has_room(instance("silent", routing.ASSUMED_SEQUENCES - 1))
    assert not routing.has_room(instance("silent", routing.ASSUMED_SEQUENCES))


def test_what_a_node_tells_of_capacity_and_load_is_told_on() -> None:
    message = node_pb.Instance(name="instances/qa-1", state=node_pb.Instance.STATE_SERVING)
    message.capacity.sequences, message.capacity.kv_tokens = 128, 4096
    message.capacity.unbatched_reason = "it looks ahead"
    message.load.running, message.load.kv_tokens_used = 3, 512

    report = convert.report(message)
    told = convert.instance_message(replace(instance("qa-1", in_flight=5), report=report), None)

    assert (report.capacity, report.load) == (Capacity(128, 4096, "it looks ahead"), Load(3, 0, 512))
    assert told.capacity.unbatched_reason == "it looks ahead"
    assert (told.capacity.sequences, told.capacity.kv_tokens, told.in_flight) == (128, 4096, 5)
    assert (told.load.running, told.load.kv_tokens_used) == (3, 512)


def test_a_capacity_of_nothing_is_none() -> None:
    message = node_pb.Instance(name="instances/qa-1", state=node_pb.Instance.STATE_SERVING)
    assert convert.report(message).capacity is None
    message.capacity.sequences = 0
    assert convert.report(message).capacity is None
    assert not convert.instance_message(instance("qa-1", 0), None).HasField("capacity")


# Both in a controller


async def resident(world: World, sequences: int) -> None:
    """A deployment with an instance that serves and takes so many sequences at once."""
    await world.node()
    await world.deploy()
    await world.ask()
    (known,) = world.inventory.instances_of("qa")
    world.nodes.tell("n1", replace(known.report, capacity=Capacity(sequences)))
    await world.settle()
    world.nodes.calls.clear()


def asking(world: World, count: int, **options: Any) -> list[asyncio.Task[tuple[StartInfo, list[bytes]]]]:
    return [asyncio.create_task(world.ask(**options)) for _ in range(count)]


async def test_two_hundred_at_once_wake_a_sleeping_deployment_once_and_are_answered_in_order(
    world: World,
) -> None:
    # given: a snapshot, and no instance
    await resident(world, 64)
    await world.controller.instances.stop(world.inventory.instances_of("qa")[0].id)
    world.nodes.calls.clear()
    held = world.nodes.hold("restore")
    order: list[int] = []

    async def ask(number: int) -> Tier:
        answer = Answered()
        info, _ = await world.ask(answer=answer)
        order.append(number)
        return info.tier

    # when
    tasks = [asyncio.create_task(ask(number)) for number in range(200)]
    await world.nodes.called("restore")
    held.set()
    tiers = await asyncio.gather(*tasks)

    # then
    assert len(world.nodes.named("restore")) == 1
    assert len(world.nodes.named("generate")) == 200
    assert order == list(range(200))
    assert set(tiers) == {Tier.LOCAL}


async def test_no_more_are_sent_than_the_instance_takes_and_the_next_goes_when_one_ends(world: World) -> None:
    await resident(world, 2)
    held = world.nodes.hold("generate")
    first, second, third = asking(world, 3)
    await world.settle()
    (known,) = world.inventory.instances_of("qa")
    assert known.in_flight == 2
    assert len(world.nodes.named("generate")) == 2

    held.set()
    (info, _), *_ = await asyncio.gather(third, first, second)

    assert info.tier is Tier.RESIDENT
    assert info.reasons[0] == f"instances/{known.id} was full"
    assert [phase.name for phase in info.phases] == ["queue"]
    assert world.nodes.named("start") == world.nodes.named("restore") == []
    assert world.inventory.instances[known.id].in_flight == 0


async def test_an_answer_of_several_takes_as_much_room(world: World) -> None:
    await resident(world, 4)
    world.nodes.hold("generate")
    asking(world, 1, sequences=3)
    await world.settle()
    asking(world, 1, sequences=2)
    await world.settle()

    (known,) = world.inventory.instances_of("qa")
    assert known.in_flight == 3


async def test_nobody_overtakes_one_who_needs_more_room(world: World) -> None:
    await resident(world, 4)
    held = world.nodes.hold("generate")
    asking(world, 1, sequences=3)
    await world.settle()
    (large,) = asking(world, 1, sequences=4)
    (small,) = asking(world, 1)
    await world.settle()
    assert len(world.nodes.named("generate")) == 1

    held.set()
    await asyncio.gather(large, small)


async def test_who_leaves_the_queue_leaves_no_trace_and_keeps_nobody(world: World) -> None:
    await resident(world, 1)
    held = world.nodes.hold("generate")
    first, second, third = asking(world, 3)
    await world.settle()

    second.cancel()
    await world.settle()
    assert second.cancelled()
    held.set()
    await asyncio.gather(first, third)

    assert len(world.nodes.named("generate")) == 2
    (known,) = world.inventory.instances_of("qa")
    assert known.in_flight == 0
    assert not world.controller.starts.starting("qa")


async def test_one_who_leaves_at_the_moment_of_admission_holds_nothing(world: World) -> None:
    await resident(world, 1)
    lease = await world.controller.starts.acquire("qa")
    (leaving,) = asking(world, 1)
    await world.settle()

    lease.release()
    leaving.cancel()
    await world.settle()

    (known,) = world.inventory.instances_of("qa")
    assert (leaving.cancelled(), known.in_flight) == (True, 0)


async def test_a_deadline_ends_the_wait_at_once(world: World) -> None:
    await resident(world, 1)
    world.nodes.hold("generate")
    asking(world, 1)
    await world.settle()
    (hasty,) = asking(world, 1, timeout=5.0)
    await world.settle()

    world.clock.advance(4.9)
    await world.settle()
    assert not hasty.done()
    world.clock.advance(0.1)
    await world.settle()

    with pytest.raises(DeadlineExceeded):
        hasty.result()
    assert len(world.nodes.named("generate")) == 1


async def test_beyond_the_queues_length_callers_are_refused_and_the_others_answered() -> None:
    world = World()
    await world.boot(max_queue=3)
    await resident(world, 1)
    held = world.nodes.hold("generate")
    tasks = asking(world, 6)
    await world.settle()

    refused = [task for task in tasks if task.done()]
    assert tasks.index(refused[0]) == 4
    with pytest.raises(ResourceExhausted, match="3 requests already wait"):
        refused[0].result()
    held.set()
    await asyncio.gather(*tasks[:4])
    await world.controller.close()


async def test_a_start_that_fails_is_told_to_everyone_who_waits_for_it(world: World) -> None:
    await world.node()
    await world.deploy(StartMode.COLD)
    held = world.nodes.hold("start")
    world.nodes.fail("start", Internal("LOAD_FAILED", "broken"))
    tasks = asking(world, 3)
    await world.nodes.called("start")
    held.set()

    results = await asyncio.gather(*tasks, return_exceptions=True)

    assert [getattr(result, "reason", "") for result in results] == ["LOAD_FAILED"] * 3
    assert len(world.nodes.named("start")) == 1


async def test_nothing_is_sent_to_an_instance_that_does_something_else(world: World) -> None:
    await resident(world, 8)
    (known,) = world.inventory.instances_of("qa")
    held = world.nodes.hold("park")
    parking = asyncio.create_task(world.controller.instances.park(known.id))
    await world.nodes.called("park")

    (task,) = asking(world, 1)
    await world.settle()
    assert world.nodes.named("generate") == []

    held.set()
    await parking
    info, _ = await task
    assert info.tier is Tier.PARKED


async def test_a_host_that_is_fuller_than_it_told_is_tried_again_in_the_callers_turn(world: World) -> None:
    await resident(world, 8)
    world.nodes.fail("generate", ResourceExhausted("QUEUE_FULL", "no room", retry_after=0.5))
    (task,) = asking(world, 1, timeout=9.0)
    await world.settle()
    assert not task.done()

    world.clock.advance(0.5)
    info, _ = await task

    assert info.tier is Tier.RESIDENT
    assert len(world.nodes.named("generate")) == 2


async def test_a_host_that_stays_full_is_told_of(world: World) -> None:
    await resident(world, 8)
    full = ResourceExhausted("QUEUE_FULL", "no room", retry_after=0.5)
    world.nodes.fail("generate", *[full] * 100)
    (task,) = asking(world, 1)
    for _ in range(40):
        await world.advance(0.5)

    with pytest.raises(ResourceExhausted, match="no room"):
        task.result()


async def test_requests_that_wait_are_told_when_the_controller_stops(world: World) -> None:
    await resident(world, 1)
    world.nodes.hold("generate")
    asking(world, 1)
    await world.settle()
    (waiting,) = asking(world, 1)
    await world.settle()

    await world.controller.core.tasks.close()

    with pytest.raises(Unavailable) as told:
        await waiting
    assert told.value.reason == "SERVICE_STOPPING"
