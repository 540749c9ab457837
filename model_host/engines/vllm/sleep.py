"""The memory of vLLM: given up before the process is frozen, and back at the same addresses when it wakes.

What vLLM has compiled, and its CUDA graphs above all, points to addresses. vLLM's own allocator for sleeping
(``CuMemAllocator``) keeps them and gives up the memory behind them. What is added here is where the weights
come from. vLLM fuses weights and orders them anew, but most of them still are, piece by piece, bytes of the
model's own files. Each piece is looked for there once, when the model is loaded. On wake the node's loader
copies the pieces from the weight cache, which all instances of the model share, whatever their engine. Only
what is in no file, such as tables that were computed or weights that were quantised at load, stays in this
process and is in its snapshots.
"""

from __future__ import annotations

import ctypes
import logging
import mmap
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Protocol
from unittest.mock import patch

import torch
from torch import Tensor

from dumont.errors import ResourceExhausted
from model_host import cuda
from model_host.delivery import Delivery, DeliveryFailed, Extent, Plan, extents
from model_host.engine import Settings, WeightsPlace
from model_host.model_files import ModelFiles
from model_host.weights import copy_through_pinned, map_shards

if TYPE_CHECKING:
    from model_host.engines.vllm.versions import Core

log = logging.getLogger(__name__)

# By which tensors are told apart at first; the rest is compared as well.
BEGINNING: Final = 64
# Room beside the tensors in the one allocation that takes them.
SPARE: Final = 64 << 20
WEIGHTS: Final = "weights"
# Beside the KV cache; what is larger is taken for a part of it.
LARGEST_TABLE: Final = 256 << 20

_libc = ctypes.CDLL(None)
_libc.memcmp.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t]


class Memory(Protocol):
    """What vLLM holds besides its code and its books."""

    def arranged(self) -> AbstractContextManager[None]:
        """Around the making of the engine: let its memory lie so that it can be given up."""

    def settle(self, core: Core) -> None:
        """Learn what is where, once the engine is made."""

    def suspend(self) -> None:
        """Give up all that is not needed to come back."""

    def order(self, loader: Path, gpu: str) -> None:
        """Let the node's loader begin to bring the weights; uses no GPU."""

    def resume(self) -> None:
        """Undo ``suspend``.

        Raises:
            ResourceExhausted: GPU_MEMORY.
        """


class CpuMemory:
    """On a CPU the weights stay: vLLM has packed them anew for its kernels. The KV cache goes."""

    def __init__(self) -> None:
        self._kv: list[Tensor] = []

    def arranged(self) -> AbstractContextManager[None]:
        return nullcontext()

    def settle(self, core: Core) -> None:
        self._kv = core.kv_tensors()
        # vLLM has written zeros to all of it, which a process need not hold.
        self.suspend()

    def suspend(self) -> None:
        for start, end in _whole_pages(self._kv):
            # Its pages read as zeros from now on, and no snapshot has them.
            _libc.madvise(ctypes.c_void_p(start), ctypes.c_size_t(end - start), mmap.MADV_DONTNEED)

    def order(self, loader: Path, gpu: str) -> None:
        return

    def resume(self) -> None:
        return


