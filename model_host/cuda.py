"""The CUDA driver, called directly for the few things that torch has no call for.

Through ctypes, because the driver is loaded in a GPU process anyway and a package around it would be part of
every snapshot. Sources: CUDA Driver API, Context Management and Virtual Memory Management.
"""

from __future__ import annotations

import ctypes
from functools import cache
from typing import Any, Final

LIMIT_STACK_SIZE: Final = 0
HANDLE_POSIX_FILE_DESCRIPTOR: Final = 1
LOCATION_DEVICE: Final = 1
ACCESS_READ_WRITE: Final = 3
PINNED: Final = 1
ALIGNMENT: Final = 2 << 20


class CudaError(Exception):
    """The driver refused a call."""


class _Properties(ctypes.Structure):
    """CUmemAllocationProp."""

    _fields_ = (
        ("type", ctypes.c_int),
        ("handle_types", ctypes.c_int),
        ("location_type", ctypes.c_int),
        ("location_id", ctypes.c_int),
        ("windows_metadata", ctypes.c_void_p),
        ("compression", ctypes.c_ubyte),
        ("gpu_direct_rdma", ctypes.c_ubyte),
        ("usage", ctypes.c_ushort),
        ("reserved", ctypes.c_ubyte * 4),
    )


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


class Block:
    """Addresses on a GPU that this process keeps for good, and the memory behind them, which comes and goes.

    What has been captured into a CUDA graph points to addresses: after a checkpoint the memory must be found
    at the same ones, but neither has to be kept meanwhile nor copied.

    Args:
        size: in bytes; rounded up to what can be mapped.
        device: ordinal.

    Raises:
        CudaError: there are not as many addresses left.
    """

    def __init__(self, size: int, device: int) -> None:
        self.size = -(-size // ALIGNMENT) * ALIGNMENT
        self.device = device
        address = ctypes.c_uint64()
        _call("cuMemAddressReserve", ctypes.byref(address), *_sizes(self.size, ALIGNMENT), *_numbers(0, 0))
        self.address = address.value
        self._handles: list[tuple[int, int, int]] = []

    @property
    def mapped(self) -> int:
        """How many bytes, from the first on, have memory."""
        return sum(size for _, size, _ in self._handles)

    @property
    def __cuda_array_interface__(self) -> dict[str, Any]:
        return {"shape": (self.size,), "typestr": "|u1", "data": (self.address, False), "version": 3}

    def map(self, size: int | None = None) -> None:
        """Put memory behind the first ``size`` bytes; None means all. What is there already stays.

        Raises:
            CudaError: the GPU has not as much left; nothing has changed.
        """
        wanted = self.size if size is None else min(-(-size // ALIGNMENT) * ALIGNMENT, self.size)
        missing = wanted - self.mapped
        if missing <= 0:
            return
        handle = ctypes.c_uint64()
        properties = _Properties(type=PINNED, location_type=LOCATION_DEVICE, location_id=self.device)
        _call("cuMemCreate", ctypes.byref(handle), *_sizes(missing), ctypes.byref(properties), *_numbers(0))
        address = self.address + self.mapped
        self._handles.append((address, missing, _map(handle, address, missing, self.device)))

    def map_shared(self, descriptor: int) -> None:
        """Put memory behind all of it that another process has allocated; the descriptor stays open.

        Raises:
            CudaError: ``descriptor`` is no GPU memory of this size.
        """
        address, size = self.address + self.mapped, self.size - self.mapped
        self._handles.append((address, size, map_shared(descriptor, address, size, self.device)))

    def unmap(self) -> None:
        """Give the memory back; nothing may use it any more. The addresses stay."""
        handles, self._handles = self._handles, []
        for address, size, handle in handles:
            _driver().cuMemUnmap(*_numbers(address), *_sizes(size))
            _driver().cuMemRelease(ctypes.c_uint64(handle))


def map_shared(descriptor: int, address: int, size: int, device: int) -> int:
    """Put memory that another process has allocated behind reserved addresses; the descriptor stays open.

    Returns:
        The memory's handle, which the caller releases.

    Raises:
        CudaError: ``descriptor`` is no GPU memory of this size.
    """
    handle = ctypes.c_uint64()
    _call(
        "cuMemImportFromShareableHandle",
        ctypes.byref(handle),
        ctypes.c_void_p(descriptor),
        HANDLE_POSIX_FILE_DESCRIPTOR,
    )
    return _map(handle, address, size, device)


def _map(handle: ctypes.c_uint64, address: int, size: int, device: int) -> int:
    """Put memory behind reserved addresses; if that fails, release it. Returns its handle."""
    try:
        _call("cuMemMap", *_numbers(address), *_sizes(size, 0), handle, *_numbers(0))
    except CudaError:
        _driver().cuMemRelease(handle)
        raise
    access = _Access(LOCATION_DEVICE, device, ACCESS_READ_WRITE)
    try:
        _call("cuMemSetAccess", *_numbers(address), *_sizes(size), ctypes.byref(access), *_sizes(1))
    except CudaError:
        _driver().cuMemUnmap(*_numbers(address), *_sizes(size))
        _driver().cuMemRelease(handle)
        raise
    return handle.value


class Kernel:
    """A compiled kernel, ready to be launched.

    Args:
        name: in the module.
        threads: of a block.
        shared: bytes of shared memory that a block needs.
    """

    def __init__(self, module: bytes, name: str, threads: int, shared: int) -> None:
        self._module = ctypes.c_void_p()
        self._function = ctypes.c_void_p()
        self._threads, self._shared = threads, shared
        _call("cuModuleLoadData", ctypes.byref(self._module), ctypes.c_char_p(module))
        _call(
            "cuModuleGetFunction", ctypes.byref(self._function), self._module, ctypes.c_char_p(name.encode())
        )

    def launch(self, stream: int, blocks: tuple[int, int], *arguments: Any) -> None:
        """Put it into ``stream``.

        Args:
            arguments: ctypes values, in the kernel's order.
        """
        pointers = (ctypes.c_void_p * len(arguments))(*(ctypes.addressof(value) for value in arguments))
        _call(
            "cuLaunchKernel", self._function,
            *map(ctypes.c_uint, (*blocks, 1, self._threads, 1, 1, self._shared)),
            ctypes.c_void_p(stream), pointers, None,
        )  # fmt: skip


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
