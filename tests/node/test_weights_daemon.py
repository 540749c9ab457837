"""The weight cache of a snapshotd outlives its daemon while instances use it, and nodes have one each."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from snapshotd.weights import mount
from snapshotd.weights.cache import occupied
from tests.node.daemon import Daemon
from tests.node.store_nodes import StoreNodes, capture, publish, refused, restore

pytestmark = pytest.mark.node

NAME = "model.safetensors"


@pytest.fixture(scope="module")
def room(small_model: Path) -> str:
    """A budget for the weights of one model, in bytes."""
    return str(occupied((small_model / NAME).stat().st_size))


@pytest.fixture
def daemon(criu: Path, free_port: Callable[[], int], tmp_path: Path, room: str) -> Iterator[Daemon]:
    """Its instances outlive it."""
    with Daemon(tmp_path / "state", free_port(), "--weight-cache-bytes", room) as running:
        yield running


def cached(daemon: Daemon) -> list[str]:
    return sorted(path.name for path in (daemon.state_dir / "weights").iterdir())


def mapped(pid: int) -> bool:
    """Whether a process maps weights from its node's cache."""
    return "/run/dumont-weights/" in Path(f"/proc/{pid}/maps").read_text()


def test_what_an_instance_uses_is_there_after_a_crash_and_stays(
    daemon: Daemon, small_model: Path, tmp_path: Path
) -> None:
    # given: an instance, a crash, and a file that was not whole yet
    daemon.start_instance("one", small_model)
    answer = daemon.generate("one")
    [digest] = cached(daemon)
    daemon.kill()
    (daemon.state_dir / "weights" / ".partial-1").write_bytes(b"half")

    # when
    daemon.start()

    # then: the cache is the same one, and another model finds no room in it
    assert cached(daemon) == [digest]
    assert not mapped(daemon.start_instance("two", another(small_model, tmp_path)).pid)
    assert mapped(daemon.get("one").pid)
    assert daemon.generate("one") == answer
    daemon.stop_instance("two")
    daemon.stop_instance("one")


def test_its_memory_is_given_back_at_exit_unless_an_instance_uses_it(
    daemon: Daemon, small_model: Path
) -> None:
    daemon.start_instance("one", small_model)
    assert daemon.terminate() == 0
    assert mount.mounted(daemon.state_dir / "weights")

    daemon.start()
    assert daemon.generate("one")
    daemon.stop_instance("one")
    assert daemon.terminate() == 0

    assert not mount.mounted(daemon.state_dir / "weights")
    daemon.start()


def test_a_daemon_without_a_cache_unmounts_that_of_an_earlier_one(daemon: Daemon, small_model: Path) -> None:
    daemon.start_instance("one", small_model)
    answer = daemon.generate("one")
    daemon.kill()
    flags, daemon.flags = daemon.flags, ()
    daemon.start()
    daemon.flags = flags

    assert not mount.mounted(daemon.state_dir / "weights")
    # Whoever maps its files keeps them alive.
    assert daemon.generate("one") == answer
    daemon.stop_instance("one")


def test_a_snapshot_finds_its_weights_in_the_cache_of_another_node(
    criu: Path, small_model: Path, free_port: Callable[[], int], tmp_path: Path, room: str
) -> None:
    nodes = StoreNodes(tmp_path, free_port, f"file://{tmp_path}/bucket")
    with nodes.node("a", "--weight-cache-bytes", room) as a:
        a.start_instance("source", small_model)
        capture(a)
        publish(a)
        nodes.answer = a.generate("source")
        nodes.trust("a")

    with nodes.node("b", "--weight-cache-bytes", room) as b:
        assert mapped(restore(b, "back").pid)
        assert b.generate("back") == nodes.answer

    with nodes.node("c") as c:
        assert refused(c, "back").reason == "WEIGHTS_NOT_CACHED"


def another(model: Path, folder: Path) -> Path:
    """The same model but for one bit of its weights."""
    other = folder / "other"
    shutil.copytree(model, other)
    data = bytearray((other / NAME).read_bytes())
    data[-1] ^= 1
    (other / NAME).write_bytes(data)
    return other
