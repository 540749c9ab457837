"""The closed set of errors, chosen by what the caller should do. Imports no gRPC.

Every error carries a stable ``reason`` in UPPER_SNAKE that programs match on, and a message that
says what happened, why, and what to do. ``dumont.rpc.status`` carries them over the wire as
``google.rpc.Status`` and back.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar


class DumontError(Exception):
    """An operation that did not happen.

    Args:
        reason: stable UPPER_SNAKE identifier.
        message: what, why and what to do, for a person.
        metadata: the values in the message, by name.
        field: the request field at fault, as its proto path.
        retry_after: seconds after which the same call may succeed.
    """

    code: ClassVar[str] = "UNKNOWN"

    def __init__(
        self,
        reason: str,
        message: str,
        *,
        metadata: Mapping[str, str] | None = None,
        field: str | None = None,
        retry_after: float | None = None,
    ) -> None:
        super().__init__(message)
        self.reason = reason
        self.message = message
        self.metadata = dict(metadata or {})
        self.field = field
        self.retry_after = retry_after

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.reason!r}, {self.message!r})"

    def __reduce__(self) -> tuple[Any, ...]:
        # For process pools. An exception's own way calls the class with ``args``, which lack the reason.
        return _unpickled, (type(self), self.args), self.__dict__


def describe_error(error: DumontError) -> dict[str, Any]:
    """An error as JSON."""
    return {
        "code": error.code,
        "reason": error.reason,
        "message": error.message,
        "field": error.field,
        "metadata": error.metadata,
        "retry_after": error.retry_after,
    }


def _unpickled(kind: type[DumontError], args: tuple[Any, ...]) -> DumontError:
    return kind.__new__(kind, *args)


class InvalidArgument(DumontError):
    """The request is wrong whatever the state; change it."""

    code = "INVALID_ARGUMENT"


class NotFound(DumontError):
    """What was named does not exist."""

    code = "NOT_FOUND"


class AlreadyExists(DumontError):
    """What was to be created exists; choose another id or use it."""

    code = "ALREADY_EXISTS"


class FailedPrecondition(DumontError):
    """The state forbids it; change the state first, repeating alone does not help."""

    code = "FAILED_PRECONDITION"


class ResourceExhausted(DumontError):
    """No room now: queue, memory or quota. Try later or free something."""

    code = "RESOURCE_EXHAUSTED"


class Aborted(DumontError):
    """Another operation is in the way; try again after it."""

    code = "ABORTED"


class Unavailable(DumontError):
    """The service cannot answer at present; the same call may be repeated."""

    code = "UNAVAILABLE"


class DeadlineExceeded(DumontError):
    """The caller's time was up before the work was done."""

    code = "DEADLINE_EXCEEDED"


class Cancelled(DumontError):
    """The caller gave up."""

    code = "CANCELLED"


class DataLoss(DumontError):
    """Stored bytes are not what was written; they are quarantined."""

    code = "DATA_LOSS"


class PermissionDenied(DumontError):
    """The caller is known and may not do this."""

    code = "PERMISSION_DENIED"


class Unauthenticated(DumontError):
    """The caller is not known."""

    code = "UNAUTHENTICATED"


class Internal(DumontError):
    """A defect on our side; its details are in the service's log only."""

    code = "INTERNAL"


def services_not_installed(*missing: str) -> FailedPrecondition:
    """For what needs the daemons, where only the client is installed; ``missing`` names modules."""
    return FailedPrecondition(
        "SERVICES_NOT_INSTALLED",
        "only Dumont's client is installed here; for the services install 'dumont-services[controller,node]'",
        metadata={"missing": ", ".join(missing)} if missing else None,
    )


ERRORS: dict[str, type[DumontError]] = {
    error.code: error
    for error in (
        InvalidArgument, NotFound, AlreadyExists, FailedPrecondition, ResourceExhausted, Aborted, Unavailable,
        DeadlineExceeded, Cancelled, DataLoss, PermissionDenied, Unauthenticated, Internal,
    )
}  # fmt: skip