def _whole_pages(tensors: Iterable[Tensor]) -> Iterator[tuple[int, int]]:
    """The pages that belong to each tensor's memory alone."""
    for tensor in tensors:
        storage = tensor.untyped_storage()
        start = -(-storage.data_ptr() // mmap.PAGESIZE) * mmap.PAGESIZE
        end = (storage.data_ptr() + storage.nbytes()) // mmap.PAGESIZE * mmap.PAGESIZE
        if start < end:
            yield start, end


@dataclass(frozen=True)
class Piece:
    """Bytes of a weight file that lie somewhere in GPU memory.

    Attributes:
        place: the offset in their allocation.
        tensor: the name of the file's tensor that they are.
    """

    place: int
    tensor: str
    size: int


@dataclass
class Allocation:
    """Memory that vLLM's allocator has mapped, and for weights what is in it.

    Attributes:
        handle: of the allocator: device, bytes, address, and the address of the driver's handle.
        pieces: what the model's files have of it.
        rest: bytes that no file has, by their offset.
        zeros: bytes that are all zero, offset and size.
    """

    handle: tuple[int, int, int, int]
    pieces: list[Piece] = field(default_factory=list)
    rest: dict[int, Tensor] = field(default_factory=dict)
    zeros: list[tuple[int, int]] = field(default_factory=list)
    delivery: Delivery | None = None

    @property
    def size(self) -> int:
        return self.handle[1]

    @property
    def address(self) -> int:
        return self.handle[2]

    def view(self, place: int, size: int) -> Tensor:
        """Bytes of it, while it is mapped."""
        return torch.as_tensor(_Bytes(self.address + place, size), device="cuda")

    def learn(
        self,
        blocks: Iterable[tuple[int, int]],
        tensors: Mapping[str, Tensor],
        index: Mapping[bytes, Sequence[str]],
    ) -> None:
        """Find out what is in some blocks of it, and keep what is in no file.

        Args:
            blocks: offset and size of each.
            tensors, index: the model's files, as for :func:`match`.
        """
        for place, size in blocks:
            content = self.view(place, size).cpu()
            pieces, rest = match(content, tensors, index)
            self.pieces += [Piece(place + at, name, length) for at, name, length in pieces]
            for start, end in rest:
                if content[start:end].any():
                    self.rest[place + start] = content[start:end].clone()
                else:
                    self.zeros.append((place + start, end - start))

    def fill(self) -> None:
        """Bring back what is in no file."""
        for place, rest in self.rest.items():
            self.view(place, rest.numel()).copy_(rest)
        for place, size in self.zeros:
            self.view(place, size).zero_()


class _Bytes:
    """GPU memory as torch is told of it."""

    def __init__(self, address: int, size: int) -> None:
        self.__cuda_array_interface__ = {
            "shape": (size,), "typestr": "|u1", "data": (address, False), "version": 3,
        }  # fmt: skip


class GpuMemory:
    """Weights and KV cache on a GPU.

    Args:
        files: where the weights come from.
        settings: with weights that are to be included in the process, no file is needed.
    """

    def __init__(self, files: ModelFiles, settings: Settings) -> None:
        self._shards = files.shards
        self._included = settings.weights is WeightsPlace.INCLUDED
        self._dtype = settings.engine_options.get("dtype")
        self._tensors: dict[str, Tensor] = {}
        self._extents: dict[str, Extent] = {}
        self._weights: list[Allocation] = []
        self._others: list[Allocation] = []
        self._stack_limit = 0

    @contextmanager
    def arranged(self) -> Iterator[None]:
        """Let all weights lie in one allocation, or nearly: the loader brings an allocation at a time."""
        from vllm.device_allocator.cumem import CuMemAllocator
        from vllm.v1.worker.gpu_worker import Worker

        self._tensors = map_shards(self._shards)
        self._extents = extents(self._shards)
        size = sum(map(self._loaded_bytes, self._tensors.values())) + SPARE
        use_memory_pool = CuMemAllocator.use_memory_pool

        @contextmanager
        def use_roomy_pool(allocator: Any, tag: str | None = None) -> Iterator[None]:
            with use_memory_pool(allocator, tag):
                if tag == WEIGHTS and size < torch.cuda.mem_get_info()[0]:
                    # Given back to the pool at once, which serves the tensors from it.
                    room = torch.empty(size, dtype=torch.uint8, device="cuda")
                    del room
                yield

        with (
            patch.object(CuMemAllocator, "use_memory_pool", use_roomy_pool),
            # It keeps the pool from dividing large allocations.
            patch.object(Worker, "_scoped_allocator_max_split", lambda *_, **__: nullcontext(), create=True),
        ):
            yield

    def _loaded_bytes(self, tensor: Tensor) -> int:
        """About how many bytes vLLM makes of it: in float32 only where that is asked for."""
        wide = self._dtype in ("float", "float32") or tensor.element_size() <= 2
        return tensor.numel() * (tensor.element_size() if wide else 2)

    def settle(self, core: Core) -> None:
        from vllm.device_allocator.cumem import CuMemAllocator

        torch.cuda.synchronize()
        used = _used_blocks()
        index = {} if self._included else _index(self._tensors)
        kv = {tensor.untyped_storage().data_ptr() for tensor in core.kv_tensors()}
        for data in CuMemAllocator.get_instance().pointer_to_data.values():
            allocation = Allocation(data.handle)
            blocks = used.get(allocation.address, [(0, allocation.size)])
            if data.tag == WEIGHTS:
                self._weights.append(allocation)
                allocation.learn(blocks, self._tensors, index)
            else:
                # Beside the KV cache are tables, some of them of addresses.
                self._others.append(allocation)
                tables = [
                    (place, size)
                    for place, size in blocks
                    if allocation.address + place not in kv and size <= LARGEST_TABLE
                ]
                allocation.learn(tables, {}, {})
        allocations = [*self._weights, *self._others]
        found = sum(piece.size for one in allocations for piece in one.pieces)
        kept = sum(rest.numel() for one in allocations for rest in one.rest.values())
        log.info(
            "weights: %d MB of the model's files, in %d allocations; %d MB are in no file, and kept",
            found >> 20, len(self._weights), kept >> 20,
        )  # fmt: skip

    def suspend(self) -> None:
        from vllm.device_allocator.cumem import unmap_and_release

        torch.cuda.synchronize()
        self._cancel()
        for allocation in (*self._weights, *self._others):
            unmap_and_release(allocation.handle)
        # Not cuBLAS's workspaces: the graphs point to them.
        torch.cuda.empty_cache()
        torch._C._host_emptyCache()
        self._stack_limit = cuda.shrink_stacks()

    def order(self, loader: Path, gpu: str) -> None:
        self._cancel()
        for allocation in self._weights:
            if not allocation.pieces:
                continue
            try:
                allocation.delivery = Delivery.order(loader, gpu, self._plan(allocation))
            except DeliveryFailed as error:
                log.info("no loader brings the weights: %s", error)
                return

    def _plan(self, allocation: Allocation) -> Plan:
        return Plan(allocation.size, {}, tuple(_joined(allocation.pieces, self._extents)))

    def resume(self) -> None:
        from vllm.device_allocator.cumem import create_and_map

        if self._stack_limit:
            cuda.restore_stacks(self._stack_limit)
            self._stack_limit = 0
        pairs: list[tuple[Tensor, Tensor]] = []
        mapped: list[Allocation] = []
        try:
            # Others first: what is ordered arrives meanwhile.
            for allocation in self._others:
                create_and_map(allocation.handle)
                mapped.append(allocation)
                allocation.fill()
            for allocation in self._weights:
                if not _take_delivery(allocation):
                    create_and_map(allocation.handle)
                    pairs += self._pairs(allocation)
                mapped.append(allocation)
                allocation.fill()
        except (RuntimeError, cuda.CudaError) as error:
            self._give_back(mapped)
            raise ResourceExhausted(
                "GPU_MEMORY", f"the GPU has no room left for this model: {error}", retry_after=1.0
            ) from error
        if pairs:
            copy_through_pinned(pairs)
        torch.cuda.synchronize()

    def _give_back(self, mapped: Sequence[Allocation]) -> None:
        from vllm.device_allocator.cumem import unmap_and_release

        self._cancel()
        for allocation in mapped:
            unmap_and_release(allocation.handle)
        self._stack_limit = cuda.shrink_stacks()

    def _pairs(self, allocation: Allocation) -> Iterator[tuple[Tensor, Tensor]]:
        for piece in allocation.pieces:
            source = self._tensors[piece.tensor].view(-1).view(torch.uint8)
            yield source, allocation.view(piece.place, piece.size)

    def _cancel(self) -> None:
        for allocation in self._weights:
            if allocation.delivery is not None:
                allocation.delivery.cancel()
                allocation.delivery = None


def _take_delivery(allocation: Allocation) -> bool:
    """Map what the loader has brought at the allocation's address, if it was ordered and came."""
    delivery, allocation.delivery = allocation.delivery, None
    if delivery is None:
        return False
    try:
        descriptor = delivery.receive()
        try:
            handle = cuda.map_shared(descriptor, allocation.address, allocation.size, allocation.handle[0])
        finally:
            os.close(descriptor)
    except (DeliveryFailed, cuda.CudaError) as error:
        log.warning("the loader did not bring the weights, so they are copied here: %s", error)
        return False
    # What the allocator will release.
    ctypes.c_uint64.from_address(allocation.handle[3]).value = handle
    return True


def _joined(pieces: Iterable[Piece], where: Mapping[str, Extent]) -> Iterator[tuple[str, int, int, int]]:
    """Pieces as the loader is told of them; neighbours in a file that are neighbours in memory are one."""
    last: tuple[str, int, int, int] | None = None
    for piece in sorted(pieces, key=lambda one: one.place):
        extent = where[piece.tensor]
        file = str(extent.file)
        if last is not None and (file, extent.offset, piece.place) == (
            last[0], last[1] + last[2], last[3] + last[2],
        ):  # fmt: skip
            last = (file, last[1], last[2] + piece.size, last[3])
            continue
        if last is not None:
            yield last
        last = (file, extent.offset, piece.size, piece.place)
    if last is not None:
        yield last


def _used_blocks() -> dict[int, list[tuple[int, int]]]:
    """Offset and bytes of what torch has handed out, by the address of the allocation that it is in."""
    return {
        segment["address"]: [
            (block["address"] - segment["address"], block.get("requested_size") or block["size"])
            for block in segment["blocks"]
            if block["state"] == "active_allocated"
        ]
        for segment in torch.cuda.memory_snapshot()  # type: ignore[no-untyped-call]
    }


def _index(tensors: Mapping[str, Tensor]) -> dict[bytes, list[str]]:
    """The names of tensors by the bytes with which they begin, the largest first."""
    index: dict[bytes, list[str]] = {}
    for name, tensor in sorted(tensors.items(), key=lambda item: -item[1].nbytes):
        if tensor.nbytes >= BEGINNING:
            index.setdefault(ctypes.string_at(tensor.data_ptr(), BEGINNING), []).append(name)
    return index


def match(
    content: Tensor, tensors: Mapping[str, Tensor], index: Mapping[bytes, Sequence[str]]
) -> tuple[list[tuple[int, str, int]], list[tuple[int, int]]]:
    """Find whole tensors of the model's files in memory: one, or several one after the other.

    Args:
        content: bytes, in host memory.
        index: of ``tensors``, from ``_index``.

    Returns:
        Offset, name and bytes of what was found; start and end of what was not.
    """
    found: list[tuple[int, str, int]] = []
    address, size, at = content.data_ptr(), content.numel(), 0
    while at + BEGINNING <= size:
        name = _same(address + at, size - at, tensors, index)
        if name is None:
            break
        found.append((at, name, tensors[name].nbytes))
        at += tensors[name].nbytes
    return found, [(at, size)] if at < size else []


def _same(
    address: int, size: int, tensors: Mapping[str, Tensor], index: Mapping[bytes, Sequence[str]]
) -> str | None:
    """The largest tensor that the memory at ``address`` begins with."""
    for name in index.get(ctypes.string_at(address, BEGINNING), ()):
        tensor = tensors[name]
        if tensor.nbytes <= size and _libc.memcmp(address, tensor.data_ptr(), tensor.nbytes) == 0:
            return name
    return None
