"""The GPUs of this node, through NVML. Only here: an NVML handle inside a model host breaks its dump."""

from __future__ import annotations

from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

import structlog

from snapshotd.model import Gpu

log = structlog.get_logger(__name__)


@dataclass(frozen=True)
class Nvml:
    """What NVML says. On a node without a driver there is none of it."""

    library: Any
    driver: str
    cuda: str

    @classmethod
    def open(cls) -> Nvml | None:
        """None when there is no NVIDIA driver here, or no NVML package."""
        if find_spec("pynvml") is None:
            return None
        import pynvml

        try:
            pynvml.nvmlInit()
        except pynvml.NVMLError as error:
            log.info("no GPU", reason=str(error))
            return None
        version = int(pynvml.nvmlSystemGetCudaDriverVersion_v2())
        return cls(
            pynvml, _text(pynvml.nvmlSystemGetDriverVersion()), f"{version // 1000}.{version % 1000 // 10}"
        )

    def gpus(self) -> list[Gpu]:
        """Every GPU of the node, in the driver's order."""
        count = self.library.nvmlDeviceGetCount()
        return [self._describe(self.library.nvmlDeviceGetHandleByIndex(index)) for index in range(count)]

    def facts(self) -> dict[str, str]:
        """What a snapshot of a CUDA process is bound to."""
        gpus = self.gpus()
        return {
            "cuda": self.cuda,
            "gpu_count": str(len(gpus)),
            "gpu_memory": ",".join(str(gpu.memory_total >> 20) for gpu in gpus),
            "gpu_model": ",".join(gpu.model for gpu in gpus),
            "nvidia_driver": self.driver,
        }

    def used_by(self, pid: int) -> int:
        handles = map(self.library.nvmlDeviceGetHandleByIndex, range(self.library.nvmlDeviceGetCount()))
        processes = (
            process
            for handle in handles
            for process in self.library.nvmlDeviceGetComputeRunningProcesses(handle)
        )
        return sum(int(process.usedGpuMemory or 0) for process in processes if process.pid == pid)

    def free(self, index: int) -> int:
        handle = self.library.nvmlDeviceGetHandleByIndex(index)
        return int(self.library.nvmlDeviceGetMemoryInfo(handle).free)

    def _describe(self, handle: Any) -> Gpu:
        return Gpu(
            uuid=_text(self.library.nvmlDeviceGetUUID(handle)),
            model=_text(self.library.nvmlDeviceGetName(handle)),
            memory_total=int(self.library.nvmlDeviceGetMemoryInfo(handle).total),
        )


def _text(value: str | bytes) -> str:
    return value.decode() if isinstance(value, bytes) else value
