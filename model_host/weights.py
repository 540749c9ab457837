"""Weights that stay outside the snapshot: mapped from their safetensors files, never copied.

On the CPU the parameters *are* the mapped files: private file mappings nobody writes to, which CRIU leaves
out of an image and maps again at restore. On a GPU the mapping is the source that ``attach`` copies from,
before the first call and again after every ``detach``.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Lock
from typing import TYPE_CHECKING, Final

import torch
from safetensors import SafetensorError, safe_open

from model_host.model_files import invalid

if TYPE_CHECKING:
    from torch import Tensor, nn

STAGING_BYTES: Final = 4 * 1024 * 1024
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
        transfer: copies pairs of (source, target).
    """

    def __init__(
        self,
        parameters: Mapping[str, nn.Parameter],
        sources: Mapping[str, Tensor],
        device: torch.device,
        transfer: Transfer | None = None,
    ) -> None:
        self._parameters = dict(parameters)
        self._sources = dict(sources)
        self._device = device
        self._transfer = transfer or copy_through_pinned

    @property
    def detachable(self) -> bool:
        """Whether ``detach`` frees anything: on the CPU the mapping itself costs nothing."""
        return bool(self._sources) and self._device.type == "cuda"

    def detach(self) -> None:
        """Free the GPU's copy. The model cannot compute until ``attach``."""
        if not self.detachable:
            return
        for name in self._sources:
            parameter = self._parameters[name]
            parameter.data = torch.empty(0, dtype=parameter.dtype, device=self._device)

    def attach(self) -> None:
        """Bring every parameter to the device again, from the mapped files."""
        if self.detachable:
            self._transfer(self._targets())

    def _targets(self) -> Iterator[tuple[Tensor, Tensor]]:
        for name, source in self._sources.items():
            parameter = self._parameters[name]
            parameter.data = torch.empty_like(source, device=self._device)
            yield source, parameter.data


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


def release_cuda_caches() -> None:
    """Give back what torch keeps of the GPU and of pinned memory: a snapshot would carry all of it."""
    torch.cuda.synchronize()
    torch._C._cuda_clearCublasWorkspaces()
    torch.cuda.empty_cache()
    torch._C._host_emptyCache()
