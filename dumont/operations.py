"""Follow a long-running operation of a service to its end."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any, Final, TypeVar

from google.longrunning import operations_pb2
from google.protobuf.message import Message

from dumont.connection import Connection
from dumont.convert import duration
from dumont.rpc.status import from_status

REPORT_SECONDS: Final = 0.2
CANCEL_SECONDS: Final = 5.0

Response = TypeVar("Response", bound=Message)
Metadata = TypeVar("Metadata", bound=Message)


async def follow(
    connection: Connection,
    operation: Any,
    response: Response,
    metadata: Metadata,
    progress: Callable[[Metadata], None] | None = None,
) -> Response:
    """Wait until an operation is done. A caller that gives up cancels it.

    Args:
        connection: to the service that runs it.
        operation: as the service returned it.
        response: an empty message of the response's type, filled in and returned.
        metadata: an empty message of the metadata's type.
        progress: called with the metadata whenever they changed.

    Raises:
        DumontError: the operation failed or was cancelled.
    """
    reported: Any = None
    try:
        while True:
            if progress and operation.metadata != reported and operation.metadata.Unpack(metadata):
                reported = operation.metadata
                progress(metadata)
            if operation.done:
                break
            request = operations_pb2.WaitOperationRequest(
                name=operation.name, timeout=duration(REPORT_SECONDS) if progress else None
            )
            with connection.errors():
                operation = await connection.operations.WaitOperation(request)
    except asyncio.CancelledError:
        cancel = operations_pb2.CancelOperationRequest(name=operation.name)
        await connection.operations.CancelOperation(cancel, timeout=CANCEL_SECONDS)
        raise
    if operation.HasField("error"):
        raise from_status(operation.error)
    operation.response.Unpack(response)
    return response
