"""The GPUs to which the loader copies."""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack
from typing import Any

from snapshotd.cuda.driver import LoaderError, call

# Bytes after which the loader checks whether the order still stands: the bus copies them in 5 ms.
STRIDE = 256 << 20

Source = tuple[int, int, int]


class Gpu:
    """One GPU, with a context and a stream for copies."""

    def __init__(self, driver: Any, device: Any) -> None:
        self.device = device
        self._driver = driver
        self.context = call(driver.cuDevicePrimaryCtxRetain, device)
        self.enter()
        # Nothing is computed here, so no stacks and heaps are needed, which would take 0.3 GB of the GPU.
        for limit in (driver.CUlimit.CU_LIMIT_STACK_SIZE, driver.CUlimit.CU_LIMIT_MALLOC_HEAP_SIZE):
            driver.cuCtxSetLimit(limit, 0)
        self.stream = call(driver.cuStreamCreate, driver.CUstream_flags.CU_STREAM_NON_BLOCKING)
        self._kind = driver.CUmemAllocationProp()
        self._kind.type = driver.CUmemAllocationType.CU_MEM_ALLOCATION_TYPE_PINNED
        self._kind.location.type = driver.CUmemLocationType.CU_MEM_LOCATION_TYPE_DEVICE
        self._kind.location.id = int(device)
        self._handles = driver.CUmemAllocationHandleType.CU_MEM_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR
        self._kind.requestedHandleTypes = self._handles

    def enter(self) -> None:
        """Make its context current in the calling thread."""
        call(self._driver.cuCtxSetCurrent, self.context)

    def load(self, size: int, pieces: Iterable[Source], check: Callable[[], None]) -> int:
        """Copy into new GPU memory. The sources are not read any more once this returns or raises.

        Args:
            size: bytes of GPU memory, a multiple of 2 MiB.
            pieces: for each piece its address in registered memory, its bytes, and its place in the new
                memory.
            check: called before memory is allocated and between copies. If it raises, the copying ends.

        Returns:
            A descriptor of the memory, which nothing else refers to.

        Raises:
            DriverError: the driver refused; the memory has been freed.
        """
        driver = self._driver
        with ExitStack() as stack:
            check()
            handle = call(driver.cuMemCreate, size, self._kind, 0)
            stack.callback(call, driver.cuMemRelease, handle)
            address = call(driver.cuMemAddressReserve, size, 0, 0, 0)
            stack.callback(call, driver.cuMemAddressFree, address, size)
            call(driver.cuMemMap, address, size, 0, handle, 0)
            stack.callback(call, driver.cuMemUnmap, address, size)
            access = driver.CUmemAccessDesc()
            access.location = self._kind.location
            access.flags = driver.CUmemAccess_flags.CU_MEM_ACCESS_FLAGS_PROT_READWRITE
            call(driver.cuMemSetAccess, address, size, [access], 1)
            stack.callback(call, driver.cuStreamSynchronize, self.stream)
            queued = 0
            for source, length, place in strides(pieces):
                if queued + length > STRIDE:
                    call(driver.cuStreamSynchronize, self.stream)
                    check()
                    queued = 0
                call(driver.cuMemcpyHtoDAsync, int(address) + place, source, length, self.stream)
                queued += length
            call(driver.cuStreamSynchronize, self.stream)
            return int(call(driver.cuMemExportToShareableHandle, handle, self._handles, 0))


def strides(pieces: Iterable[Source]) -> Iterator[Source]:
    """Cut pieces so that none is longer than a stride."""
    for source, length, place in pieces:
        for start in range(0, length, STRIDE):
            yield source + start, min(STRIDE, length - start), place + start


class Gpus:
    """The node's GPUs by UUID. Each gets a context when it is first used or a file is registered.

    A GPU in an exclusive compute mode gets none, so that a model host can use it and copy its weights itself.

    Raises:
        DriverError: the driver cannot be used.
    """

    def __init__(self, driver: Any) -> None:
        self._driver = driver
        call(driver.cuInit, 0)
        self._devices = {
            uuid_of(driver, device): device
            for device in (call(driver.cuDeviceGet, n) for n in range(call(driver.cuDeviceGetCount)))
        }
        self._open: dict[str, Gpu] = {}
        self._lock = threading.Lock()

    def get(self, uuid: str) -> Gpu:
        """A GPU, with its context current in the calling thread.

        Raises:
            LoaderError: there is no GPU of that UUID, or its compute mode is exclusive.
            DriverError: it cannot be used.
        """
        with self._lock:
            if uuid not in self._devices:
                raise LoaderError(f"there is no GPU {uuid}")
            if uuid not in self._open:
                self._check_shared(uuid)
                self._open[uuid] = Gpu(self._driver, self._devices[uuid])
            gpu = self._open[uuid]
        gpu.enter()
        return gpu

    def open_all(self) -> None:
        """Make a context on every GPU, so that no order waits for one, and make one of them current.

        Raises:
            LoaderError: no GPU can be used; the error is that of the last one.
        """
        refusal = None
        for uuid in self._devices:
            try:
                self.get(uuid)
            except LoaderError as error:
                # The GPU is full, or another process has it for itself. An order for it will be refused.
                sys.stderr.write(f"GPU {uuid} is not opened: {error}\n")
                refusal = error
        if not self.enter_any() and refusal is not None:
            raise refusal

    def enter_any(self) -> bool:
        """Make any context current in the calling thread; False if there is none."""
        with self._lock:
            gpu = next(iter(self._open.values()), None)
        if gpu is None:
            return False
        gpu.enter()
        return True

    def _check_shared(self, uuid: str) -> None:
        """Refuse a GPU in an exclusive compute mode, where a context would keep out its other users."""
        attribute = self._driver.CUdevice_attribute.CU_DEVICE_ATTRIBUTE_COMPUTE_MODE
        mode = call(self._driver.cuDeviceGetAttribute, attribute, self._devices[uuid])
        if mode != self._driver.CUcomputemode.CU_COMPUTEMODE_DEFAULT:
            raise LoaderError(
                f"{uuid} lets one process in at a time; 'nvidia-smi -i {uuid} -c DEFAULT' lets it be shared"
            )


def uuid_of(driver: Any, device: Any) -> str:
    """The UUID of a device as NVML writes it."""
    text = bytes(call(driver.cuDeviceGetUuid, device).bytes).hex()
    return "GPU-" + "-".join((text[:8], text[8:12], text[12:16], text[16:20], text[20:]))
