"""The store's bench: what a failed step leaves behind."""

from __future__ import annotations

from typing import cast

import pytest

from dumont.benchmarks.daemon import Snapshotd
from dumont.benchmarks.store import capture_new
from dumont.errors import Unavailable


class FakeSnapshotd:
    """Instances and snapshots by id; publishing fails when it is told to."""

    def __init__(self, publishes: bool) -> None:
        self.publishes = publishes
        self.instances: set[str] = set()
        self.snapshots: set[str] = set()

    def start(self, instance: str, model: str) -> None:
        self.instances.add(instance)

    def stop(self, instance: str) -> None:
        self.instances.remove(instance)

    def capture(self, instance: str, snapshot: str) -> None:
        assert instance in self.instances
        assert snapshot not in self.snapshots
        self.snapshots.add(snapshot)

    def publish(self, snapshot: str) -> None:
        if not self.publishes:
            raise Unavailable("STORE_UNAVAILABLE", "down")

    def stored(self, snapshot: str) -> str:
        return f"what {snapshot} takes"

    def delete(self, snapshot: str) -> None:
        self.snapshots.remove(snapshot)


def test_a_snapshot_that_cannot_be_published_leaves_nothing_so_another_may_have_its_id() -> None:
    node = FakeSnapshotd(publishes=False)
    with pytest.raises(Unavailable):
        capture_new(cast(Snapshotd, node), "unlike", "org/model", "fourth")
    assert (node.instances, node.snapshots) == (set(), set())

    node.publishes = True
    assert str(capture_new(cast(Snapshotd, node), "again", "org/other", "fourth")) == "what fourth takes"
    assert (node.instances, node.snapshots) == (set(), {"fourth"})
