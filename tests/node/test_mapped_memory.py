"""Restored processes map their memory from the snapshot's files, and the node around them changes."""

from __future__ import annotations

import subprocess
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest
import pytest_asyncio

from dumont.errors import Aborted
from snapshotd.model import Snapshot
from snapshotd.system.mounts import MEMORY_MOUNT
from tests.node.node_under_test import NodeUnderTest, refused

pytestmark = [pytest.mark.node, pytest.mark.asyncio(loop_scope="module")]


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def node(
    criu: Path, instruct_model: Path, tmp_path_factory: pytest.TempPathFactory
) -> AsyncIterator[NodeUnderTest]:
    under_test = NodeUnderTest(tmp_path_factory.mktemp("node"), instruct_model)
    yield under_test
    await under_test.close()


@pytest.fixture(scope="module")
def volume(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A volume that has nothing to do with any model host."""
    folder = tmp_path_factory.mktemp("volume")
    subprocess.run(["mount", "-t", "tmpfs", "somebody-elses", str(folder)], check=True)
    yield folder
    subprocess.run(["umount", str(folder)], check=False, capture_output=True)


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def snapshot(node: NodeUnderTest, volume: Path) -> Snapshot:
    await node.start("source")
    captured = await node.instances.capture("source", "first")
    node.answer = await node.generate("source")
    await node.instances.stop("source")
    return captured


def memory_files(pid: int) -> set[str]:
    return {
        line.split()[-1] for line in Path(f"/proc/{pid}/maps").read_text().splitlines() if "memory-" in line
    }


def take_away(volume: Path) -> None:
    subprocess.run(["umount", str(volume)], check=True)
    volume.rmdir()


async def test_replicas_map_one_file(node: NodeUnderTest, snapshot: Snapshot) -> None:
    one = await node.restore("one", snapshot)
    two = await node.restore("two", snapshot)

    assert memory_files(one.pid) == memory_files(two.pid) != set()
    assert await node.generate("one") == await node.generate("two") == node.answer
    await node.stop_all()


async def test_the_files_cannot_be_written_by_those_who_map_them(
    node: NodeUnderTest, snapshot: Snapshot
) -> None:
    instance = await node.restore("reader", snapshot)

    lines = Path(f"/proc/{instance.pid}/mountinfo").read_text().splitlines()
    (options,) = [line.split()[5] for line in lines if line.split()[4] == MEMORY_MOUNT]

    assert "ro" in options.split(",")
    await node.stop_all()


async def test_what_replicas_write_stays_theirs(node: NodeUnderTest, snapshot: Snapshot) -> None:
    memory = await node.store.images(snapshot) / "memory-1.img"
    before = memory.stat().st_mtime_ns
    await node.restore("writer", snapshot)
    await node.generate("writer")

    await node.store.verify(snapshot, again=True)  # reads every byte

    assert memory.stat().st_mtime_ns == before
    await node.stop_all()


async def test_a_volume_that_was_there_at_capture_is_not_missed(
    node: NodeUnderTest, snapshot: Snapshot, volume: Path
) -> None:
    # given a snapshot of a process that saw the volume and used nothing on it
    assert str(volume) in snapshot.manifest.mounts

    # when it is gone, with the folder that it was mounted on
    take_away(volume)

    # then the process comes back, and can be captured and brought back from there on
    await node.restore("without", snapshot)
    second = await node.instances.capture("without", "second")
    assert str(volume) not in second.manifest.mounts
    assert await node.generate("without") == node.answer
    await node.instances.stop("without")
    await node.restore("again", second)
    assert await node.generate("again") == node.answer
    await node.stop_all()


async def test_a_deleted_snapshot_leaves_its_instances_serving_but_not_captured(
    node: NodeUnderTest, snapshot: Snapshot
) -> None:
    await node.restore("orphan", snapshot)
    await node.store.delete("first")

    error = await refused(node.instances.capture("orphan", "third"))

    assert error.reason == "ORIGIN_GONE"
    assert isinstance(error, Aborted)
    assert await node.generate("orphan") == node.answer
    await node.stop_all()


async def test_a_snapshot_of_a_restored_process_needs_no_earlier_one(node: NodeUnderTest) -> None:
    # given a snapshot of an instance that was restored from one
    await node.start("first-generation")
    first = await node.instances.capture("first-generation", "parent")
    await node.instances.stop("first-generation")
    await node.restore("second-generation", first)
    child = await node.instances.capture("second-generation", "child")
    await node.instances.stop("second-generation")

    # when the earlier one is deleted
    await node.store.delete("parent")

    # then the later one restores
    await node.restore("third-generation", child)
    assert await node.generate("third-generation") == node.answer
    await node.stop_all()
