"""The whole service over two nodes and one bucket: a deployment outlives the node that captured it."""

from __future__ import annotations

import io
import shutil
import subprocess
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import pytest
from minio import Minio

import dumont
from tests.e2e.stack import STOP_SECONDS, Controller, command
from tests.helpers.s3_server import S3Server
from tests.helpers.tampering import flip_a_byte

pytestmark = pytest.mark.node

PROMPT = "The capital of France is"


@pytest.fixture
def start_node(
    controller: Controller,
    s3_server: S3Server,
    free_port: Callable[[], int],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> Callable[[str], Any]:
    """A context in which a node of that name runs; all of them trust those that ran before."""
    for name, value in s3_server.environment().items():
        monkeypatch.setenv(name, value)
    trusted = tmp_path / "trusted"
    trusted.touch()

    @contextmanager
    def start(name: str) -> Iterator[Path]:
        words = (
            command("dumont-snapshotd"), "--listen", f"127.0.0.1:{free_port()}", "--node-id", name,
            "--state-dir", str(tmp_path / name), "--controller", controller.endpoint, "--drain-seconds", "1",
            "--store-url", f"s3://{s3_server.bucket}/whole", "--trusted-keys-file", str(trusted),
            "--stop-instances-on-exit",
        )  # fmt: skip
        with (tmp_path / f"{name}.log").open("wb") as log:
            process = subprocess.Popen(words, stdout=log, stderr=log)
        try:
            controller.read_until(event="node_ready", node=name)
            with trusted.open("a") as file:
                file.write((tmp_path / name / "signing.pub").read_text())
            yield tmp_path / name
        finally:
            process.terminate()
            process.wait(STOP_SECONDS)

    return start


def test_a_deployment_is_served_from_the_bucket_when_its_node_is_gone(
    controller: Controller,
    start_node: Callable[[str], Any],
    s3_server: S3Server,
    instruct_model: Path,
    tmp_path: Path,
) -> None:
    with ExitStack() as exits:
        client = exits.enter_context(dumont.Client(controller.endpoint))

        # given: captured and published by one node, of which nothing is left
        with start_node("first") as state:
            deployment = client.deploy(str(instruct_model), name="qa", checkpoint={"storage": "s3"})
            assert deployment.info.checkpoint.storage == "s3"
            before = deployment.generate(PROMPT, max_new_tokens=8)
            assert before.start.tier == "cold"
            controller.read_until(event="action_done", action="Publish")
            (snapshot,) = client.snapshots.list("qa")
            assert (snapshot.local, snapshot.published) == (True, True)
            stored = client.snapshots.get(snapshot.name).stored
            assert stored is not None
            assert 0 < stored.stored_bytes < stored.image_bytes
            assert client.snapshots.verify(snapshot.name).published_bytes == stored.data_bytes
        shutil.rmtree(state)

        # when: another node serves the next request
        with start_node("second") as state:
            after = deployment.generate(PROMPT, max_new_tokens=8)

            # then
            assert after.start.tier == "remote", after.start
            assert "fetch" in [phase.name for phase in after.start.phases]
            assert after.text == before.text
            assert after.start.node == "nodes/second"
        shutil.rmtree(state)

        # given: somebody changed a byte of it
        (largest, *_) = sorted(chunks(s3_server), key=lambda item: -item[1])
        flip(s3_server, largest[0])

        # when
        with start_node("third"):
            damaged = deployment.generate(PROMPT, max_new_tokens=8)

            # then: it is served all the same, and everybody can see why it took longer
            assert damaged.start.tier == "cold"
            assert damaged.text == before.text
            assert any("CHUNK_DAMAGED" in reason for reason in damaged.start.reasons), damaged.start.reasons

            # and nothing is left of it once the deployment goes
            deployment.delete()
            assert not any(snapshot.published for snapshot in client.snapshots.list())
            assert client.snapshots.prune(dry_run=True).kept_bytes > 0
        assert keys(s3_server, "whole/snapshots/") == []


def store(server: S3Server) -> Minio:
    return Minio(
        server.endpoint.removeprefix("http://"), server.access_key, server.secret_key, secure=False,
        region="us-east-1",
    )  # fmt: skip


def keys(server: S3Server, prefix: str) -> list[tuple[str, int]]:
    found = store(server).list_objects(server.bucket, prefix, recursive=True)
    return [(item.object_name, item.size or 0) for item in found if item.object_name]


def chunks(server: S3Server) -> list[tuple[str, int]]:
    return keys(server, "whole/chunks/")


def flip(server: S3Server, key: str) -> None:
    response = store(server).get_object(server.bucket, key)
    data = flip_a_byte(response.read())
    response.close()
    store(server).put_object(server.bucket, key, io.BytesIO(data), len(data))
