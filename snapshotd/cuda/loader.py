"""The loader's process: ``python -m snapshotd.cuda.loader --socket PATH --files DIRECTORY``.

It keeps weight files registered with the GPUs and answers each order, one a connection: a line of JSON
``{"gpu": UUID, "size": bytes, "pieces": [[file, offset, bytes, place], ...]}`` is answered, when everything
is on that GPU, by a descriptor of the memory, which belongs to whoever asked from then on. Anything else
that comes back says what went wrong.

Registered memory is copied at the speed of the bus (54 GB/s on an H100), and registering 15 GB takes 0.4 s:
too long for a restore, so it is done once, ahead of it, in a process that stays. The files must lie in a
tmpfs.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import mmap
import os
import socket
import sys
import threading
from collections.abc import Iterable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cuda.bindings import driver

Piece = tuple[str, int, int, int]

# Longest line of an order: a model of a thousand shards with a thousand tensors each is below it.
LONGEST_ORDER = 64 << 20
ANSWER = b"{}"


class LoaderError(Exception):
    """An order cannot be carried out; the message goes to whoever gave it."""


def call(function: Any, *arguments: Any) -> Any:
    """Call the driver; its result without the status.

    Raises:
        LoaderError: it refused.
    """
    status, *result = function(*arguments)
    if status != driver.CUresult.CUDA_SUCCESS:
        raise LoaderError(f"{function.__name__} failed: {status.name}")
    return result[0] if result else None


@dataclass
class Registered:
    """A file that the GPUs can read from directly."""

    identity: tuple[int, int, int]
    mapping: mmap.mmap
    address: int

    @classmethod
    def open(cls, path: Path) -> Registered:
        with path.open("r+b") as file:
            mapping = mmap.mmap(file.fileno(), 0)
            identity = identify(os.fstat(file.fileno()))
        address = ctypes.addressof(ctypes.c_char.from_buffer(mapping))
        try:
            call(driver.cuMemHostRegister, address, len(mapping), driver.CU_MEMHOSTREGISTER_PORTABLE)
        except LoaderError as error:
            raise LoaderError(f"{path.name} cannot be registered: {error}") from error
        return cls(identity, mapping, address)

    def close(self) -> None:
        driver.cuMemHostUnregister(self.address)
        # Unmapped when the last view of it is gone, which is this object.


def identify(status: os.stat_result) -> tuple[int, int, int]:
    return status.st_ino, status.st_size, status.st_mtime_ns


class Files:
    """The registered files, by name, all below one directory."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self._open: dict[str, Registered] = {}
        self._lock = threading.Lock()

    def get(self, path: str) -> Registered:
        """The file that a model host knows as ``path``: of its directories only the name counts here.

        Raises:
            LoaderError: it is not among the node's weight files, or cannot be registered.
        """
        name = Path(path).name
        with self._lock:
            self._forget_gone()
            if name not in self._open:
                found = self.directory / name
                if found.is_symlink() or not found.is_file():
                    raise LoaderError(f"{name} is not among the node's weight files")
                self._open[name] = Registered.open(found)
            return self._open[name]

    def forget(self) -> None:
        """Let go of files that have left the directory: their memory is free only then."""
        with self._lock:
            self._forget_gone()

    def _forget_gone(self) -> None:
        for name, registered in list(self._open.items()):
            try:
                there = identify((self.directory / name).stat())[:2] == registered.identity[:2]
            except FileNotFoundError:
                there = False
            if not there:
                del self._open[name]
                registered.close()


class Gpu:
    """One GPU, its context, and a stream to copy on."""

    def __init__(self, device: Any) -> None:
        self.device = device
        self.context = call(driver.cuDevicePrimaryCtxRetain, device)
        self.enter()
        # Nothing is computed here, so nothing needs stacks or heaps: they would take 0.3 GB of the GPU.
        for limit in (driver.CUlimit.CU_LIMIT_STACK_SIZE, driver.CUlimit.CU_LIMIT_MALLOC_HEAP_SIZE):
            driver.cuCtxSetLimit(limit, 0)
        self.stream = call(driver.cuStreamCreate, driver.CUstream_flags.CU_STREAM_NON_BLOCKING)
        self._kind = driver.CUmemAllocationProp()
        self._kind.type = driver.CUmemAllocationType.CU_MEM_ALLOCATION_TYPE_PINNED
        self._kind.location.type = driver.CUmemLocationType.CU_MEM_LOCATION_TYPE_DEVICE
        self._kind.location.id = int(device)
        handles = driver.CUmemAllocationHandleType
        self._kind.requestedHandleTypes = handles.CU_MEM_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR

    def enter(self) -> None:
        """Use it from the calling thread."""
        call(driver.cuCtxSetCurrent, self.context)

    def load(self, size: int, pieces: Iterable[tuple[int, int, int]]) -> int:
        """Copy into new memory.

        Args:
            size: of the memory, a multiple of 2 MiB.
            pieces: address in registered memory, bytes, place in the new memory.

        Returns:
            A descriptor of it; nothing else holds it.
        """
        handles = driver.CUmemAllocationHandleType
        with ExitStack() as stack:
            handle = call(driver.cuMemCreate, size, self._kind, 0)
            stack.callback(driver.cuMemRelease, handle)
            address = call(driver.cuMemAddressReserve, size, 0, 0, 0)
            stack.callback(driver.cuMemAddressFree, address, size)
            call(driver.cuMemMap, address, size, 0, handle, 0)
            stack.callback(driver.cuMemUnmap, address, size)
            access = driver.CUmemAccessDesc()
            access.location = self._kind.location
            access.flags = driver.CUmemAccess_flags.CU_MEM_ACCESS_FLAGS_PROT_READWRITE
            call(driver.cuMemSetAccess, address, size, [access], 1)
            stack.callback(driver.cuStreamSynchronize, self.stream)
            for source, length, place in pieces:
                call(driver.cuMemcpyHtoDAsync, int(address) + place, source, length, self.stream)
            call(driver.cuStreamSynchronize, self.stream)
            kind = handles.CU_MEM_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR
            return int(call(driver.cuMemExportToShareableHandle, handle, kind, 0))


