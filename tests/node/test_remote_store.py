"""Two nodes and one object store: what one has captured the other restores, or refuses before CRIU."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from dumont.errors import DumontError
from dumont.snapshotd.v1 import instance_service_pb2 as instances_pb2
from dumont.snapshotd.v1 import snapshot_service_pb2 as snapshots_pb2
from tests.node.daemon import Daemon
from tests.s3_server import S3Server

pytestmark = pytest.mark.node


@dataclass
class Pair:
    """Nodes with state directories of their own and one store, one after the other."""

    root: Path
    port: Callable[[], int]
    store: str
    answer: str = ""
    digest: str = ""
    flags: dict[str, tuple[str, ...]] = field(default_factory=dict)

    @property
    def trusted(self) -> Path:
        return self.root / "trusted"

    def node(self, name: str, *flags: str) -> Daemon:
        """A node that trusts all that captured here before it was started."""
        self.trusted.touch()
        return Daemon(
            self.root / name,
            self.port(),
            "--store-url", self.store, "--trusted-keys-file", str(self.trusted), *flags,
        )  # fmt: skip

    def trust(self, name: str) -> None:
        with self.trusted.open("a") as file:
            file.write((self.root / name / "signing.pub").read_text())


def publish(daemon: Daemon, snapshot: str = "one") -> snapshots_pb2.Snapshot:
    request = snapshots_pb2.PublishSnapshotRequest(name=f"snapshots/{snapshot}")
    answer = snapshots_pb2.Snapshot()
    daemon.wait(daemon.snapshots.PublishSnapshot(request), answer)
    return answer


def capture(daemon: Daemon, model: Path, snapshot: str = "one") -> snapshots_pb2.Snapshot:
    daemon.start_instance("source", model)
    request = instances_pb2.CaptureInstanceRequest(name="instances/source", snapshot_id=snapshot)
    answer = snapshots_pb2.Snapshot()
    daemon.wait(daemon.instances.CaptureInstance(request), answer)
    return answer


def restore(daemon: Daemon, instance: str, snapshot: str = "one", digest: str = "") -> instances_pb2.Instance:
    request = instances_pb2.RestoreInstanceRequest(
        instance_id=instance, snapshot=f"snapshots/{snapshot}", manifest_digest=digest
    )
    answer = instances_pb2.Instance()
    daemon.wait(daemon.instances.RestoreInstance(request), answer)
    return answer


def listed(daemon: Daemon) -> dict[str, snapshots_pb2.Snapshot]:
    answer = daemon.snapshots.ListSnapshots(snapshots_pb2.ListSnapshotsRequest())
    return {snapshot.name.removeprefix("snapshots/"): snapshot for snapshot in answer.snapshots}


@pytest.fixture(scope="module")
def pair(
    criu: Path,
    instruct_model: Path,
    s3_server: S3Server,
    free_port: Callable[[], int],
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[Pair]:
    """A snapshot that node ``a`` has captured and published; nothing else is left of ``a``."""
    os.environ.update(s3_server.environment())
    made = Pair(tmp_path_factory.mktemp("pair"), free_port, f"s3://{s3_server.bucket}/pair")
    with made.node("a", "--stop-instances-on-exit") as a:
        captured = capture(a, instruct_model)
        made.digest = captured.manifest_digest
        assert (captured.local, captured.published) == (True, False)
        assert publish(a).published
        made.answer = a.generate("source")
        made.trust("a")
    shutil.rmtree(made.root / "a")
    yield made
    for name in s3_server.environment():
        del os.environ[name]


def test_a_node_that_never_saw_the_model_serves_it_from_the_store(pair: Pair) -> None:
    with pair.node("b", "--stop-instances-on-exit") as b:
        # given: it holds nothing and knows what is published
        known = listed(b)["one"]
        assert (known.local, known.published, known.incompatibility) == (False, True, "")
        assert known.manifest_digest == pair.digest

        # when
        instance = restore(b, "back", digest=pair.digest)

        # then
        assert [phase.name for phase in instance.phases][:3] == ["check", "fetch", "verify"]
        assert len(pair.answer) > 2
        assert b.generate("back") == pair.answer
        assert listed(b)["one"].local

        # and the next one is local
        again = restore(b, "again", digest=pair.digest)
        assert "fetch" not in [phase.name for phase in again.phases]
        assert b.generate("again") == pair.answer
