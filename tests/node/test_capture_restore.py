"""Capture and restore with real CRIU and a real model."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import socket
import struct
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import pytest_asyncio

from snapshotd.adapters.criu_shim import host as shim_host
from snapshotd.adapters.criu_shim.host import ShimHost
from snapshotd.adapters.snapshot_store.directory import DirectoryStore
from snapshotd.jobs import Capture
from snapshotd.model import Snapshot, State
from tests.node.node_under_test import NodeUnderTest, refused

pytestmark = [pytest.mark.node, pytest.mark.asyncio(loop_scope="module")]

# One start costs seconds, a restore tenths: what can be restored is not started again.
CAPTURE_STEPS = ["stage", "prepare", "drain", "quiesce", "dump", "wake", "compact", "verify", "commit"]
# From the kernel's ptrace.h.
PTRACE_SEIZE = 0x4206
RESTORE_STEPS = ["check", "verify", "weights", "directory", "criu", "wake", "canary", "serve"]


@contextlib.contextmanager
def traced(pid: int) -> Iterator[None]:
    """Another process traces ``pid``, which runs on."""
    code = f"import ctypes; print(ctypes.CDLL(None).ptrace({PTRACE_SEIZE}, {pid}, 0, 0), flush=True); input()"
    with subprocess.Popen(
        [sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as tracer:
        assert tracer.stdout is not None
        assert tracer.stdout.readline() == "0\n"
        yield
        tracer.communicate("\n")


def waiting_criu(host: ShimHost) -> int:
    """The process of CRIU that a shim has started for a restore to come."""
    peer = host._writer.get_extra_info("socket").getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12)
    shim, _, _ = struct.unpack("iII", peer)
    deadline = time.monotonic() + 10
    while time.monotonic() < deadline:
        # Between fork and exec it still has the shim's name.
        children = Path(f"/proc/{shim}/task/{shim}/children").read_text().split()
        for pid in children:
            if Path(f"/proc/{pid}/comm").read_text().strip() == "criu":
                return int(pid)
        time.sleep(0.01)
    raise AssertionError(f"shim {shim} started no CRIU within 10 s")


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def node(
    criu: Path, small_model: Path, tmp_path_factory: pytest.TempPathFactory
) -> AsyncIterator[NodeUnderTest]:
    under_test = NodeUnderTest(tmp_path_factory.mktemp("node"), small_model)
    yield under_test
    await under_test.close()


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def snapshot(node: NodeUnderTest) -> AsyncIterator[Snapshot]:
    """A snapshot of an instance that is gone; ``node.answer`` is what it answered."""
    await node.start("source")
    # Its generators are in use, as an engine's may be: what they would draw next is in the snapshot.
    await node.draws("source")
    captured = await node.instances.capture("source", "first")
    node.answer = await node.generate("source")
    node.source_pid = node.instances.get("source").pid
    await node.instances.stop("source")
    yield captured


async def test_a_dead_process_comes_back_and_answers_the_same(
    node: NodeUnderTest, snapshot: Snapshot
) -> None:
    # given: the process of the first answer is gone
    assert not Path(f"/proc/{node.source_pid}").exists()

    # when
    instance = await node.restore("back", snapshot)

    # then
    assert instance.state is State.SERVING
    assert instance.pid != node.source_pid
    assert len(node.answer) > 2
    assert await node.generate("back") == node.answer
    await node.instances.stop("back")


async def test_two_replicas_at_once_answer_the_same_and_draw_differently(
    node: NodeUnderTest, snapshot: Snapshot
) -> None:
    await asyncio.gather(node.restore("twin-a", snapshot), node.restore("twin-b", snapshot))

    answers = await asyncio.gather(node.generate("twin-a"), node.generate("twin-b"))
    one, other = await asyncio.gather(node.draws("twin-a"), node.draws("twin-b"))

    assert list(answers) == [node.answer, node.answer]
    assert set(one) >= {"python", "numpy", "torch", "urandom", "openssl", "tempfile"}
    assert [name for name in one if one[name] == other[name]] == []
    await node.stop_all()


async def test_a_restored_instance_can_be_captured_three_times_over(
    node: NodeUnderTest, snapshot: Snapshot
) -> None:
    current = snapshot
    for generation in range(3):
        name = f"generation-{generation}"
        await node.restore(name, current)
        current = await node.instances.capture(name, name)
        assert await node.generate(name) == node.answer
        await node.instances.stop(name)

    await node.restore("great-grandchild", current)
    assert await node.generate("great-grandchild") == node.answer
    await node.stop_all()


async def test_one_instance_can_be_captured_three_times(node: NodeUnderTest, snapshot: Snapshot) -> None:
    await node.restore("again", snapshot)
    captured = [await node.instances.capture("again", f"again-{number}") for number in range(3)]
    await node.instances.stop("again")

    await node.restore("last", captured[-1])
    assert await node.generate("last") == node.answer
    await node.stop_all()


async def test_a_parked_instance_does_not_run_and_resumes_as_it_was(
    node: NodeUnderTest, snapshot: Snapshot
) -> None:
    instance = await node.restore("sleeper", snapshot)
    await node.instances.park("sleeper")
    before = _cpu_ticks(instance.pid)
    assert node.instances.get("sleeper").state is State.PARKED
    assert (await refused(node.instances.park("sleeper"))).reason == "ILLEGAL_TRANSITION"
    assert _cpu_ticks(instance.pid) == before

    await node.instances.resume("sleeper")

    assert node.instances.get("sleeper").pid == instance.pid
    assert await node.generate("sleeper") == node.answer
    await node.instances.stop("sleeper")


async def test_an_instance_that_has_served_is_never_captured(node: NodeUnderTest, snapshot: Snapshot) -> None:
    await node.restore("served", snapshot)
    await node.generate("served", "a secret")

    assert (await refused(node.instances.capture("served", "secret"))).reason == "INSTANCE_SERVED"

    assert await node.generate("served") == node.answer
    assert "secret" not in [held.manifest.id for held in await node.store.list()]
    await node.stop_all()


@pytest.mark.parametrize("moment", ["", ".after"], ids=["before", "after"])
@pytest.mark.parametrize("step", CAPTURE_STEPS)
async def test_a_capture_that_fails_at_any_step_leaves_the_source_answering(
    node: NodeUnderTest, snapshot: Snapshot, step: str, moment: str
) -> None:
    instance = await node.restore("source-of-failure", snapshot)
    node.failpoints.actions[f"capture.{step}{moment}"] = "error"
    try:
        error = await refused(node.instances.capture("source-of-failure", "failed"))
    finally:
        node.failpoints.actions.clear()

    assert error.reason == "FAILPOINT"
    assert node.instances.get("source-of-failure").state is State.SERVING
    assert node.instances.get("source-of-failure").pid == instance.pid
    assert await node.generate("source-of-failure") == node.answer
    left = await node.remains()
    assert (left["staged"], left["page servers"]) == ([], [])
    assert "failed" not in [held.manifest.id for held in await node.store.list()]
    await node.stop_all()


async def test_a_capture_that_criu_refuses_at_once_leaves_the_source_answering(
    node: NodeUnderTest, snapshot: Snapshot
) -> None:
    # given: a process that another one traces already
    instance = await node.restore("traced", snapshot)
    with traced(instance.pid):
        # when
        error = await refused(node.instances.capture("traced", "failed"))

    # then
    assert (error.reason, error.metadata["step"]) == ("CRIU_FAILED", "capture.dump")
    assert await node.generate("traced") == node.answer
    left = await node.remains()
    assert (left["staged"], left["page servers"]) == ([], [])
    await node.stop_all()


@pytest.mark.parametrize("moment", ["", ".after"], ids=["before", "after"])
@pytest.mark.parametrize("step", RESTORE_STEPS)
async def test_a_restore_that_fails_at_any_step_leaves_nothing(
    node: NodeUnderTest, snapshot: Snapshot, step: str, moment: str
) -> None:
    await node.stop_all()
    before = await node.remains()
    node.failpoints.actions[f"restore.{step}{moment}"] = "error"
    try:
        error = await refused(node.restore("doomed", snapshot))
    finally:
        node.failpoints.actions.clear()

    assert error.reason == "FAILPOINT"
    assert error.metadata["step"] == f"restore.{step}"
    assert node.instances.get("doomed").state is State.FAILED
    assert await node.remains() == before
    await node.instances.stop("doomed")


async def test_the_steps_tested_are_all_there_are(node: NodeUnderTest, snapshot: Snapshot) -> None:
    instance = await node.restore("steps", snapshot)
    assert [phase.name for phase in instance.phases] == RESTORE_STEPS
    record = node.instances._record("steps")
    assert [step.name for step in Capture(node.node, record, "x").steps()] == CAPTURE_STEPS
    await node.stop_all()


async def test_a_shim_of_another_version_refuses_what_it_does_not_know_and_lives_on(
    node: NodeUnderTest, snapshot: Snapshot
) -> None:
    await node.restore("old", snapshot)
    host = node.instances._record("old").host
    assert isinstance(host, ShimHost)

    assert (await refused(host._ask({"do": "unheard of"}, 10))).reason == "SHIM_REFUSED"

    assert await node.generate("old") == node.answer
    await node.stop_all()


async def test_a_process_that_dies_is_noticed_and_cleaned_up(node: NodeUnderTest, snapshot: Snapshot) -> None:
    await node.stop_all()
    before = await node.remains()
    instance = await node.restore("mortal", snapshot)

    async with node.instances.changes() as changes:
        os.kill(instance.pid, 9)
        while (change := await changes.get()).instance is None or change.instance.state is not State.FAILED:
            pass
    assert change.instance.failure_reason == "HOST_LOST"
    assert "SIGKILL" in change.instance.failure_message
    await node.instances.stop("mortal")
    assert await node.remains() == before


async def test_a_process_that_ends_before_it_serves_says_why(
    node: NodeUnderTest, snapshot: Snapshot, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # given: a model host that cannot start
    await node.stop_all()
    before = await node.remains()
    (tmp_path / "sitecustomize.py").write_text("import os; print('not today', flush=True); os._exit(3)")
    environment = node.node.settings.environment
    assert isinstance(environment, dict)
    monkeypatch.setitem(environment, "PYTHONPATH", str(tmp_path))
    # when
    error = await refused(node.start("stillborn"))
    # then
    assert error.reason == "HOST_LOST"
    assert "exit status 3, and the last line of its log is: not today" in error.message
    await node.instances.stop("stillborn")
    assert await node.remains() == before


async def test_a_frozen_process_ends_when_its_shim_was_killed(
    node: NodeUnderTest, snapshot: Snapshot
) -> None:
    await node.stop_all()
    before = await node.remains()
    instance = await node.restore("orphan", snapshot)
    await node.instances.park("orphan")

    async with node.instances.changes() as changes:
        os.kill(_parent(instance.pid), 9)
        while (change := await changes.get()).instance is None or change.instance.state is not State.FAILED:
            pass
    await node.instances.stop("orphan")

    assert not _runs(instance.pid)
    assert (await node.remains())["groups"] == before["groups"]


async def test_a_shim_that_does_not_answer_is_ended_with_its_process(
    node: NodeUnderTest, snapshot: Snapshot, monkeypatch: pytest.MonkeyPatch
) -> None:
    # given: a shim that an earlier daemon left, and that hangs
    await node.stop_all()
    instance = await node.restore("hung", snapshot)
    shim = _parent(instance.pid)
    host = node.instances._record("hung").host
    assert isinstance(host, ShimHost)
    path = node.state_dir / "shims" / f"{host.shim}.sock"
    os.kill(shim, signal.SIGSTOP)
    monkeypatch.setattr(shim_host, "FIND_TIMEOUT", 0.1)

    # when
    assert await node.hosts._find(path) is None

    # then
    await host.lost.wait()
    await node.instances.stop("hung")
    assert not _runs(instance.pid)
    assert not list((node.state_dir / "shims").glob(f"*{host.shim}*"))


@pytest.mark.parametrize("damage", ["pages", "manifest"])
async def test_a_damaged_snapshot_is_refused_before_criu_and_leaves_nothing(
    node: NodeUnderTest, snapshot: Snapshot, damage: str
) -> None:
    await node.restore("donor", snapshot)
    captured = await node.instances.capture("donor", f"damaged-{damage}")
    await node.stop_all()
    before = await node.remains()
    path = await node.store.images(captured) / ("pages-1.img" if damage == "pages" else "manifest.json")
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 0x80
    path.write_bytes(data)
    assert isinstance(node.store, DirectoryStore)
    node.store._cache.clear()

    if damage == "pages":
        error = await refused(node.restore("victim", captured))
        assert error.reason == "IMAGE_DAMAGED"
        assert error.metadata["file"] == "pages-1.img"
        held = await node.store.get(captured.manifest.id)
        assert "pages-1.img" in held.quarantine_reason
        await node.instances.stop("victim")
        assert (await refused(node.restore("victim", held))).reason == "SNAPSHOT_QUARANTINED"
        await node.instances.stop("victim")
    else:
        error = await refused(node.store.get(captured.manifest.id))
        assert error.reason == "MANIFEST_DAMAGED"
        assert captured.manifest.id not in [held.manifest.id for held in await node.store.list()]
    assert await node.remains() == before


async def test_a_wrong_canary_ends_the_instance_and_quarantines_the_snapshot(
    node: NodeUnderTest, snapshot: Snapshot
) -> None:
    # given: a source that recorded another answer than its image gives
    instance = await node.restore("liar", snapshot)
    assert instance.canary is not None
    wrong = replace(instance.canary, tokens=tuple(token + 1 for token in instance.canary.tokens))
    node.instances._record("liar").instance = replace(instance, canary=wrong)
    captured = await node.instances.capture("liar", "lie")
    await node.stop_all()
    before = await node.remains()

    error = await refused(node.restore("believer", captured))

    assert error.reason == "CANARY_MISMATCH"
    assert (await node.store.get("lie")).quarantine_reason
    await node.instances.stop("believer")
    assert await node.remains() == before


def _runs(pid: int) -> bool:
    """False also when only its exit status is left, which is for its new parent to collect."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def _parent(pid: int) -> int:
    return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])


