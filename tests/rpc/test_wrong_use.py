"""The client used wrongly: whatever is handed over, the answer is a ``DumontError`` that says what to do."""

from __future__ import annotations

import asyncio
import inspect
import socket
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest

import dumont
from dumont.arguments import DeploySettings, GenerateOptions
from dumont.rpc.server import bind, new_server
from tests.rpc.fake_controller import Served

WRONG = [True, 5, -1, 2.5, b"bytes", "", "Not An Id", "a/b/c", "\ud800", [], [5], {"a": 1}, object(), "5s"]
# For each parameter of the client's methods, a value with which a call succeeds.
RIGHT: dict[str, Any] = {
    "model": "org/model", "start_mode": "checkpoint", "checkpoint": None, "name": "qa", "target": "b",
    "deployment": "qa", "prompt": "Count", "inputs": "one", "timeout": 5, "node": "one", "tail": 1,
    "follow": False, "snapshot_id": "one", "progress": None, "orphans": False,
    "dry_run": True, "gpu": "1", "cold": False, "wait": True,
}  # fmt: skip


@pytest.fixture(scope="module")
def served() -> Iterator[Served]:
    served = Served()
    served.controller.capture_may_end.set()
    yield served
    served.stop()


@pytest.fixture
def client(served: Served) -> Iterator[dumont.Client]:
    served.controller.reset()
    served.controller.watch_ends = True
    with dumont.Client(served.address) as client:
        client.deploy("org/model", name="qa")
        yield client


def calls() -> Iterator[tuple[str, str, str]]:
    """Every public method of the client and its parts, with each parameter that it takes."""
    parts = {
        "client": dumont.Client,
        "deployment": dumont.Deployment,
        **{
            name: getattr(__import__("dumont.sync", fromlist=["x"]), name.capitalize())
            for name in ("deployments", "instances", "snapshots", "nodes")
        },
    }
    extra = {
        "deploy": DeploySettings.__annotations__,
        "generate": GenerateOptions.__annotations__,
        "stream": GenerateOptions.__annotations__,
    }
    for part, kind in parts.items():
        for method, function in inspect.getmembers(kind, inspect.isfunction):
            if method.startswith("_") or method == "close":
                continue
            parameters = [name for name in inspect.signature(function).parameters if name != "self"]
            for name in [*parameters, *extra.get(method, ())]:
                if name not in ("options", "settings"):
                    yield part, method, name


@pytest.mark.parametrize(("part", "method", "parameter"), list(calls()))
def test_a_wrong_value_is_refused_in_words(
    client: dumont.Client, part: str, method: str, parameter: str
) -> None:
    parts: dict[str, Any] = {"client": client, "deployment": client.deployments.get("qa")}
    call = getattr(parts.get(part) or getattr(client, part), method)
    required = {
        name: RIGHT[name]
        for name, one in inspect.signature(call).parameters.items()
        if name in RIGHT and (one.default is inspect.Parameter.empty or name == "prompt")
    }
    refusals: list[dumont.DumontError] = []
    for value in WRONG:
        try:
            made = call(**{**required, parameter: value})
            if inspect.isgenerator(made) or isinstance(made, dumont.TextStream):
                list(made)
        except dumont.DumontError as error:
            refusals.append(error)
    assert all(error.reason.isupper() and len(error.message) > 10 for error in refusals)


def test_an_unknown_argument_is_named(client: dumont.Client) -> None:
    wrong: dict[str, Any] = {"checkpoints": {}}
    for call in (client.deploy, dumont.deploy):
        with pytest.raises(dumont.InvalidArgument, match=r"did you mean|it has") as raised:
            call("org/model", **wrong)
        assert raised.value.reason == "UNKNOWN_OPTION"


def test_a_closed_client_says_so(client: dumont.Client) -> None:
    deployment = client.deployments.get("qa")
    client.close()
    uses: list[Callable[[], object]] = [
        lambda: client.deployments.list(),
        lambda: client.deploy("org/model"),
        lambda: deployment.generate("Count"),
        lambda: list(deployment.stream("Count")),
        lambda: deployment.embed("one"),
        lambda: list(client.instances.watch()),
        lambda: client.snapshots.create("qa"),
    ]
    for use in uses:
        with pytest.raises(dumont.FailedPrecondition) as raised:
            use()
        assert raised.value.reason == "CLIENT_CLOSED"


