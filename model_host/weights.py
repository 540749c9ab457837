"""Weights that stay outside the snapshot: mapped from their safetensors files, never copied.

On the CPU the parameters *are* the mapped files: private file mappings nobody writes to, which CRIU leaves
out of an image and maps again at restore. On a GPU the mapping is the source that ``attach`` copies from,
before the first call and again after every ``detach``.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Lock
from typing import TYPE_CHECKING, Final

import torch
from safetensors import SafetensorError, safe_open

from model_host import cuda
from model_host.delivery import Delivery, DeliveryFailed, Extent, plan
from model_host.model_files import invalid

if TYPE_CHECKING:
    from torch import Tensor, nn

log = logging.getLogger(__name__)

# Of 1, 4 and 16 MiB and 8 to 14 threads, these were the fastest: 15.2 GB in 0.78 s on an H100.
STAGING_BYTES: Final = 16 * 1024 * 1024
COPY_THREADS: Final = 8

Transfer = Callable[[Iterable[tuple["Tensor", "Tensor"]]], None]


def map_shards(shards: Iterable[Path]) -> dict[str, Tensor]:
    """Every tensor of the safetensors files, by name, as a view of the mapped file.

    Raises:
        FailedPrecondition: MODEL_INVALID, a file is truncated or corrupt, and is named.
    """
    tensors: dict[str, Tensor] = {}
    for shard in shards:
        try:
            with safe_open(shard, framework="pt", device="cpu") as file:
                for name in file.keys():  # noqa: SIM118  (not a dict)
                    tensors[name] = file.get_tensor(name)
        except (SafetensorError, OSError, RuntimeError, ValueError) as error:
            raise invalid(shard, f"is truncated or corrupt ({error})") from error
    return tensors


class Weights:
    """The parameters of one model and the mapped files behind them.

    Args:
        parameters: the model's, by name; tied ones once.
        sources: the mapped tensor behind each parameter. Empty when the model could not be built from mapped
            files: its weights then stay where they are.
        device: where the parameters are while attached.
        extents: where each parameter's bytes lie in the files, for the loader to find them.
        transfer: copies pairs of (source, target).
    """

    def __init__(
        self,
        parameters: Mapping[str, nn.Parameter],
        sources: Mapping[str, Tensor],
        device: torch.device,
        extents: Mapping[str, Extent] | None = None,
        transfer: Transfer | None = None,
    ) -> None:
        self._parameters = dict(parameters)
        self._sources = dict(sources)
        self._device = device
        self._plan = plan(extents or {})
        self._transfer = transfer or copy_through_pinned
        self._delivery: Delivery | None = None
        # Where they are on a GPU, at the same addresses for ever.
        self._block: cuda.Block | None = None

    @property
    def detachable(self) -> bool:
        """Whether ``detach`` frees anything: on the CPU the mapping itself costs nothing."""
        return bool(self._sources) and self._device.type == "cuda"

    def detach(self) -> None:
        """Free the GPU's copy. The model cannot compute until ``attach``."""
        if self._block is not None:
            torch.cuda.synchronize(self._device)
            self._block.unmap()

    def order(self, loader: Path, gpu: str) -> None:
        """Let the node's loader begin to bring the weights; ``attach`` takes them.

        Needs no GPU, so it can be done while a checkpointed process is still coming back.

        Args:
            loader: its socket.
            gpu: UUID of the GPU that this process uses.
        """
        if not (self.detachable and self._plan.pieces):
            return
        if self._delivery is not None:
            self._delivery.cancel()
            self._delivery = None
        try:
            self._delivery = Delivery.order(loader, gpu, self._plan)
        except DeliveryFailed as error:
            log.info("no loader brings the weights: %s", error)

    def attach(self) -> None:
        """Bring every parameter to the device again: as ordered, else from the mapped files."""
        if not self.detachable:
            return
        if self._block is None:
            self._block = self._settle()
        if not self._take_delivery(self._block):
            self._block.map()
            self._transfer((source, self._parameters[name].data) for name, source in self._sources.items())

    def _settle(self) -> cuda.Block:
        """Let every parameter be a view of one block of addresses, which has no memory yet."""
        block = cuda.Block(self._plan.size, self._device.index or 0)
        block.map(cuda.ALIGNMENT)  # torch looks at the pointer that it is given
        memory = torch.as_tensor(block, device=self._device)
        for name, source in self._sources.items():
            place = self._plan.places[name]
            piece = memory[place : place + source.numel() * source.element_size()]
            self._parameters[name].data = piece.view(source.dtype).view(source.shape)
        block.unmap()
        return block

    def _take_delivery(self, block: cuda.Block) -> bool:
        delivery, self._delivery = self._delivery, None
        if delivery is None:
            return False
        try:
            descriptor = delivery.receive()
            try:
                block.map_shared(descriptor)
            finally:
                os.close(descriptor)
        except (DeliveryFailed, cuda.CudaError) as error:
            log.warning("the loader did not bring the weights, so they are copied here: %s", error)
            return False
        return True


def copy_through_pinned(pairs: Iterable[tuple[Tensor, Tensor]]) -> None:
    """Copy host tensors to a GPU through pinned buffers, two for each thread: one fills while one drains.

    One thread fills a buffer at the speed of one core's memory copy, a quarter of what the bus takes.
    """
    # All targets first: memory that a worker allocated would belong to its stream.
    pieces = _pieces(list(pairs))
    taking = Lock()

    def work() -> None:
        stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        buffers = [torch.empty(STAGING_BYTES, dtype=torch.uint8).pin_memory() for _ in range(2)]
        drained = [torch.cuda.Event() for _ in buffers]  # type: ignore[no-untyped-call]
        turn = 0
        with torch.cuda.stream(stream):
            while True:
                with taking:
                    piece = next(pieces, None)
                if piece is None:
                    break
                source, target = piece
                drained[turn].synchronize()
                staged = buffers[turn][: source.numel()]
                staged.copy_(source)
                target.copy_(staged, non_blocking=True)
                drained[turn].record()
                turn = 1 - turn
        stream.synchronize()

    threads = min(COPY_THREADS, os.cpu_count() or 1)
    with ThreadPoolExecutor(threads) as pool:
        for done in [pool.submit(work) for _ in range(threads)]:
            done.result()


def _pieces(pairs: Iterable[tuple[Tensor, Tensor]]) -> Iterator[tuple[Tensor, Tensor]]:
    """The bytes of each pair, in pieces that fit a buffer."""
    for source, target in pairs:
        source_bytes = source.contiguous().view(-1).view(torch.uint8)
        target_bytes = target.view(-1).view(torch.uint8)
        for start in range(0, source_bytes.numel(), STAGING_BYTES):
            yield source_bytes[start : start + STAGING_BYTES], target_bytes[start : start + STAGING_BYTES]


class Workspace:
    """What CUDA and torch hold besides the weights, and can do without for a while.

    Args:
        device: on any other than a GPU there is none.
    """

    def __init__(self, device: torch.device) -> None:
        self._on_gpu = device.type == "cuda"
        self._stack_limit = 0

    def release(self) -> None:
        """Give it back: a checkpoint would copy all of it, and a snapshot carry it."""
        if self._on_gpu:
            torch.cuda.synchronize()
            torch._C._cuda_clearCublasWorkspaces()
            torch.cuda.empty_cache()
            torch._C._host_emptyCache()
            self._stack_limit = cuda.shrink_stacks()

    def regain(self) -> None:
        if self._on_gpu and self._stack_limit:
            cuda.restore_stacks(self._stack_limit)
            self._stack_limit = 0
