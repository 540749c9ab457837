"""The GpuStatus port over NVML. NVML is used only in snapshotd: in a model host it would break the dump."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

import structlog

from snapshotd.gpu import sharing as gpu_sharing
from snapshotd.gpu.sharing import text
from snapshotd.model import Gpu, Sharing
from snapshotd.preflight import open_nvml

log = structlog.get_logger(__name__)


@dataclass(frozen=True)
class Nvml:
    """This node's GPUs as NVML shows them.

    Attributes:
        library: an initialised ``pynvml``.
        driver: the driver's version.
        cuda: the version of CUDA that the driver supports.
    """

    library: Any
    driver: str
    cuda: str

    @classmethod
    def open(cls) -> Nvml | None:
        """Open NVML; None if this node has no NVIDIA driver or no NVML package."""
        pynvml = open_nvml()
        if pynvml is None:
            log.info("no_gpu")
            return None
        version = int(pynvml.nvmlSystemGetCudaDriverVersion_v2())
        return cls(
            pynvml, text(pynvml.nvmlSystemGetDriverVersion()), f"{version // 1000}.{version % 1000 // 10}"
        )

    def gpus(self) -> list[Gpu]:
        """Every GPU of the node, in the driver's order."""
        count = self.library.nvmlDeviceGetCount()
        return [self._describe(self.library.nvmlDeviceGetHandleByIndex(index)) for index in range(count)]

    def facts(self) -> dict[str, str]:
        """The facts that must be the same where a snapshot of a CUDA process is restored."""
        gpus = self.gpus()
        return {
            "cuda": self.cuda,
            "gpu_count": str(len(gpus)),
            "gpu_memory": ",".join(str(gpu.memory_total >> 20) for gpu in gpus),
            "gpu_model": ",".join(gpu.model for gpu in gpus),
            "nvidia_driver": self.driver,
        }

    def used_by(self, pids: Collection[int]) -> dict[str, int]:
        used: dict[str, int] = {}
        for index in range(self.library.nvmlDeviceGetCount()):
            handle = self.library.nvmlDeviceGetHandleByIndex(index)
            for process in self.library.nvmlDeviceGetComputeRunningProcesses(handle):
                if process.pid in pids:
                    gpu = text(self.library.nvmlDeviceGetUUID(handle))
                    used[gpu] = used.get(gpu, 0) + int(process.usedGpuMemory or 0)
        return used

    def free(self, gpu: str) -> int:
        handle = self.library.nvmlDeviceGetHandleByUUID(gpu)
        return int(self.library.nvmlDeviceGetMemoryInfo(handle).free)

    def sharing(self) -> list[Sharing]:
        return gpu_sharing.found(self.library)

    def _describe(self, handle: Any) -> Gpu:
        return Gpu(
            uuid=text(self.library.nvmlDeviceGetUUID(handle)),
            model=text(self.library.nvmlDeviceGetName(handle)),
            memory_total=int(self.library.nvmlDeviceGetMemoryInfo(handle).total),
        )