def test_a_client_that_is_closed_while_an_answer_comes_ends_it(served: Served, client: dumont.Client) -> None:
    stream = client.deployments.get("qa").stream("endless")

    def close() -> None:
        served.controller.endless.wait(10)
        client.close()

    closer = threading.Thread(target=close)
    closer.start()
    with pytest.raises(dumont.DumontError) as raised:
        list(stream)
    closer.join(10)
    assert raised.value.reason in ("CALL_CANCELLED", "CLIENT_CLOSED")


def test_the_callers_own_timeout_is_named(client: dumont.Client) -> None:
    with pytest.raises(dumont.DeadlineExceeded, match=r"within 0.2 s, the timeout of the call"):
        client.deployments.get("qa").generate("endless", timeout=0.2)


@pytest.fixture
async def other_service() -> AsyncIterator[str]:
    """A gRPC server that is no controller, as a snapshotd."""
    server = grpc.aio.server()
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    yield f"127.0.0.1:{port}"
    await server.stop(0)


async def test_another_service_is_named_as_such(other_service: str) -> None:
    async with dumont.AsyncClient(other_service) as client:
        with pytest.raises(dumont.FailedPrecondition) as raised:
            await client.deployments.list()
    assert raised.value.reason == "NOT_A_CONTROLLER"
    assert other_service in raised.value.message


async def test_something_that_does_not_speak_grpc_is_not_called_unreachable() -> None:
    async def greet(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(b"SSH-2.0-OpenSSH_9.2\r\n")
        await writer.drain()
        await reader.read(1000)
        writer.close()

    async with await asyncio.start_server(greet, "127.0.0.1", 0) as server:
        host, port = server.sockets[0].getsockname()
        async with dumont.AsyncClient(f"{host}:{port}") as client:
            with pytest.raises(dumont.Unavailable) as raised:
                await client.deployments.list()
    assert raised.value.reason in ("CONNECTION_LOST", "ENDPOINT_UNREACHABLE")
    assert f"{host}:{port}" in raised.value.message


async def test_only_a_failed_connection_is_called_unreachable(tmp_path: Path) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        free = f"127.0.0.1:{probe.getsockname()[1]}"
    for endpoint in (free, f"unix:{tmp_path}/none.sock", "no-such-host.invalid:7070"):
        async with dumont.AsyncClient(endpoint) as client:
            with pytest.raises(dumont.Unavailable) as raised:
                await client.deployments.list()
        assert raised.value.reason == "ENDPOINT_UNREACHABLE", raised.value.metadata


async def test_a_connection_that_breaks_during_an_answer_is_called_lost() -> None:
    server = new_server("controller.dumont")

    async def generate(request: object, context: object) -> AsyncIterator[bytes]:
        yield b""
        # As if the controller's process was killed: the connection goes without a word.
        await asyncio.sleep(60)

    handler: grpc.RpcMethodHandler[Any, Any] = grpc.unary_stream_rpc_method_handler(generate)
    service = "dumont.controller.v1.InferenceService"
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(service, {"Generate": handler}),))
    behind = bind(server, "127.0.0.1:0")
    await server.start()

    async with await asyncio.start_server(_relay(behind), "127.0.0.1", 0) as relay:
        host, port = relay.sockets[0].getsockname()
        async with dumont.AsyncClient(f"{host}:{port}") as client:
            stream = dumont.AsyncDeployment(client._connection, _info()).stream("Count")
            reading = asyncio.ensure_future(stream.collect())
            await asyncio.sleep(0.5)
            for writer in WRITERS:
                writer.transport.abort()
            with pytest.raises(dumont.Unavailable) as raised:
                await reading
    await server.stop(0)
    assert raised.value.reason == "CONNECTION_LOST"


WRITERS: list[asyncio.StreamWriter] = []


def _relay(behind: str) -> Callable[[asyncio.StreamReader, asyncio.StreamWriter], Any]:
    host, _, port = behind.rpartition(":")

    async def pump(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while data := await reader.read(65536):
                writer.write(data)
                await writer.drain()
        except OSError:
            pass

    async def connected(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        far_reader, far_writer = await asyncio.open_connection(host, int(port))
        WRITERS.extend((writer, far_writer))
        await asyncio.gather(pump(reader, far_writer), pump(far_reader, writer))

    return connected


def _info() -> dumont.DeploymentInfo:
    checkpoint = dumont.CheckpointSettings(True, None, "local", "detached")
    return dumont.DeploymentInfo(
        "deployments/qa", "", "org/model", "causal_lm", "checkpoint", checkpoint, None, None, "active", "",
        None, None, None,
    )  # fmt: skip
