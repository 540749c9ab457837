"""Instances end in a state of the table whoever leaves, whatever fails and whenever the daemon dies."""

from __future__ import annotations

import asyncio
import errno
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from dumont.errors import (
    Aborted,
    AlreadyExists,
    DeadlineExceeded,
    FailedPrecondition,
    Internal,
    NotFound,
)
from snapshotd.jobs.context import Deadlines
from snapshotd.model import State, Weights
from tests.unit.snapshotd.instances.instances_world import (
    FILES,
    MAPPED,
    MODEL,
    FakeHost,
    FakeHosts,
    FakeWeights,
    World,
    a_node,
    an_instance,
    instances_of,
)


@pytest.fixture
def world(tmp_path: Path) -> World:
    hosts, weights = FakeHosts(), FakeWeights()
    return World(instances_of(a_node(tmp_path, hosts, weights=weights)), hosts, weights, tmp_path)


async def left_by_its_caller(work: asyncio.Task[Any], host: FakeHost, gate: asyncio.Event) -> None:
    """Cancel a call that waits at the gate, then open the gate and let the call end."""
    await host.reached.wait()
    work.cancel()
    asyncio.get_running_loop().call_later(0.01, gate.set)
    with pytest.raises(asyncio.CancelledError):
        await work


async def test_a_stop_ends_the_instance_also_when_its_caller_leaves(world: World) -> None:
    host = await world.started()
    host.gates["release"] = gate = asyncio.Event()

    await left_by_its_caller(asyncio.create_task(world.instances.stop("one")), host, gate)

    assert host.released
    assert world.instances.all() == []
    assert world.left() == []


async def test_a_park_ends_as_begun_also_when_its_caller_leaves(world: World) -> None:
    host = await world.started()
    host.gates["drain"] = gate = asyncio.Event()

    await left_by_its_caller(asyncio.create_task(world.instances.park("one")), host, gate)

    assert world.instances.get("one").state is State.PARKED
    assert not host.released


async def test_a_resume_ends_as_begun_also_when_its_caller_leaves(world: World) -> None:
    host = await world.started()
    await world.instances.park("one")
    host.gates["thaw"] = gate = asyncio.Event()

    await left_by_its_caller(asyncio.create_task(world.instances.resume("one")), host, gate)

    assert world.instances.get("one").state is State.SERVING
    assert not host.released


async def test_a_start_is_undone_when_its_caller_leaves(world: World) -> None:
    host = world.hosts.host
    host.gates["load"] = gate = asyncio.Event()
    world.instances.admit(an_instance(State.STARTING))

    await left_by_its_caller(asyncio.create_task(world.instances.start("one", MODEL)), host, gate)

    assert host.released
    assert world.instances.get("one").state is State.FAILED
    assert world.left() == []


async def test_a_stop_that_failed_is_told_and_can_be_repeated(world: World) -> None:
    host = await world.started()
    host.failing = {"release"}

    with pytest.raises(Aborted, match="release"):
        await world.instances.stop("one")
    assert world.instances.get("one").state is State.FAILED
    assert world.instances.get("one").failure_reason == "HOST_TIMEOUT"

    host.failing = set()
    await world.instances.stop("one")
    assert host.released
    with pytest.raises(NotFound):
        world.instances.get("one")


async def test_a_stop_of_what_failed_waits_until_its_process_is_gone(world: World) -> None:
    host = await world.started()
    host.gates["release"] = gate = asyncio.Event()
    host.lost.set()
    await host.reached.wait()
    assert world.instances.get("one").state is State.FAILED
    with pytest.raises(AlreadyExists):
        world.instances.admit(an_instance(State.STARTING))

    stop = asyncio.create_task(world.instances.stop("one"))
    # Every turn that it could take without the gate.
    for _ in range(20):
        await asyncio.sleep(0)
    assert not stop.done()
    gate.set()
    await stop

    assert host.released
    assert world.instances.all() == []


async def test_a_stop_in_the_middle_of_a_park_waits_until_that_has_unwound(world: World) -> None:
    host = await world.started()
    host.gates["freeze"] = asyncio.Event()
    parking = asyncio.create_task(world.instances.park("one"))
    await host.reached.wait()

    await world.instances.stop("one")

    with pytest.raises(Aborted):
        await parking
    assert host.released
    assert world.instances.all() == []


async def test_a_stop_at_the_very_end_of_another_job_is_not_taken_for_its_end(world: World) -> None:
    host = await world.started()
    host.gates["freeze"] = gate = asyncio.Event()
    host.gates["release"] = held = asyncio.Event()
    parking = asyncio.create_task(world.instances.park("one"))
    await host.reached.wait()
    # Its first step comes when the job is done and nobody has heard of that yet.
    gate.set()
    stop = asyncio.create_task(world.instances.stop("one"))
    await asyncio.wait([parking])

    assert world.instances.get("one").state is State.STOPPING
    held.set()
    await stop
    assert host.released


@pytest.mark.parametrize("state", [State.STARTING, State.RESTORING, State.STOPPING])
async def test_what_was_not_finished_is_not_taken_over(world: World, state: State) -> None:
    # given: a host that could serve, but whose canary nobody compared or whose end somebody wanted
    world.instances.journal.write(an_instance(state))
    (world.directory / "instances" / "one").mkdir()
    world.hosts.found = [FakeHost("one")]

    await world.instances.take_over()

    assert world.hosts.found[0].released
    assert world.instances.all() == []
    assert world.left() == []


