"""What the node's Hosts and their Host promise: hosts in memory, and real shims over a real process."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from dumont.errors import DumontError
from snapshotd.adapters.criu_shim.pool import ShimPool
from snapshotd.ports import Host, Hosts
from snapshotd.preflight import find_criu
from tests.unit.snapshotd.instances.instances_world import FakeHost, FakeHosts

# Stands in for a model host: it answers every command but those with a meaning of their own.
PROCESS = """
import json, os, time
answers = os.fdopen(4, "w")
for line in os.fdopen(3, closefd=False):
    command = json.loads(line)
    answer = {"ok": {}}
    if command["do"] == "stay silent":
        continue
    if command["do"] == "hang up":
        os.close(3)
    if command["do"] == "refuse":
        answer = {"error": {"code": "FAILED_PRECONDITION", "reason": "NOT_NOW", "message": "not now"}}
    print(json.dumps({"id": command["id"], **answer}), file=answers, flush=True)
    if command["do"] == "hang up":
        time.sleep(1)
        os._exit(4)
"""
COMMAND = (sys.executable, "-c", PROCESS)


class World:
    """A node's hosts in memory."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.hosts: Hosts = FakeHosts()

    async def launched(self) -> Host:
        """A host that holds the instance ``one``."""
        host = await self.hosts.take()
        await host.launch("one", self.directory, COMMAND, dict(os.environ))
        return host

    def kill(self, host: Host) -> None:
        """The process of a host ends by itself."""
        assert isinstance(host, FakeHost)
        host.die("ended by SIGKILL")

    async def next_daemon(self) -> None:
        """Let go of the hosts, as a daemon does at its end; from now on they are those of the next one."""
        await self.hosts.close()


class RealWorld(World):
    """Shims with real processes."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.shims = directory.with_name("shims")
        self.shims.mkdir(mode=0o700)
        self.hosts = self._pool()

    def _pool(self) -> ShimPool:
        found, _ = find_criu()
        assert found is not None
        return ShimPool(self.shims, found.binary, found.pycriu)

    def kill(self, host: Host) -> None:
        os.kill(host.pid, signal.SIGKILL)

    async def next_daemon(self) -> None:
        await self.hosts.close()
        self.hosts = self._pool()


@pytest.fixture(params=["memory", pytest.param("shims", marks=pytest.mark.node)])
async def world(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[World]:
    (directory := tmp_path / "one").mkdir()
    if request.param == "shims":
        request.getfixturevalue("criu")
    made = World(directory) if request.param == "memory" else RealWorld(directory)
    yield made
    await release_all(made)


@pytest.fixture
async def real(criu: Path, tmp_path: Path) -> AsyncIterator[RealWorld]:
    """For what only a process can do."""
    (directory := tmp_path / "one").mkdir()
    made = RealWorld(directory)
    yield made
    await release_all(made)


async def release_all(world: World) -> None:
    await world.next_daemon()
    for host in await world.hosts.find():
        await host.release()
    await world.hosts.close()


async def refused(host: Host, command: str, timeout: float = 10.0) -> DumontError:
    """The error that a command ends with."""
    with pytest.raises(DumontError) as refusal:
        await host.call(command, timeout)
    return refusal.value


async def test_a_host_is_taken_empty(world: World) -> None:
    host = await world.hosts.take()
    assert (host.instance, host.pid, host.end, host.lost.is_set()) == ("", 0, "", False)
    await host.release()


async def test_every_host_is_taken_once(world: World) -> None:
    one, other = await asyncio.gather(world.hosts.take(), world.hosts.take())
    assert one is not other
    await asyncio.gather(one.release(), other.release())


async def test_a_launched_host_answers_commands(world: World) -> None:
    host = await world.launched()

    assert host.instance == "one"
    assert host.pid > 0
    assert await host.call("drain", 10.0) == {}
    status = await host.status()
    assert (status["instance"], status["frozen"], status["exit_status"]) == ("one", False, None)
    await host.release()


async def test_a_command_that_is_not_answered_is_given_up_and_the_next_one_works(world: World) -> None:
    host = await world.launched()
    assert (await refused(host, "stay silent", 0.2)).reason == "HOST_TIMEOUT"
    assert await host.call("drain", 10.0) == {}
    await host.release()


async def test_a_process_that_ended_answers_nothing_and_how_it_ended_is_known(world: World) -> None:
    host = await world.launched()

    world.kill(host)

    await asyncio.wait_for(host.lost.wait(), 10)
    assert (await refused(host, "drain")).reason == "HOST_LOST"
    assert host.end == "ended by SIGKILL"
    await host.release()


async def test_a_frozen_process_is_frozen_until_it_is_thawed(world: World) -> None:
    host = await world.launched()
    await host.freeze()
    assert (await host.status())["frozen"]
    await host.thaw()
    assert not (await host.status())["frozen"]
    assert await host.call("drain", 10.0) == {}
    await host.release()


async def test_a_released_host_is_gone_with_its_process(world: World) -> None:
    host = await world.launched()
    await host.release()
    assert host.lost.is_set()
    await world.next_daemon()
    assert list(await world.hosts.find()) == []


async def test_what_runs_is_found_by_the_next_daemon_and_what_is_empty_is_not(world: World) -> None:
    host = await world.launched()
    await world.hosts.take()
    await world.next_daemon()

    (found,) = await world.hosts.find()

    assert (found.instance, found.pid) == ("one", host.pid)
    assert await found.call("drain", 10.0) == {}


@pytest.mark.node
async def test_a_refusal_comes_with_its_reason(real: RealWorld) -> None:
    host = await real.launched()
    error = await refused(host, "refuse")
    assert (error.code, error.reason) == ("FAILED_PRECONDITION", "NOT_NOW")
    await host.release()


@pytest.mark.node
async def test_a_command_to_a_process_that_is_ending_is_answered_with_how_it_ended(real: RealWorld) -> None:
    # given: it reads no commands any more, and has not ended yet
    host = await real.launched()
    await host.call("hang up", 10.0)
    assert not host.lost.is_set()

    error = await refused(host, "drain")

    assert error.reason == "HOST_LOST"
    assert "exit status 4" in error.message
    await host.release()


async def test_a_shim_that_ends_while_it_is_asked_is_forgotten(tmp_path: Path) -> None:
    # Given a shim that lets go of whoever connects, as one does that is ending
    def end(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.close()

    path = tmp_path / "shim-ends.sock"
    server = await asyncio.start_unix_server(end, path)
    pool = ShimPool(tmp_path, Path("criu"), None)

    # When the next daemon looks for what runs
    found = await pool.find()

    # Then it is no longer there, and nothing of it is left
    assert found == []
    assert list(tmp_path.iterdir()) == []
    server.close()
