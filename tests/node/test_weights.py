"""Weights in the node's cache, and weights in the snapshot itself, with real CRIU and a real model."""

from __future__ import annotations

import shutil
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import pytest_asyncio

from snapshotd.model import Instance, Snapshot, Weights
from snapshotd.system.mounts import WEIGHTS_MOUNT
from snapshotd.weights import mount
from snapshotd.weights.cache import occupied
from tests.node.node_under_test import NodeUnderTest, refused

pytestmark = [pytest.mark.node, pytest.mark.asyncio(loop_scope="module")]

NAME = "model.safetensors"


@pytest.fixture(scope="module")
def model(instruct_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy that a test may change."""
    copied = tmp_path_factory.mktemp("models") / "copy"
    shutil.copytree(instruct_model, copied)
    return copied


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def node(
    criu: Path, model: Path, tmp_path_factory: pytest.TempPathFactory
) -> AsyncIterator[NodeUnderTest]:
    """A node with room for the weights of one model."""
    budget = occupied((model / NAME).stat().st_size)
    under_test = NodeUnderTest(tmp_path_factory.mktemp("node"), model, weight_budget=budget)
    yield under_test
    await under_test.close()
    assert not mount.mounted(under_test.state_dir / "weights")


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def snapshot(node: NodeUnderTest) -> AsyncIterator[Snapshot]:
    """Of an instance that mapped its weights from the cache and is gone."""
    instance = await node.start("source")
    assert mapped(instance) == {f"{WEIGHTS_MOUNT}/{digest}" for digest in instance.weight_files.values()}
    captured = await node.instances.capture("source", "detached")
    node.answer = await node.generate("source")
    await node.instances.stop("source")
    yield captured


def mapped(instance: Instance) -> set[str]:
    """The weight files that its process maps, as it sees them."""
    lines = Path(f"/proc/{instance.pid}/maps").read_text().splitlines()
    paths = {line.partition("/")[1] + line.partition("/")[2] for line in lines}
    return {path for path in paths if path.startswith(WEIGHTS_MOUNT) or NAME in path}


def cached(node: NodeUnderTest) -> list[str]:
    return sorted(path.name for path in (node.state_dir / "weights").iterdir())


async def test_a_restored_instance_maps_the_cached_weights_again(
    node: NodeUnderTest, snapshot: Snapshot
) -> None:
    assert list(snapshot.manifest.weight_files) == [NAME]

    instance = await node.restore("back", snapshot)

    assert mapped(instance) == {f"{WEIGHTS_MOUNT}/{snapshot.manifest.weight_files[NAME]}"}
    assert await node.generate("back") == node.answer
    await node.stop_all()


async def test_two_instances_share_one_copy(node: NodeUnderTest, snapshot: Snapshot) -> None:
    await node.restore("one", snapshot)
    await node.restore("two", snapshot)
    assert cached(node) == list(snapshot.manifest.weight_files.values())
    await node.stop_all()


async def test_no_instance_can_write_to_the_cache(node: NodeUnderTest, snapshot: Snapshot) -> None:
    started, restored = await node.start("started"), await node.restore("restored", snapshot)
    for instance in (started, restored):
        mounts = Path(f"/proc/{instance.pid}/mountinfo").read_text().splitlines()
        flags = [line.split()[5].split(",") for line in mounts if line.split()[4] == WEIGHTS_MOUNT]
        assert ["ro" in found for found in flags] == [True]
    await node.stop_all()


async def test_weights_that_left_the_cache_are_filled_again_for_a_restore(
    node: NodeUnderTest, snapshot: Snapshot, tmp_path: Path
) -> None:
    # given: another model took the room
    other = other_model(node.model, tmp_path)
    await node.start("other", other)
    await node.instances.stop("other")
    assert cached(node) != list(snapshot.manifest.weight_files.values())

    instance = await node.restore("refilled", snapshot)

    assert cached(node) == list(snapshot.manifest.weight_files.values())
    assert mapped(instance)
    assert await node.generate("refilled") == node.answer
    await node.stop_all()


async def test_weights_in_use_stay_and_what_does_not_fit_reads_its_own_files(
    node: NodeUnderTest, snapshot: Snapshot, tmp_path: Path
) -> None:
    await node.restore("user", snapshot)

    instance = await node.start("guest", other_model(node.model, tmp_path))

    assert mapped(instance) == {str(tmp_path / "other" / NAME)}
    assert cached(node) == list(snapshot.manifest.weight_files.values())
    assert await node.generate("user") == node.answer
    await node.stop_all()


async def test_a_restore_whose_weights_find_no_room_is_refused(
    node: NodeUnderTest, snapshot: Snapshot, tmp_path: Path
) -> None:
    # given: an instance of another model uses all of the cache
    await node.start("big", other_model(node.model, tmp_path))
    before = await node.remains()

    error = await refused(node.restore("small", snapshot))

    assert error.reason == "WEIGHTS_NOT_CACHED"
    await node.instances.stop("small")
    assert await node.remains() == before
    await node.stop_all()


async def test_a_restore_leaves_no_hold_on_the_cache_when_it_fails(
    node: NodeUnderTest, snapshot: Snapshot, tmp_path: Path
) -> None:
    for step in ("check", "verify", "weights", "criu", "canary"):
        node.failpoints.actions[f"restore.{step}.after"] = "error"
        assert (await refused(node.restore("doomed", snapshot))).reason == "FAILPOINT"
        node.failpoints.actions.clear()
        await node.instances.stop("doomed")

    # then: another model finds the room
    instance = await node.start("other", other_model(node.model, tmp_path))
    assert instance.weight_files
    await node.stop_all()


async def test_a_changed_weight_file_is_refused_by_name_and_leaves_nothing(
    node: NodeUnderTest, snapshot: Snapshot
) -> None:
    weights = node.model / NAME
    kept = weights.with_suffix(".kept")
    weights.rename(kept)
    data = bytearray(kept.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)
    before = await node.remains()
    try:
        error = await refused(node.restore("changed", snapshot))
    finally:
        kept.replace(weights)

    assert error.reason == "INCOMPATIBLE"
    assert error.metadata["fact"] == "weights"
    await node.instances.stop("changed")
    assert await node.remains() == before
    await node.restore("again", snapshot)
    assert await node.generate("again") == node.answer
    await node.stop_all()


async def test_included_weights_come_back_without_the_model(node: NodeUnderTest, snapshot: Snapshot) -> None:
    # given: a source whose snapshot carries its weights, and no model
    instance = await node.start("whole", weights=Weights.INCLUDED)
    assert mapped(instance) == set()
    captured = await node.instances.capture("whole", "included")
    await node.instances.stop("whole")
    assert captured.manifest.weights is Weights.INCLUDED
    assert captured.manifest.compatibility["weights"] == snapshot.manifest.compatibility["weights"]
    assert captured.size > snapshot.size + 0.9 * (node.model / NAME).stat().st_size
    hidden = node.model.rename(node.model.with_name("hidden"))
    try:
        # when
        back = await node.restore("back", captured)

        # then
        assert back.weights is Weights.INCLUDED
        assert await node.generate("back") == node.answer
        await node.instances.stop("back")
        assert (await refused(node.restore("none", snapshot))).reason == "MODEL_NOT_FOUND"
    finally:
        hidden.rename(node.model)
    await node.stop_all()


async def test_what_was_restored_with_its_weights_is_captured_with_them_again(
    node: NodeUnderTest, snapshot: Snapshot
) -> None:
    await node.restore("first", await node.store.get("included"))
    again = await node.instances.capture("first", "included-again")
    await node.instances.stop("first")

    await node.restore("second", again)

    assert again.manifest.weights is Weights.INCLUDED
    assert await node.generate("second") == node.answer
    await node.stop_all()


def other_model(model: Path, folder: Path) -> Path:
    """The same model but for one bit of its weights."""
    other = folder / "other"
    shutil.copytree(model, other)
    data = bytearray((other / NAME).read_bytes())
    data[-1] ^= 1
    (other / NAME).write_bytes(data)
    return other
