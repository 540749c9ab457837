"""MIG and MPS: ways of sharing a GPU with which the driver cannot checkpoint processes."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Final

from snapshotd.model import Sharing

MPS_SERVER: Final = "nvidia-cuda-mps-server"
MPS_DIRECTORY: Final = "/tmp/nvidia-mps"


def found(library: Any, environment: Mapping[str, str] = os.environ) -> list[Sharing]:
    """The ways in which the node's GPUs are shared, as NVML and the file system show them.

    Args:
        library: an initialised ``pynvml``.
        environment: may contain ``CUDA_MPS_PIPE_DIRECTORY``.
    """
    return [*_mig(library), *_mps(library, environment)]


def _mig(library: Any) -> Iterator[Sharing]:
    for handle in _handles(library):
        try:
            current, _ = library.nvmlDeviceGetMigMode(handle)
        except library.NVMLError:
            # This model of GPU does not support MIG.
            continue
        if current:
            gpu = text(library.nvmlDeviceGetUUID(handle))
            name = text(library.nvmlDeviceGetName(handle))
            yield Sharing(
                "MIG",
                gpu,
                f"MIG is enabled on {gpu} ({name}), and the driver cannot suspend processes beside it; "
                f"disable it with 'nvidia-smi -i {gpu} -mig 0'",
            )


def _mps(library: Any, environment: Mapping[str, str]) -> Iterator[Sharing]:
    remedy = "the driver cannot suspend its clients; end it with 'echo quit | nvidia-cuda-mps-control'"
    for handle in _handles(library):
        if any(_name(library, process.pid) == MPS_SERVER for process in _processes(library, handle)):
            gpu = text(library.nvmlDeviceGetUUID(handle))
            yield Sharing("MPS", gpu, f"an MPS server runs on {gpu}, and {remedy}")
            return
    for directory in {environment.get("CUDA_MPS_PIPE_DIRECTORY") or MPS_DIRECTORY, MPS_DIRECTORY}:
        control = Path(directory) / "control"
        if _is_pipe(control):
            yield Sharing(
                "MPS", "", f"an MPS daemon listens at {control}, and {remedy}, or remove what it left there"
            )
            return


def _is_pipe(path: Path) -> bool:
    try:
        mode = path.stat().st_mode
    except OSError:
        return False
    return stat.S_ISFIFO(mode) or stat.S_ISSOCK(mode)


def _processes(library: Any, handle: Any) -> list[Any]:
    try:
        return list(library.nvmlDeviceGetComputeRunningProcesses(handle))
    except library.NVMLError:
        return []


def _name(library: Any, pid: int) -> str:
    try:
        return text(library.nvmlSystemGetProcessName(pid)).rpartition("/")[2]
    except library.NVMLError:
        return ""


def _handles(library: Any) -> Iterator[Any]:
    return map(library.nvmlDeviceGetHandleByIndex, range(library.nvmlDeviceGetCount()))


def text(value: str | bytes) -> str:
    """A string of NVML as text; older versions of the package return bytes."""
    return value.decode() if isinstance(value, bytes) else value