@pytest.mark.parametrize(
    ("state", "frozen", "expected"),
    [
        (State.SERVING, False, State.SERVING),
        (State.CAPTURING, False, State.SERVING),
        (State.PARKING, False, State.SERVING),
        (State.PARKING, True, State.PARKED),
        (State.PARKED, True, State.PARKED),
        (State.RESUMING, True, State.PARKED),
        (State.RESUMING, False, State.SERVING),
    ],
)
async def test_what_was_whole_is_taken_over(
    world: World, state: State, frozen: bool, expected: State
) -> None:
    world.instances.journal.write(replace(an_instance(state), pid=7))
    host = FakeHost("one")
    host.frozen = frozen
    world.hosts.found = [host]

    await world.instances.take_over()

    assert (world.instances.get("one").state, world.instances.get("one").pid) == (expected, host.pid)
    assert not host.released


async def test_an_instance_holds_its_weights_for_as_long_as_it_has_a_process(world: World) -> None:
    await world.started()
    assert world.weights.held == {"one": FILES}
    assert world.instances.get("one").weight_files == FILES

    await world.instances.stop("one")
    assert world.weights.held == {}


async def test_weights_are_let_go_when_a_start_fails_and_when_a_process_dies(world: World) -> None:
    world.hosts.host.failing = {"load"}
    world.instances.admit(an_instance(State.STARTING))
    with pytest.raises(Aborted):
        await world.instances.start("one", MODEL)
    assert world.weights.held == {}

    world.hosts.host.failing = set()
    host = await world.started()
    async with world.instances.changes() as changes:
        host.lost.set()
        while (change := await changes.get()).instance is None or change.instance.state is not State.FAILED:
            pass
    await world.instances.stop("one")
    assert world.weights.held == {}


async def test_an_instance_taken_over_holds_its_weights_again(world: World) -> None:
    world.instances.journal.write(replace(an_instance(State.SERVING), weight_files=FILES))
    world.hosts.found = [FakeHost("one")]

    await world.instances.take_over()

    assert world.weights.held == {"one": FILES}


async def test_weights_that_a_snapshot_is_to_carry_are_loaded_from_their_own_files(world: World) -> None:
    world.instances.admit(replace(an_instance(State.STARTING), weights=Weights.INCLUDED))

    instance = await world.instances.start("one", MODEL)

    assert world.weights.held == {}
    assert (instance.weights, instance.weights_digest) == (Weights.INCLUDED, "digest")


async def test_what_cannot_be_ended_does_not_keep_the_daemon_from_starting(world: World) -> None:
    world.instances.journal.write(an_instance(State.STOPPING))
    stubborn, stranger = FakeHost("one"), FakeHost("two")
    stubborn.failing = stranger.failing = {"release"}
    world.hosts.found = [stubborn, stranger]
    (world.directory / "instances" / "given-up").mkdir()

    await world.instances.take_over()

    assert world.instances.all() == []
    assert world.left() == []


async def test_an_instance_moves_on_when_the_journal_cannot_be_written(world: World) -> None:
    await world.started()
    world.instances.journal.directory = world.directory / "gone"

    assert (await world.instances.park("one")).state is State.PARKED


async def test_a_start_that_takes_too_long_is_undone_and_says_so(world: World) -> None:
    # Given a model host that never answers its load, as one whose model lies on a mount that hangs
    instances = instances_of(replace(world.instances.node, deadlines=Deadlines(start=0.05)))
    world.hosts.host.gates["load"] = asyncio.Event()
    instances.admit(an_instance(State.STARTING))

    with pytest.raises(DeadlineExceeded) as refused:
        await instances.start("one", MODEL)

    assert refused.value.reason == "START_TIMEOUT"
    assert instances.get("one").state is State.FAILED
    assert instances.get("one").failure_reason == "START_TIMEOUT"
    assert world.hosts.host.released
    assert world.left() == []


async def test_a_job_that_ends_by_a_defect_does_not_seem_to_go_on(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    await world.started()

    async def defect(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("snapshotd.instances.manager.run_job", defect)
    with pytest.raises(Internal):
        await world.instances.park("one")

    assert world.instances.get("one").state is State.SERVING


@pytest.mark.parametrize("parked", [False, True])
async def test_an_instance_whose_mapped_weights_are_overwritten_is_ended(world: World, parked: bool) -> None:
    # Given one that maps a file of its model
    host = await world.started()
    if parked:
        await world.instances.park("one")
    record = world.instances._record("one")
    record.instance = replace(record.instance, mapped_files=(MAPPED,))

    # When nobody wrote to it, nothing happens
    await world.instances.check_weights()
    assert not host.released

    # When somebody did
    world.weights.written = MAPPED.path
    await world.instances.check_weights()

    # Then it ends, and says of which file
    assert host.released
    failed = world.instances.get("one")
    assert (failed.state, failed.failure_reason) == (State.FAILED, "WEIGHTS_OVERWRITTEN")
    assert MAPPED.path in failed.failure_message
    assert world.left() == []


async def test_overwritten_weights_are_neither_resumed_nor_captured(world: World) -> None:
    await world.started()
    await world.instances.park("one")
    record = world.instances._record("one")
    record.instance = replace(record.instance, mapped_files=(MAPPED,))
    world.weights.written = MAPPED.path

    with pytest.raises(FailedPrecondition) as refused:
        await world.instances.resume("one")

    assert refused.value.reason == "WEIGHTS_OVERWRITTEN"
    assert world.instances.get("one").state is State.FAILED
