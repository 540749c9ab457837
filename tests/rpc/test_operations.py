"""Long-running operations: they report, end with a response or an error, can be waited for and cancelled."""

from __future__ import annotations

import asyncio
import errno
from collections.abc import AsyncIterator
from typing import Any

import grpc
import pytest
from google.longrunning import operations_pb2, operations_pb2_grpc
from google.protobuf.duration_pb2 import Duration

from dumont.controller.v1.snapshot_service_pb2 import CreateSnapshotMetadata, Snapshot
from dumont.errors import (
    Aborted,
    Cancelled,
    FailedPrecondition,
    Internal,
    InvalidArgument,
    NotFound,
    ResourceExhausted,
)
from dumont.rpc.operations import Operations, Progress
from dumont.rpc.server import bind, new_server
from dumont.rpc.status import from_rpc_error, from_status

METADATA = CreateSnapshotMetadata(deployment="deployments/qa", stage="quiesce")


class Gate:
    """Work that reports a stage, then waits to be let through."""

    def __init__(self) -> None:
        self.entered = asyncio.Event()
        self.opened = asyncio.Event()
        self.unwound = asyncio.Event()

    async def __call__(self, progress: Progress) -> Snapshot:
        progress.update(stage="dump")
        self.entered.set()
        try:
            await self.opened.wait()
        finally:
            self.unwound.set()
        return Snapshot(name="snapshots/one")


@pytest.fixture
async def operations() -> AsyncIterator[Operations]:
    operations = Operations("test.dumont", keep=3)
    yield operations
    await operations.close()


@pytest.fixture
async def stub(operations: Operations) -> AsyncIterator[Any]:
    server = new_server("test.dumont")
    operations.register(server)
    address = bind(server, "127.0.0.1:0")
    await server.start()
    async with grpc.aio.insecure_channel(address) as channel:
        yield operations_pb2_grpc.OperationsStub(channel)
    await server.stop(0)


def stage(operation: operations_pb2.Operation) -> str:
    metadata = CreateSnapshotMetadata()
    assert operation.metadata.Unpack(metadata)
    return metadata.stage


async def test_an_operation_shows_its_progress_and_then_its_response(
    operations: Operations, stub: Any
) -> None:
    # given work under way
    gate = Gate()
    started = operations.start("capture", gate, METADATA)
    assert started.name.startswith("operations/capture-")
    assert (started.done, stage(started)) == (False, "quiesce")
    await gate.entered.wait()
    running = await stub.GetOperation(operations_pb2.GetOperationRequest(name=started.name), timeout=10)
    assert (running.done, stage(running)) == (False, "dump")

    # when it ends while somebody waits
    waiting = stub.WaitOperation(operations_pb2.WaitOperationRequest(name=started.name), timeout=10)
    gate.opened.set()
    finished = await waiting

    # then the waiter has the response
    snapshot = Snapshot()
    assert finished.done
    assert finished.response.Unpack(snapshot)
    assert snapshot.name == "snapshots/one"
    assert METADATA.stage == "quiesce"


async def test_a_wait_ends_at_its_timeout_and_leaves_the_work_running(
    operations: Operations, stub: Any
) -> None:
    gate = Gate()
    started = operations.start("capture", gate, METADATA)
    request = operations_pb2.WaitOperationRequest(name=started.name, timeout=Duration(nanos=20_000_000))
    operation = await stub.WaitOperation(request, timeout=10)
    assert not operation.done
    assert not gate.unwound.is_set()


async def test_a_waiter_that_gives_up_leaves_the_work_running(operations: Operations, stub: Any) -> None:
    gate = Gate()
    started = operations.start("capture", gate, METADATA)
    await gate.entered.wait()
    with pytest.raises(grpc.aio.AioRpcError):
        await stub.WaitOperation(operations_pb2.WaitOperationRequest(name=started.name), timeout=0.05)
    gate.opened.set()
    assert (await operations.wait(started.name)).HasField("response")


async def test_an_error_of_the_work_is_the_error_of_the_operation(operations: Operations) -> None:
    async def work(progress: Progress) -> Snapshot:
        raise ResourceExhausted("DISK_FULL", "no room", metadata={"free": "0"}, retry_after=2)

    operation = await operations.wait(operations.start("capture", work, METADATA).name)
    error = from_status(operation.error)
    assert isinstance(error, ResourceExhausted)
    assert (error.reason, error.metadata, error.retry_after) == ("DISK_FULL", {"free": "0"}, 2)


async def test_a_defect_of_the_work_is_told_without_its_details(operations: Operations) -> None:
    async def work(progress: Progress) -> Snapshot:
        raise ZeroDivisionError("secret detail")

    operation = await operations.wait(operations.start("capture", work, METADATA).name)
    assert isinstance(from_status(operation.error), Internal)
    assert "secret" not in str(operation)


