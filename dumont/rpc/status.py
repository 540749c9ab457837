"""Carries a ``DumontError`` over the wire as ``google.rpc.Status`` and back: one table for both ways."""

from __future__ import annotations

from typing import Final, cast

import grpc
from google.protobuf.duration_pb2 import Duration
from google.rpc.error_details_pb2 import BadRequest, ErrorInfo, RetryInfo
from google.rpc.status_pb2 import Status
from grpc_status import rpc_status

from dumont.errors import ERRORS, DumontError

CODES: Final[dict[type[DumontError], grpc.StatusCode]] = {
    DumontError: grpc.StatusCode.UNKNOWN,
    **{error: grpc.StatusCode[error.code] for error in ERRORS.values()},
}
CLASSES: Final[dict[grpc.StatusCode, type[DumontError]]] = {code: error for error, code in CODES.items()}

# The details are in the trailing metadata twice, and gRPC limits that to 8 KiB by default: a longer
# error would arrive as RESOURCE_EXHAUSTED, without its own reason.
MESSAGE_LIMIT: Final = 1500
VALUE_LIMIT: Final = 200
VALUES_LIMIT: Final = 10


def to_status(error: DumontError, domain: str) -> Status:
    """The status that carries ``error`` to a caller.

    Args:
        error: what went wrong.
        domain: the service that says so, such as ``"controller.dumont"``.
    """
    message = _cut(error.message, MESSAGE_LIMIT)
    metadata = {
        _cut(key, VALUE_LIMIT): _cut(value, VALUE_LIMIT)
        for key, value in list(error.metadata.items())[:VALUES_LIMIT]
    }
    status = Status(code=_number(_code(error)), message=message)
    status.details.add().Pack(ErrorInfo(reason=error.reason, domain=domain, metadata=metadata))
    if error.field:
        violation = BadRequest.FieldViolation(
            field=error.field, description=_cut(message, VALUE_LIMIT), reason=error.reason
        )
        status.details.add().Pack(BadRequest(field_violations=[violation]))
    if error.retry_after is not None:
        delay = Duration()
        delay.FromNanoseconds(round(error.retry_after * 1e9))
        status.details.add().Pack(RetryInfo(retry_delay=delay))
    return status


def from_status(status: Status) -> DumontError:
    """The error in a status, such as that of a failed operation. Unknown details are ignored."""
    code = next((code for code in grpc.StatusCode if _number(code) == status.code), grpc.StatusCode.UNKNOWN)
    reason, metadata = code.name, dict[str, str]()
    field, retry_after = None, None
    for detail in status.details:
        info, request, retry = ErrorInfo(), BadRequest(), RetryInfo()
        if detail.Unpack(info):
            reason, metadata = info.reason or reason, dict(info.metadata)
        elif detail.Unpack(request) and request.field_violations:
            field = request.field_violations[0].field
        elif detail.Unpack(retry):
            retry_after = retry.retry_delay.ToNanoseconds() / 1e9
    error = CLASSES.get(code, DumontError)
    return error(reason, status.message, metadata=metadata, field=field, retry_after=retry_after)


def from_rpc_error(error: grpc.RpcError) -> DumontError:
    """The error that ended a call, sync or aio.

    An error that never reached a Dumont service (no route, deadline, a proxy's own refusal) has no
    details: its reason is then the name of its gRPC code.
    """
    call = cast(grpc.Call, error)
    try:
        status = rpc_status.from_call(call)
    except ValueError:  # the details contradict the call's code or message, which then hold
        status = None
    if status is not None:
        return from_status(status)
    code = call.code()
    return CLASSES.get(code, DumontError)(code.name, call.details() or code.name)


def is_from_service(error: grpc.RpcError) -> bool:
    """Whether a service of Dumont explained the error, rather than gRPC or something in between."""
    trailing = cast(grpc.Call, error).trailing_metadata() or ()
    return any(key == "grpc-status-details-bin" for key, _ in trailing)


def _code(error: DumontError) -> grpc.StatusCode:
    return next(CODES[kind] for kind in type(error).__mro__ if kind in CODES)


def _number(code: grpc.StatusCode) -> int:
    return code.value[0]


def _cut(text: str, limit: int) -> str:
    return text if len(text) <= limit else text[: limit - 1] + "…"