def _cpu_ticks(pid: int) -> int:
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return int(fields[11]) + int(fields[12])


async def test_a_restore_whose_criu_is_killed_is_tried_again(node: NodeUnderTest, snapshot: Snapshot) -> None:
    # Given a restore that CRIU is at
    assert node.hosts._spare is not None
    spare = await asyncio.shield(node.hosts._spare)
    criu = waiting_criu(spare)
    os.kill(criu, signal.SIGSTOP)
    restoring = asyncio.create_task(node.restore("again", snapshot))
    while not node.node.instance_directory("again").exists():  # noqa: ASYNC110
        await asyncio.sleep(0.01)
    await asyncio.sleep(0.2)

    # When it is killed
    os.kill(criu, signal.SIGKILL)

    # Then another one does it
    instance = await restoring
    assert instance.state is State.SERVING
    assert await node.generate("again") == node.answer
    await node.instances.stop("again")


async def test_criu_that_was_killed_is_not_told_as_one_that_took_too_long(
    node: NodeUnderTest, snapshot: Snapshot, tmp_path: Path
) -> None:
    host = await node.hosts.take()
    criu = waiting_criu(host)
    os.kill(criu, signal.SIGKILL)
    images = await node.store.images(snapshot)
    manifest = snapshot.manifest

    error = await refused(
        host.restore("gone", tmp_path, images, images, manifest.mounts, manifest.pipes, 120)
    )

    assert error.reason == "CRIU_LOST"
    assert "120 s" not in error.message
    await host.release()