async def test_an_operation_that_cannot_even_be_concluded_hides_no_other(
    operations: Operations, stub: Any
) -> None:
    class Log:
        """On a full disk."""

        def exception(self, *args: object, **fields: Any) -> None:
            raise OSError(errno.ENOSPC, "No space left on device")

    async def broken(progress: Progress) -> Snapshot:
        raise ZeroDivisionError

    async def sound(progress: Progress) -> Snapshot:
        return Snapshot(name="snapshots/one")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("dumont.rpc.operations.log", Log())
        await operations.wait(operations.start("capture", broken, METADATA).name)
    await operations.wait(operations.start("capture", sound, METADATA).name)

    listed = await stub.ListOperations(operations_pb2.ListOperationsRequest(), timeout=10)

    assert [operation.WhichOneof("result") for operation in listed.operations] == ["error", "response"]


async def test_cancelling_an_operation_unwinds_its_work(operations: Operations, stub: Any) -> None:
    gate = Gate()
    started = operations.start("capture", gate, METADATA)
    await gate.entered.wait()
    await stub.CancelOperation(operations_pb2.CancelOperationRequest(name=started.name), timeout=10)
    operation = await operations.wait(started.name)
    assert gate.unwound.is_set()
    error = from_status(operation.error)
    assert isinstance(error, Cancelled)
    assert error.reason == "OPERATION_CANCELLED"


async def test_cancelling_before_the_first_step_still_ends_the_operation(operations: Operations) -> None:
    gate = Gate()
    started = operations.start("capture", gate, METADATA)
    await operations.CancelOperation(operations_pb2.CancelOperationRequest(name=started.name), None)
    operation = await operations.wait(started.name)
    assert operation.done
    assert not gate.entered.is_set()


async def test_cancelling_a_finished_operation_changes_nothing(operations: Operations, stub: Any) -> None:
    gate = Gate()
    gate.opened.set()
    finished = await operations.wait(operations.start("capture", gate, METADATA).name)
    await stub.CancelOperation(operations_pb2.CancelOperationRequest(name=finished.name), timeout=10)
    assert operations.get(finished.name) == finished


async def test_closing_cancels_everything_and_waits_for_it(operations: Operations) -> None:
    gates = [Gate(), Gate()]
    for gate in gates:
        operations.start("capture", gate, METADATA)
    await asyncio.gather(*(gate.entered.wait() for gate in gates))
    await operations.close()
    assert all(gate.unwound.is_set() for gate in gates)


async def test_an_unknown_operation_is_not_found(stub: Any) -> None:
    with pytest.raises(grpc.aio.AioRpcError) as raised:
        await stub.GetOperation(operations_pb2.GetOperationRequest(name="operations/none"), timeout=10)
    error = from_rpc_error(raised.value)
    assert isinstance(error, NotFound)
    assert error.reason == "OPERATION_NOT_FOUND"


@pytest.mark.parametrize(
    ("request_", "field"),
    [
        (operations_pb2.ListOperationsRequest(filter="done=true"), "filter"),
        (operations_pb2.ListOperationsRequest(page_size=-1), "page_size"),
        (operations_pb2.ListOperationsRequest(page_token="x"), "page_token"),
        (operations_pb2.WaitOperationRequest(name="operations/a", timeout=Duration(seconds=-1)), "timeout"),
        (operations_pb2.GetOperationRequest(name="instances/a"), "name"),
    ],
)
async def test_bad_requests_name_the_field(stub: Any, request_: Any, field: str) -> None:
    method = getattr(stub, type(request_).__name__.removesuffix("Request"))
    with pytest.raises(grpc.aio.AioRpcError) as raised:
        await method(request_, timeout=10)
    error = from_rpc_error(raised.value)
    assert isinstance(error, InvalidArgument)
    assert error.field == field


async def test_a_list_comes_in_pages_and_survives_deletions_between_them(
    operations: Operations, stub: Any
) -> None:
    started = [operations.start("capture", Gate(), METADATA).name for _ in range(5)]
    first = await stub.ListOperations(operations_pb2.ListOperationsRequest(page_size=2), timeout=10)
    assert [operation.name for operation in first.operations] == started[:2]
    await stub.CancelOperation(operations_pb2.CancelOperationRequest(name=started[1]), timeout=10)
    await operations.wait(started[1])
    await stub.DeleteOperation(operations_pb2.DeleteOperationRequest(name=started[1]), timeout=10)
    rest = await stub.ListOperations(
        operations_pb2.ListOperationsRequest(page_size=3, page_token=first.next_page_token), timeout=10
    )
    assert [operation.name for operation in rest.operations] == started[2:]
    assert not rest.next_page_token


