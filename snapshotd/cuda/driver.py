"""Call the CUDA driver through its bindings, ``cuda.bindings.driver`` or a module like it."""

from __future__ import annotations

from typing import Any

# Errors after which the next call may succeed. Most other errors of the driver stay with the process until it
# ends.
PASSING = ("CUDA_ERROR_OUT_OF_MEMORY", "CUDA_ERROR_INVALID_VALUE")


class LoaderError(Exception):
    """An order cannot be carried out. The message goes to the sender of the order."""


class DriverError(LoaderError):
    """The driver refused a call.

    Args:
        function: the name of the function.
        status: the driver's name of the error.

    Attributes:
        lasting: the driver can no longer be used in this process.
    """

    def __init__(self, function: str, status: str) -> None:
        super().__init__(f"{function} failed: {status}")
        self.lasting = status not in PASSING


def call(function: Any, *arguments: Any) -> Any:
    """Call a function of the driver, and return its result without the status.

    Raises:
        DriverError: the driver refused.
    """
    status, *result = function(*arguments)
    if status.name != "CUDA_SUCCESS":
        raise DriverError(function.__name__, status.name)
    return result[0] if result else None