class Gpus:
    """The node's GPUs, by UUID; a context only for those that are used."""

    def __init__(self) -> None:
        call(driver.cuInit, 0)
        self._devices = {
            str(uuid_of(device)): device
            for device in (call(driver.cuDeviceGet, n) for n in range(call(driver.cuDeviceGetCount)))
        }
        self._open: dict[str, Gpu] = {}
        self._lock = threading.Lock()

    def get(self, uuid: str) -> Gpu:
        """
        Raises:
            LoaderError: there is none with that UUID.
        """
        with self._lock:
            if uuid not in self._devices:
                raise LoaderError(f"there is no GPU {uuid}")
            if uuid not in self._open:
                self._open[uuid] = Gpu(self._devices[uuid])
            gpu = self._open[uuid]
        gpu.enter()
        return gpu


def uuid_of(device: Any) -> str:
    """As NVML writes it."""
    text = bytes(call(driver.cuDeviceGetUuid, device).bytes).hex()
    return "GPU-" + "-".join((text[:8], text[8:12], text[12:16], text[16:20], text[20:]))


def serve(connection: socket.socket, gpus: Gpus, files: Files) -> None:
    """Carry out the order of one connection."""
    with connection:
        try:
            line = connection.makefile("rb").readline(LONGEST_ORDER)
            order = json.loads(line)
            gpu = gpus.get(order["gpu"])
            descriptor = gpu.load(order["size"], locate(files, order["pieces"], order["size"]))
        except (LoaderError, ValueError, KeyError, TypeError, OSError) as error:
            reply(connection, str(error).encode() or type(error).__name__.encode(), [])
            return
        try:
            reply(connection, ANSWER, [descriptor])
        finally:
            os.close(descriptor)


def locate(files: Files, pieces: Sequence[Piece], size: int) -> list[tuple[int, int, int]]:
    """Where each piece lies in memory, checked against the file and the block that it goes to."""
    found = []
    for path, offset, length, place in pieces:
        registered = files.get(path)
        if not (0 <= offset <= offset + length <= len(registered.mapping) and 0 <= place <= size - length):
            raise LoaderError(f"{length} bytes at {offset} of {Path(path).name} do not fit at {place}")
        found.append((registered.address + offset, length, place))
    return found


def reply(connection: socket.socket, data: bytes, descriptors: list[int]) -> None:
    try:
        socket.send_fds(connection, [data], descriptors)
    except OSError as error:
        # Whoever asked is gone; what was loaded goes with the descriptor.
        sys.stderr.write(f"an order was not taken: {error}\n")


def listen(path: Path) -> socket.socket:
    """Take the place of whatever an earlier loader left at ``path``."""
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    # Relative, because a socket's path may have 107 bytes and a state directory may be deep.
    os.chdir(path.parent)
    Path(path.name).unlink(missing_ok=True)
    listener.bind(path.name)
    Path(path.name).chmod(0o600)
    listener.listen()
    return listener


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--socket", type=Path, required=True)
    parser.add_argument("--files", type=Path, required=True, help="directory of the node's weight files")
    arguments = parser.parse_args()
    gpus, files = Gpus(), Files(arguments.files)
    listener = listen(arguments.socket)
    threading.Thread(target=accept, args=(listener, gpus, files), daemon=True).start()
    sys.stdout.write(json.dumps({"ready": True}) + "\n")
    sys.stdout.flush()
    # Each line says that files have left; the end of input, that snapshotd has.
    for _ in sys.stdin:
        files.forget()


def accept(listener: socket.socket, gpus: Gpus, files: Files) -> None:
    while True:
        connection, _ = listener.accept()
        threading.Thread(target=serve, args=(connection, gpus, files), daemon=True).start()


if __name__ == "__main__":
    main()