async def test_a_running_operation_is_not_deleted(operations: Operations, stub: Any) -> None:
    started = operations.start("capture", Gate(), METADATA)
    with pytest.raises(grpc.aio.AioRpcError) as raised:
        await stub.DeleteOperation(operations_pb2.DeleteOperationRequest(name=started.name), timeout=10)
    assert isinstance(from_rpc_error(raised.value), FailedPrecondition)
    assert not operations.get(started.name).done


async def test_only_the_latest_finished_operations_are_remembered(operations: Operations) -> None:
    gate = Gate()
    running = operations.start("capture", Gate(), METADATA).name
    gate.opened.set()
    finished = []
    for _ in range(5):
        name = operations.start("capture", gate, METADATA).name
        await operations.wait(name)
        finished.append(name)
    with pytest.raises(NotFound):
        operations.get(finished[0])
    assert operations.get(finished[-1]).done
    assert not operations.get(running).done


async def test_progress_replaces_repeated_fields_and_refuses_unknown_ones() -> None:
    snapshot = Snapshot(name="snapshots/one")
    progress = Progress(snapshot)
    progress.update(files=[{"name": "pages-1.img"}])
    progress.update(files=[{"name": "pages-2.img"}], size_bytes=3)
    assert [file.name for file in snapshot.files] == ["pages-2.img"]
    assert (snapshot.name, snapshot.size_bytes) == ("snapshots/one", 3)
    with pytest.raises(ValueError, match="stag"):
        progress.update(stag="dump")


class Kept:
    """A store that outlives the operations."""

    def __init__(self) -> None:
        self.operations: dict[str, operations_pb2.Operation] = {}
        self.full = False

    async def save(self, operation: operations_pb2.Operation) -> None:
        if self.full:
            raise ResourceExhausted("DISK_FULL", "there is no room")
        self.operations[operation.name] = operation

    async def find(self, name: str) -> operations_pb2.Operation | None:
        return self.operations.get(name)

    async def drop(self, name: str) -> None:
        self.operations.pop(name, None)


async def test_the_result_of_an_operation_outlives_its_process() -> None:
    store, gate = Kept(), Gate()
    gate.opened.set()
    first = Operations("test.dumont", store=store)
    begun = await first.begin("capture", gate, METADATA)
    await first.wait(begun.name)
    await first.close()

    found = await Operations("test.dumont", store=store).lookup(begun.name)

    made = Snapshot()
    assert found.done
    assert found.response.Unpack(made)
    assert (made.name, stage(found)) == ("snapshots/one", "dump")


async def test_an_operation_that_ended_with_its_process_is_told_as_a_failure() -> None:
    store = Kept()
    first = Operations("test.dumont", store=store)
    begun = await first.begin("capture", Gate(), METADATA)
    await first.close()
    second = Operations("test.dumont", store=store)
    for _ in range(2):
        found = await second.lookup(begun.name, timeout=10.0)
        error = from_status(found.error)
        assert found.done
        assert (type(error), error.reason) == (Aborted, "OPERATION_INTERRUPTED")
    assert store.operations[begun.name].done


async def test_an_operation_that_cannot_be_stored_is_not_begun() -> None:
    store, gate = Kept(), Gate()
    store.full = True
    operations = Operations("test.dumont", store=store)
    with pytest.raises(ResourceExhausted):
        await operations.begin("capture", gate, METADATA)
    await asyncio.sleep(0)
    assert not gate.opened.is_set()
    assert (
        list((await operations.ListOperations(operations_pb2.ListOperationsRequest(), None)).operations) == []
    )


async def test_an_operation_that_is_named_by_its_id_alone_goes_on() -> None:
    store, gate = Kept(), Gate()
    operations = Operations("test.dumont", store=store)
    begun = await operations.begin("capture", gate, METADATA)
    identifier = begun.name.removeprefix("operations/")

    assert not (await operations.lookup(identifier)).done
    with pytest.raises(FailedPrecondition, match="still runs"):
        await operations.DeleteOperation(operations_pb2.DeleteOperationRequest(name=identifier), None)
    assert not store.operations[begun.name].done

    gate.opened.set()
    assert (await operations.lookup(identifier, timeout=10.0)).HasField("response")
    await operations.DeleteOperation(operations_pb2.DeleteOperationRequest(name=identifier), None)
    assert store.operations == {}


async def test_an_operation_that_is_done_at_once_is_not_stored_as_running_afterwards() -> None:
    class Slow(Kept):
        async def save(self, operation: operations_pb2.Operation) -> None:
            for _ in range(0 if operation.done else 20):
                await asyncio.sleep(0)
            await super().save(operation)

    store, gate = Slow(), Gate()
    gate.opened.set()
    operations = Operations("test.dumont", store=store)
    begun = await operations.begin("capture", gate, METADATA)
    await operations.wait(begun.name)
    assert store.operations[begun.name].done
