"""The bindings of the CUDA driver without a driver: memory in this process, and refusals as a test lays them.

Copies are carried out when their stream is synchronised, from wherever they were to come.
"""

from __future__ import annotations

import ctypes
import itertools
import os
import threading
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

OK = SimpleNamespace(name="CUDA_SUCCESS")
UUIDS = [f"GPU-{digit * 8}-{digit * 4}-{digit * 4}-{digit * 4}-{digit * 12}" for digit in "ab"]


class _Names:
    """Constants, each its own name."""

    def __getattr__(self, name: str) -> str:
        return name


class FakeDriver:
    """Two GPUs; ``refusals`` holds the status of a function's next call, ``before`` what happens before it.

    Attributes:
        calls: the functions that were called.
        contexts: GPUs that were opened.
        registered: memory that the GPUs can read, bytes by address.
        memory: of the GPUs, by handle.
        modes: how processes may share each GPU.
    """

    CU_MEMHOSTREGISTER_PORTABLE = 1

    def __init__(self) -> None:
        self.refusals: dict[str, str] = {}
        self.before: dict[str, Callable[[], None]] = {}
        self.calls: list[str] = []
        self.contexts: set[int] = set()
        self.registered: dict[int, int] = {}
        self.memory: dict[int, bytearray] = {}
        self.modes = ["CU_COMPUTEMODE_DEFAULT"] * len(UUIDS)
        self._queued: list[tuple[int, int, int]] = []
        self._mapped: dict[int, int] = {}
        self._numbers = itertools.count(1)
        self._thread = threading.local()

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):
            raise AttributeError(name)
        if not name.startswith("cu"):
            return _Names()

        def function(*arguments: Any) -> tuple[Any, ...]:
            self.calls.append(name)
            self.before.get(name, lambda: None)()
            if (refusal := self.refusals.pop(name, None)) is not None:
                return (SimpleNamespace(name=refusal), None)
            result = getattr(self, "_" + name, lambda *arguments: None)(*arguments)
            return result if isinstance(result, tuple) else (OK, result)

        function.__name__ = name
        return function

    def CUmemAllocationProp(self) -> SimpleNamespace:
        return SimpleNamespace(location=SimpleNamespace())

    def CUmemAccessDesc(self) -> SimpleNamespace:
        return SimpleNamespace()

    def _cuDeviceGetCount(self) -> int:
        return len(UUIDS)

    def _cuDeviceGet(self, number: int) -> int:
        return number

    def _cuDeviceGetUuid(self, device: int) -> SimpleNamespace:
        return SimpleNamespace(bytes=bytes.fromhex(UUIDS[device][4:].replace("-", "")))

    def _cuDeviceGetAttribute(self, attribute: str, device: int) -> str:
        assert attribute == "CU_DEVICE_ATTRIBUTE_COMPUTE_MODE"
        return self.modes[device]

    def _cuDevicePrimaryCtxRetain(self, device: int) -> int:
        self.contexts.add(device)
        return device

    def _cuCtxSetCurrent(self, context: int) -> None:
        self._thread.context = context

    def _cuMemHostRegister(self, address: int, size: int, flags: int) -> Any:
        if not hasattr(self._thread, "context"):
            return (SimpleNamespace(name="CUDA_ERROR_INVALID_CONTEXT"),)
        self.registered[address] = size
        return None

    def _cuMemHostUnregister(self, address: int) -> Any:
        if not hasattr(self._thread, "context"):
            return (SimpleNamespace(name="CUDA_ERROR_INVALID_CONTEXT"),)
        del self.registered[address]
        return None

    def _cuMemCreate(self, size: int, kind: object, flags: int) -> int:
        handle = next(self._numbers)
        self.memory[handle] = bytearray(size)
        return handle

    def _cuMemAddressReserve(self, size: int, *rest: object) -> int:
        return next(self._numbers) << 40

    def _cuMemMap(self, address: int, size: int, offset: int, handle: int, flags: int) -> None:
        self._mapped[address] = handle

    def _cuMemUnmap(self, address: int, size: int) -> None:
        del self._mapped[address]

    def _cuMemRelease(self, handle: int) -> None:
        del self.memory[handle]

    def _cuMemcpyHtoDAsync(self, target: int, source: int, size: int, stream: object) -> None:
        self._queued.append((target, source, size))

    def _cuStreamSynchronize(self, stream: object) -> None:
        for target, source, size in self._queued:
            # A copy from memory that is registered no more would be one from anywhere.
            assert any(start <= source < start + length for start, length in self.registered.items())
            base, handle = next((at, held) for at, held in self._mapped.items() if at >> 40 == target >> 40)
            self.memory[handle][target - base : target - base + size] = ctypes.string_at(source, size)
        self._queued.clear()

    def _cuMemExportToShareableHandle(self, handle: int, kind: object, flags: int) -> int:
        descriptor = os.memfd_create("gpu")
        os.write(descriptor, self.memory[handle])
        return descriptor
