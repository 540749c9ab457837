"""``google.longrunning.Operations`` over asyncio tasks, in memory.

An operation is a task of this process: it ends with it. What it made is found by its own name in
the service's resources, so a caller that loses an operation looks there.
"""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any, Final

import grpc
import structlog
from google.longrunning import operations_pb2, operations_pb2_grpc
from google.protobuf.empty_pb2 import Empty
from google.protobuf.message import Message

from dumont import names
from dumont.errors import Cancelled, DumontError, FailedPrecondition, Internal, InvalidArgument, NotFound
from dumont.rpc.pages import page
from dumont.rpc.status import to_status

log = structlog.get_logger(__name__)

SERVICE_NAME: Final = "google.longrunning.Operations"


DEFECT: Final = Internal("INTERNAL", "the operation failed by a defect; the reason is in the service's log")


class Progress:
    """What an operation reports while it runs."""

    def __init__(self, metadata: Message) -> None:
        self._metadata = metadata

    def update(self, **fields: Any) -> None:
        """Replace these fields of the operation's metadata; repeated fields are replaced as a whole.

        Raises:
            ValueError: the metadata has no such field.
        """
        change = type(self._metadata)(**fields)
        for field in fields:
            self._metadata.ClearField(field)
        self._metadata.MergeFrom(change)


Work = Callable[[Progress], Awaitable[Message]]


@dataclass(frozen=True)
class _Record:
    name: str
    sequence: int
    metadata: Message
    task: asyncio.Task[Message | DumontError]


class Operations:
    """Starts operations, and answers the calls about them.

    Args:
        domain: names this service in the errors of failed operations.
        keep: how many finished operations are remembered; the oldest are forgotten first.
    """

    def __init__(self, domain: str, keep: int = 1000) -> None:
        self._domain = domain
        self._keep = keep
        self._records: dict[str, _Record] = {}
        self._sequence = itertools.count(1)

    def register(self, server: grpc.aio.Server) -> None:
        """Add the service to a server. Health and reflection need ``SERVICE_NAME`` as well."""
        operations_pb2_grpc.add_OperationsServicer_to_server(self, server)

    def start(self, prefix: str, work: Work, metadata: Message) -> operations_pb2.Operation:
        """Begin ``work`` in a task of its own.

        Args:
            prefix: begins the operation's id, and says what it does: ``"capture"``.
            work: returns the response; a ``DumontError`` becomes the operation's error.
            metadata: what is known at the start; ``work`` updates it through its ``Progress``.
        """
        self._forget()
        name = names.build("operations", names.new_id(prefix))
        current = type(metadata)()
        current.CopyFrom(metadata)
        task = asyncio.create_task(self._run(name, work, Progress(current)), name=name)
        self._records[name] = _Record(name, next(self._sequence), current, task)
        return self.get(name)

    def get(self, name: str) -> operations_pb2.Operation:
        """The operation as it is now.

        Raises:
            NotFound: OPERATION_NOT_FOUND; finished operations are kept only for a while.
        """
        return self._describe(self._find(name))

    async def wait(self, name: str, timeout: float | None = None) -> operations_pb2.Operation:
        """Wait until the operation is done, for at most ``timeout`` seconds, and return it."""
        record = self._find(name)
        await asyncio.wait({record.task}, timeout=timeout)
        return self._describe(record)

    async def close(self) -> None:
        """Cancel the operations that run, and wait until they have unwound."""
        tasks = [record.task for record in self._records.values()]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def GetOperation(
        self, request: operations_pb2.GetOperationRequest, context: object
    ) -> operations_pb2.Operation:
        """See ``google.longrunning``."""
        return self.get(request.name)

    async def ListOperations(
        self, request: operations_pb2.ListOperationsRequest, context: object
    ) -> operations_pb2.ListOperationsResponse:
        """See ``google.longrunning``."""
        if request.filter:
            raise InvalidArgument("FILTER_UNSUPPORTED", "operations cannot be filtered", field="filter")
        by_age = {f"{record.sequence:020}": record for record in self._records.values()}
        shown, token = page(by_age, request.page_size, request.page_token)
        return operations_pb2.ListOperationsResponse(
            operations=[self._describe(record) for record in shown], next_page_token=token
        )

    async def CancelOperation(self, request: operations_pb2.CancelOperationRequest, context: object) -> Empty:
        """See ``google.longrunning``."""
        self._find(request.name).task.cancel()
        return Empty()

    async def DeleteOperation(self, request: operations_pb2.DeleteOperationRequest, context: object) -> Empty:
        """See ``google.longrunning``."""
        record = self._find(request.name)
        if not record.task.done():
            raise FailedPrecondition(
                "OPERATION_RUNNING",
                f"{record.name} still runs; cancel it or wait for it first",
                metadata={"operation": record.name},
            )
        del self._records[record.name]
        return Empty()

    async def WaitOperation(
        self, request: operations_pb2.WaitOperationRequest, context: object
    ) -> operations_pb2.Operation:
        """See ``google.longrunning``."""
        timeout = request.timeout.ToNanoseconds() / 1e9 if request.HasField("timeout") else None
        if timeout is not None and timeout < 0:
            raise InvalidArgument("INVALID_TIMEOUT", "timeout must not be negative", field="timeout")
        return await self.wait(request.name, timeout)

    async def _run(self, name: str, work: Work, progress: Progress) -> Message | DumontError:
        try:
            return await work(progress)
        except DumontError as error:
            log.warning("operation_failed", operation=name, reason=error.reason, error=error.message)
            return error
        except Exception:
            log.exception("operation_failed", operation=name, reason="INTERNAL")
            return DEFECT

    def _find(self, name: str) -> _Record:
        names.parse(name, "operations", "name")
        try:
            return self._records[name]
        except KeyError:
            raise NotFound(
                "OPERATION_NOT_FOUND",
                f"{name} is not known; finished operations are kept only for a while",
                metadata={"operation": name},
            ) from None

    def _describe(self, record: _Record) -> operations_pb2.Operation:
        operation = operations_pb2.Operation(name=record.name, done=record.task.done())
        operation.metadata.Pack(record.metadata)
        if not operation.done:
            return operation
        result = _outcome(record)
        if isinstance(result, DumontError):
            operation.error.CopyFrom(to_status(result, self._domain))
        else:
            operation.response.Pack(result)
        return operation

    def _forget(self) -> None:
        finished = [record.name for record in self._records.values() if record.task.done()]
        for name in finished[: max(0, len(finished) - self._keep + 1)]:
            del self._records[name]


def _outcome(record: _Record) -> Message | DumontError:
    if record.task.cancelled():
        return Cancelled("OPERATION_CANCELLED", f"{record.name} was cancelled")
    # Not even its own failure to conclude may hide the other operations from who lists them.
    return DEFECT if record.task.exception() is not None else record.task.result()
