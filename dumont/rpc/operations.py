"""``google.longrunning.Operations`` over asyncio tasks.

An operation is a task of this process: it ends with it. With a store, its result outlives the process, and
one that the process could not finish is told as a failure. What an operation made is found by its own name
in the service's resources.
"""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any, Final, Protocol

import grpc
import structlog
from google.longrunning import operations_pb2, operations_pb2_grpc
from google.protobuf.empty_pb2 import Empty
from google.protobuf.message import Message

from dumont import names
from dumont.errors import (
    Aborted,
    Cancelled,
    DumontError,
    FailedPrecondition,
    Internal,
    InvalidArgument,
    NotFound,
)
from dumont.rpc.pages import page
from dumont.rpc.status import to_status

log = structlog.get_logger(__name__)

SERVICE_NAME: Final = "google.longrunning.Operations"


DEFECT: Final = Internal("INTERNAL", "the operation failed by a defect; the reason is in the service's log")


class Progress:
    """What an operation reports while it runs."""

    def __init__(self, metadata: Message) -> None:
        self.metadata = metadata

    def update(self, **fields: Any) -> None:
        """Replace these fields of the operation's metadata; repeated fields are replaced as a whole.

        Raises:
            ValueError: the metadata has no such field.
        """
        change = type(self.metadata)(**fields)
        for field in fields:
            self.metadata.ClearField(field)
        self.metadata.MergeFrom(change)


Work = Callable[[Progress], Awaitable[Message]]


class Store(Protocol):
    """Keeps operations for when this process is gone. Its methods raise a ``DumontError``."""

    async def save(self, operation: operations_pb2.Operation) -> None:
        """Keep an operation as it is now."""
        ...

    async def find(self, name: str) -> operations_pb2.Operation | None:
        """An operation as it was saved last; None: it is not known."""
        ...

    async def drop(self, name: str) -> None:
        """Forget an operation."""
        ...


class Forgetful:
    """The store of a service whose operations end with it."""

    async def save(self, operation: operations_pb2.Operation) -> None:
        """Do nothing."""

    async def find(self, name: str) -> operations_pb2.Operation | None:
        """None."""
        return None

    async def drop(self, name: str) -> None:
        """Do nothing."""


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
        store: what outlives this process.
    """

    def __init__(self, domain: str, keep: int = 1000, store: Store | None = None) -> None:
        self._domain = domain
        self._store = store or Forgetful()
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
        stored = asyncio.Event()
        stored.set()
        return self._start(prefix, work, metadata, stored)

    def _start(
        self, prefix: str, work: Work, metadata: Message, stored: asyncio.Event
    ) -> operations_pb2.Operation:
        self._forget()
        name = names.build("operations", names.new_id(prefix))
        current = type(metadata)()
        current.CopyFrom(metadata)
        task = asyncio.create_task(self._run(name, work, Progress(current), stored), name=name)
        self._records[name] = _Record(name, next(self._sequence), current, task)
        return self.get(name)

    async def begin(self, prefix: str, work: Work, metadata: Message) -> operations_pb2.Operation:
        """Like ``start``, and return once the operation is stored.

        Raises:
            DumontError: it could not be stored, and was cancelled.
        """
        stored = asyncio.Event()
        operation = self._start(prefix, work, metadata, stored)
        try:
            await self._store.save(operation)
        except BaseException:
            self._records.pop(operation.name).task.cancel()
            raise
        stored.set()
        return operation

    async def lookup(self, name: str, timeout: float | None = 0.0) -> operations_pb2.Operation:
        """The operation as it is now, or once it is done or ``timeout`` seconds have passed.

        Raises:
            NotFound: OPERATION_NOT_FOUND; finished operations are kept only for a while.
        """
        name = operation_name(name)
        if name in self._records:
            return await self.wait(name, timeout)
        found = await self._store.find(name)
        if found is None:
            raise _unknown(name)
        if not found.done:
            interrupted = Aborted(
                "OPERATION_INTERRUPTED",
                f"the service that ran {name} ended before it was done; see what there is, and begin again",
                metadata={"operation": name},
            )
            found.error.CopyFrom(to_status(interrupted, self._domain))
            found.done = True
            await self._store.save(found)
        return found

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
        return await self.lookup(request.name)

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
        name = operation_name(request.name)
        if name not in self._records:
            await self.lookup(name)
            await self._store.drop(name)
            return Empty()
        record = self._find(request.name)
        if not record.task.done():
            raise FailedPrecondition(
                "OPERATION_RUNNING",
                f"{record.name} still runs; cancel it or wait for it first",
                metadata={"operation": record.name},
            )
        del self._records[record.name]
        await self._store.drop(record.name)
        return Empty()

    async def WaitOperation(
        self, request: operations_pb2.WaitOperationRequest, context: object
    ) -> operations_pb2.Operation:
        """See ``google.longrunning``."""
        timeout = request.timeout.ToNanoseconds() / 1e9 if request.HasField("timeout") else None
        if timeout is not None and timeout < 0:
            raise InvalidArgument("INVALID_TIMEOUT", "timeout must not be negative", field="timeout")
        return await self.lookup(request.name, timeout)

    async def _run(
        self, name: str, work: Work, progress: Progress, stored: asyncio.Event
    ) -> Message | DumontError:
        result = await self._result(name, work, progress)
        # Its beginning would replace its end in the store if it were written later.
        await stored.wait()
        done = operations_pb2.Operation(name=name, done=True)
        done.metadata.Pack(progress.metadata)
        self._conclude(done, result)
        try:
            await self._store.save(done)
        except DumontError as error:
            # Whoever asks this process still hears of it.
            log.warning("operation_not_saved", operation=name, reason=error.reason, error=error.message)
        return result

    async def _result(self, name: str, work: Work, progress: Progress) -> Message | DumontError:
        try:
            return await work(progress)
        except DumontError as error:
            log.warning("operation_failed", operation=name, reason=error.reason, error=error.message)
            return error
        except Exception:
            log.exception("operation_failed", operation=name, reason="INTERNAL")
            return DEFECT

    def _find(self, name: str) -> _Record:
        name = operation_name(name)
        try:
            return self._records[name]
        except KeyError:
            raise _unknown(name) from None

    def _describe(self, record: _Record) -> operations_pb2.Operation:
        operation = operations_pb2.Operation(name=record.name, done=record.task.done())
        operation.metadata.Pack(record.metadata)
        if not operation.done:
            return operation
        self._conclude(operation, _outcome(record))
        return operation

    def _conclude(self, operation: operations_pb2.Operation, result: Message | DumontError) -> None:
        if isinstance(result, DumontError):
            operation.error.CopyFrom(to_status(result, self._domain))
        else:
            operation.response.Pack(result)

    def _forget(self) -> None:
        finished = [record.name for record in self._records.values() if record.task.done()]
        for name in finished[: max(0, len(finished) - self._keep + 1)]:
            del self._records[name]


def operation_name(name: str) -> str:
    """The name of an operation that is given by its name or its id alone. Raises: InvalidArgument."""
    return names.build("operations", names.parse(name, "operations", "name"))


def _unknown(name: str) -> NotFound:
    return NotFound(
        "OPERATION_NOT_FOUND",
        f"{name} is not known; finished operations are kept only for a while",
        metadata={"operation": name},
    )


def _outcome(record: _Record) -> Message | DumontError:
    if record.task.cancelled():
        return Cancelled("OPERATION_CANCELLED", f"{record.name} was cancelled")
    # Not even its own failure to conclude may hide the other operations from who lists them.
    return DEFECT if record.task.exception() is not None else record.task.result()
