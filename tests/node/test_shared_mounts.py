"""A node whose mounts are shared, as systemd makes them everywhere and Docker for its volumes."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.node.daemon import Daemon
from tests.node.store_nodes import capture, restore

pytestmark = pytest.mark.node

# Shared with no namespace that is there already: what others mount meanwhile does not come in. What they had
# mounted before may go, when its directory is deleted.
SHARED = ("unshare", "--mount", "sh", "-c", 'mount --make-rshared / && exec "$@"', "sh")


@pytest.fixture
def daemon(criu: Path, free_port: Callable[[], int], tmp_path: Path) -> Iterator[Daemon]:
    with Daemon(tmp_path / "state", free_port(), "--stop-instances-on-exit", within=SHARED) as running:
        yield running


def mounts(pid: int) -> set[str]:
    return set(Path(f"/proc/{pid}/mountinfo").read_text().splitlines())


def test_instances_are_captured_restored_and_captured_again(daemon: Daemon, instruct_model: Path) -> None:
    # given: mounts that others follow
    assert daemon.process is not None
    mounted = mounts(daemon.process.pid)
    assert any(" shared:" in mount for mount in mounted)

    # when: one that was restored is captured in turn
    daemon.start_instance("first", instruct_model)
    capture(daemon, "first", "one")
    answer = daemon.generate("first")
    restore(daemon, "second", "one")
    capture(daemon, "second", "two")
    restore(daemon, "third", "two")

    # then
    assert [daemon.generate("second"), daemon.generate("third")] == [answer, answer]
    # and nothing of theirs is mounted on the node
    assert mounts(daemon.process.pid) <= mounted
