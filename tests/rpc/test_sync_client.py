"""The synchronous client: from threads, from a running loop, interrupted."""

from __future__ import annotations

import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest

import dumont
from tests.rpc.fake_controller import Served


@pytest.fixture(scope="module")
def served() -> Iterator[Served]:
    served = Served()
    yield served
    served.stop()


@pytest.fixture
def client(served: Served) -> Iterator[dumont.Client]:
    served.controller.reset()
    with dumont.Client(served.address) as client:
        yield client


def test_the_issue_example_works(served: Served, client: dumont.Client) -> None:
    deployment = dumont.deploy(
        model="Qwen/Qwen3-0.6B",
        start_mode="checkpoint",
        checkpoint={"enabled": True, "ttl": 3600},
        endpoint=served.address,
    )
    response = deployment.generate("Hello")
    assert f"{response}" == "one two three"
    assert deployment.name == "deployments/qwen3-0-6b"


def test_the_endpoint_comes_from_the_environment(
    served: Served, client: dumont.Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DUMONT_ENDPOINT", served.address)
    assert dumont.Client().endpoint == served.address
    assert dumont.deploy("org/model").info.model == "org/model"


def test_several_threads_share_a_client(client: dumont.Client) -> None:
    deployment = client.deploy("org/model")
    with ThreadPoolExecutor(8) as threads:
        answers = list(threads.map(lambda index: str(deployment.generate(f"{index}")), range(40)))
    assert answers == ["one two three"] * 40


async def test_it_works_where_a_loop_runs_already(client: dumont.Client) -> None:
    assert client.deploy("org/model").generate("Count").text == "one two three"


def test_a_stream_iterates_and_tells_start_and_whole(client: dumont.Client) -> None:
    stream = client.deploy("org/model").stream("Count")
    assert stream.start.tier == "local"
    assert list(stream) == ["one", " two", " three"]
    assert stream.generation is not None
    assert stream.generation.finish_reason == "end"


def test_leaving_a_stream_early_cancels_the_call(served: Served, client: dumont.Client) -> None:
    for piece in client.deploy("org/model").stream("endless"):
        assert piece == "one"
        break
    assert served.controller.cancelled.wait(10)


def test_cancelling_a_stream_from_another_thread_ends_its_iteration(
    served: Served, client: dumont.Client
) -> None:
    stream = client.deploy("org/model").stream("endless")
    received: list[str] = []
    failed: list[dumont.DumontError] = []

    def read() -> None:
        try:
            received.extend(stream)
        except dumont.DumontError as error:
            failed.append(error)

    reader = threading.Thread(target=read)
    reader.start()
    assert served.controller.endless.wait(10)
    stream.cancel()
    reader.join(10)
    assert [error.reason for error in failed] == ["CALL_CANCELLED"]


def test_errors_are_typed(client: dumont.Client) -> None:
    with pytest.raises(dumont.NotFound) as raised:
        client.deployments.get("none")
    assert raised.value.reason == "DEPLOYMENT_NOT_FOUND"


def test_resources_are_reached(served: Served, client: dumont.Client) -> None:
    client.deploy("org/model", name="qa")
    assert [deployment.name for deployment in client.deployments.list()] == ["deployments/qa"]
    assert client.deployments.get("qa").refresh().model == "org/model"
    assert client.deployments.get("qa").embed("four") == [[4, 0.5]]
    assert client.instances.get("b").pid == 2
    assert client.instances.park("b").state == "parked"
    assert client.instances.resume("b").state == "serving"
    assert [instance.pid for instance in client.instances.find("b")] == [2]
    assert len(client.instances.list("qa")) == len(next(client.instances.watch())) == 3
    assert "".join(client.instances.logs("b")) == "loaded €\nready\n"
    assert client.nodes.list()[0].state == "ready"
    served.controller.capture_may_end.set()
    assert client.snapshots.create("qa").name == "snapshots/one"
    client.deployments.delete("qa")
    assert client.deployments.list() == []


def test_a_callback_may_not_wait_for_its_own_loop(served: Served, client: dumont.Client) -> None:
    served.controller.capture_may_end.set()

    def progress(step: dumont.SnapshotProgress) -> None:
        client.nodes.list()

    with pytest.raises(dumont.FailedPrecondition, match="callback"):
        client.snapshots.create("qa", progress=progress)


def test_an_interrupt_cancels_the_call(served: Served, client: dumont.Client) -> None:
    """A script is sent SIGINT while it waits: it ends as an interrupted script, and the call with it."""
    client.deploy("org/model", name="qa")
    script = f"import dumont; dumont.Client({served.address!r}).deployments.get('qa').generate('endless')"
    with subprocess.Popen([sys.executable, "-c", script], stderr=subprocess.PIPE, text=True) as process:
        assert served.controller.endless.wait(30)
        process.send_signal(signal.SIGINT)
        _, stderr = process.communicate(timeout=30)
    assert stderr.rstrip().endswith("KeyboardInterrupt")
    assert served.controller.cancelled.wait(10)


def test_a_script_ends_quietly_and_importing_dumont_stays_light(
    served: Served, client: dumont.Client
) -> None:
    client.deploy("org/model", name="qa")
    script = (
        "import sys, dumont; assert 'grpc' not in sys.modules; "
        f"print(dumont.Client({served.address!r}).deployments.get('qa').generate('Count'))"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, timeout=30, check=True
    )
    assert (done.stdout, done.stderr) == ("one two three\n", "")
