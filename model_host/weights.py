"""Weights that stay outside the snapshot: mapped from their safetensors files, never copied.

On the CPU the parameters *are* the mapped files: private file mappings nobody writes to, which CRIU leaves
out of an image and maps again at restore. On a GPU the mapping is the source that ``attach`` copies from,
before the first call and again after every ``detach``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Final

import torch
from safetensors import SafetensorError, safe_open

from model_host.model_files import invalid

if TYPE_CHECKING:
    from torch import Tensor, nn

STAGING_BYTES: Final = 16 * 1024 * 1024

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
    """Copy host tensors to a GPU through two pinned buffers, one filling while the other drains."""
    buffers = [torch.empty(STAGING_BYTES, dtype=torch.uint8).pin_memory() for _ in range(2)]
    drained = [torch.cuda.Event() for _ in buffers]  # type: ignore[no-untyped-call]
    turn = 0
    for source, target in pairs:
        source_bytes = source.contiguous().view(-1).view(torch.uint8)
        target_bytes = target.view(-1).view(torch.uint8)
        for start in range(0, source_bytes.numel(), STAGING_BYTES):
            chunk = source_bytes[start : start + STAGING_BYTES]
            drained[turn].synchronize()
            staged = buffers[turn][: chunk.numel()]
            staged.copy_(chunk)
            target_bytes[start : start + chunk.numel()].copy_(staged, non_blocking=True)
            drained[turn].record()
            turn = 1 - turn
    torch.cuda.synchronize()
