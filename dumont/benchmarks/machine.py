"""The machine that is measured, and the memory of its GPUs."""

from __future__ import annotations

import contextlib
import os
import platform
import subprocess
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Final

PACKAGES: Final = ("dumont", "torch", "transformers")


@dataclass(frozen=True)
class Gpus:
    """All GPUs of this machine through NVML; false if there are none or NVML is missing."""

    library: Any = None

    @classmethod
    def open(cls) -> Gpus:
        """Load NVML, if it is installed and finds a driver."""
        if find_spec("pynvml") is None:
            return cls()
        import pynvml

        with contextlib.suppress(pynvml.NVMLError):
            pynvml.nvmlInit()
            return cls(pynvml)
        return cls()

    def __bool__(self) -> bool:
        return self.library is not None

    def used_bytes(self) -> int:
        """Bytes of memory in use on all GPUs together."""
        nvml = self.library
        return sum(int(nvml.nvmlDeviceGetMemoryInfo(handle).used) for handle in self._handles())

    def facts(self) -> dict[str, Any]:
        """The GPUs and their driver, as the JSON document has them."""
        if not self:
            return {}
        nvml = self.library
        cuda = int(nvml.nvmlSystemGetCudaDriverVersion_v2())
        names = [_text(nvml.nvmlDeviceGetName(handle)) for handle in self._handles()]
        return {
            "gpu": names[0] if len(names) == 1 else names,
            "gpu_memory_bytes": [
                int(nvml.nvmlDeviceGetMemoryInfo(handle).total) for handle in self._handles()
            ],
            "driver": _text(nvml.nvmlSystemGetDriverVersion()),
            "cuda": f"{cuda // 1000}.{cuda % 1000 // 10}",
        }

    def _handles(self) -> list[Any]:
        if not self:
            return []
        nvml = self.library
        return [nvml.nvmlDeviceGetHandleByIndex(index) for index in range(nvml.nvmlDeviceGetCount())]


def has_gpu() -> bool:
    """Whether a driver shows a GPU here, whether or not NVML is installed."""
    return any(Path("/dev").glob("nvidia[0-9]*"))


def facts(gpus: Gpus, criu: Path | None) -> dict[str, Any]:
    """What a reader must know of the machine to judge the figures; ``criu``: the CRIU that is used."""
    return {
        **gpus.facts(),
        "cpu": _line("/proc/cpuinfo", "model name") or platform.machine(),
        "cpu_count": os.cpu_count(),
        "memory_bytes": int(_line("/proc/meminfo", "MemTotal").split()[0]) * 1024,
        "kernel": platform.release(),
        "python": platform.python_version(),
        **{name: _version(name) for name in PACKAGES},
        **({"criu": _criu_version(criu)} if criu else {}),
    }


def memory_available() -> int:
    """Bytes of memory that processes can still allocate."""
    return int(_line("/proc/meminfo", "MemAvailable").split()[0]) * 1024


def _line(path: str, key: str) -> str:
    for line in Path(path).read_text().splitlines():
        name, _, value = line.partition(":")
        if name.strip() == key:
            return value.strip()
    return ""


def _criu_version(criu: Path) -> str:
    said = subprocess.run([str(criu), "--version"], capture_output=True, text=True, check=False).stdout
    return said.partition("Version:")[2].split("\n")[0].strip()


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return ""


def _text(value: str | bytes) -> str:
    return value.decode() if isinstance(value, bytes) else value
