"""Calls of the CUDA driver through its bindings, ``cuda.bindings.driver`` or something like it."""

from __future__ import annotations

from typing import Any

# What a call may be refused for and the next one work. After anything else the driver promises nothing: most
# of its errors stay with the process until it ends.
PASSING = ("CUDA_ERROR_OUT_OF_MEMORY", "CUDA_ERROR_INVALID_VALUE")


class LoaderError(Exception):
    """An order cannot be carried out; the message goes to whoever gave it."""


class DriverError(LoaderError):
    """The driver refused a call.

    Args:
        function: its name.
        status: the driver's name of it.
    """

    def __init__(self, function: str, status: str) -> None:
        super().__init__(f"{function} failed: {status}")
        self.lasting = status not in PASSING


def call(function: Any, *arguments: Any) -> Any:
    """Call the driver; its result without the status.

    Raises:
        DriverError: it refused.
    """
    status, *result = function(*arguments)
    if status.name != "CUDA_SUCCESS":
        raise DriverError(function.__name__, status.name)
    return result[0] if result else None
