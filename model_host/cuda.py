"""The CUDA driver, called directly for the few things that torch has no call for.

Through ctypes, because the driver is loaded in a GPU process anyway and a package around it would be part of
every snapshot. Sources: CUDA Driver API, Context Management and Virtual Memory Management.
"""

from __future__ import annotations

import ctypes
from dataclasses import dataclass
from functools import cache
from typing import Any, Final

LIMIT_STACK_SIZE: Final = 0
HANDLE_POSIX_FILE_DESCRIPTOR: Final = 1
LOCATION_DEVICE: Final = 1
ACCESS_READ_WRITE: Final = 3
ALIGNMENT: Final = 2 << 20


class CudaError(Exception):
    """The driver refused a call."""


class _Access(ctypes.Structure):
    """CUmemAccessDesc."""

    _fields_ = (("location_type", ctypes.c_int), ("location_id", ctypes.c_int), ("flags", ctypes.c_int))


def shrink_stacks() -> int:
    """Give back the memory that a context holds for the stacks of all threads that a GPU could run.

    It is 264 MiB on an H100, which a checkpoint would copy; a kernel that needs some gets it again.

    Returns:
        The limit as it was, in bytes a thread, for :func:`restore_stacks`.
    """
    limit = ctypes.c_size_t()
    _call("cuCtxGetLimit", ctypes.byref(limit), LIMIT_STACK_SIZE)
    _call("cuCtxSetLimit", LIMIT_STACK_SIZE, ctypes.c_size_t(0))
    return limit.value


def restore_stacks(limit: int) -> None:
    _call("cuCtxSetLimit", LIMIT_STACK_SIZE, ctypes.c_size_t(limit))


@dataclass(frozen=True)
class Imported:
    """GPU memory that another process allocated and handed over; it lives as long as one of them holds it.

    Attributes:
        address: on the device; ``size`` bytes.
        device: ordinal.
    """

    address: int
    size: int
    device: int
    handle: int

    @property
    def __cuda_array_interface__(self) -> dict[str, Any]:
        return {"shape": (self.size,), "typestr": "|u1", "data": (self.address, False), "version": 3}

    @classmethod
    def open(cls, descriptor: int, size: int, device: int) -> Imported:
        """Map what ``descriptor`` stands for; the descriptor stays open.

        Raises:
            CudaError: it is no GPU memory of ``size`` bytes.
        """
        handle, address = ctypes.c_uint64(), ctypes.c_uint64()
        _call(
            "cuMemImportFromShareableHandle",
            ctypes.byref(handle),
            ctypes.c_void_p(descriptor),
            HANDLE_POSIX_FILE_DESCRIPTOR,
        )
        try:
            _call("cuMemAddressReserve", ctypes.byref(address), *_sizes(size, ALIGNMENT), *_numbers(0, 0))
        except CudaError:
            _call("cuMemRelease", handle)
            raise
        try:
            _call("cuMemMap", address, *_sizes(size, 0), handle, *_numbers(0))
            access = _Access(LOCATION_DEVICE, device, ACCESS_READ_WRITE)
            _call("cuMemSetAccess", address, *_sizes(size), ctypes.byref(access), *_sizes(1))
        except CudaError:
            cls(address.value, size, device, handle.value).close()
            raise
        return cls(address.value, size, device, handle.value)

    def close(self) -> None:
        """Give it up. Nothing may use it any more."""
        address = ctypes.c_uint64(self.address)
        for name, arguments in (
            ("cuMemUnmap", (address, *_sizes(self.size))),
            ("cuMemRelease", (ctypes.c_uint64(self.handle),)),
            ("cuMemAddressFree", (address, *_sizes(self.size))),
        ):
            getattr(_driver(), name)(*arguments)


def _sizes(*values: int) -> list[ctypes.c_size_t]:
    return [ctypes.c_size_t(value) for value in values]


def _numbers(*values: int) -> list[ctypes.c_uint64]:
    return [ctypes.c_uint64(value) for value in values]


@cache
def _driver() -> ctypes.CDLL:
    return ctypes.CDLL("libcuda.so.1")


def _call(name: str, *arguments: Any) -> None:
    result = getattr(_driver(), name)(*arguments)
    if result != 0:
        text = ctypes.c_char_p()
        _driver().cuGetErrorName(result, ctypes.byref(text))
        raise CudaError(f"{name} failed: {(text.value or b'?').decode()} ({result})")
