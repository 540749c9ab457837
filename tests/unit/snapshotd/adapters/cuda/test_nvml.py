"""What NVML says of a node's GPUs, and which ways of sharing them are noticed."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from snapshotd import preflight
from snapshotd.adapters.cuda.nvml import Nvml
from snapshotd.gpu import sharing as gpu_sharing
from snapshotd.model import Finding, Gpu

GIB = 1 << 30


@dataclass
class Process:
    pid: int
    usedGpuMemory: int | None = None
    name: str = "python"


@dataclass
class Device:
    uuid: str
    total: int = 80 * GIB
    free: int = 80 * GIB
    mig: int | None = 0
    processes: list[Process] = field(default_factory=list)


class Library:
    """``pynvml`` over devices of our own."""

    class NVMLError(Exception):
        pass

    def __init__(self, *devices: Device) -> None:
        self.devices = devices

    def nvmlDeviceGetCount(self) -> int:
        return len(self.devices)

    def nvmlDeviceGetHandleByIndex(self, index: int) -> Device:
        return self.devices[index]

    def nvmlDeviceGetHandleByUUID(self, uuid: str) -> Device:
        return next(device for device in self.devices if device.uuid == uuid)

    def nvmlDeviceGetUUID(self, device: Device) -> bytes:
        return device.uuid.encode()

    def nvmlDeviceGetName(self, device: Device) -> str:
        return "NVIDIA H100"

    def nvmlDeviceGetMemoryInfo(self, device: Device) -> Device:
        return device

    def nvmlDeviceGetComputeRunningProcesses(self, device: Device) -> list[Process]:
        return device.processes

    def nvmlDeviceGetMigMode(self, device: Device) -> tuple[int, int]:
        if device.mig is None:
            raise self.NVMLError("Not Supported")
        return device.mig, device.mig

    def nvmlSystemGetProcessName(self, pid: int) -> str:
        for device in self.devices:
            for process in device.processes:
                if process.pid == pid:
                    return f"/usr/bin/{process.name}"
        raise self.NVMLError("Not Found")


def nvml(*devices: Device) -> Nvml:
    return Nvml(Library(*devices), "580.1", "13.0")


def sharing(tmp_path: Path, *devices: Device) -> list[Any]:
    return gpu_sharing.found(Library(*devices), {"CUDA_MPS_PIPE_DIRECTORY": str(tmp_path)})


def test_gpus_are_described_in_the_drivers_order() -> None:
    known = nvml(Device("GPU-b"), Device("GPU-a", total=40 * GIB))
    assert known.gpus() == [Gpu("GPU-b", "NVIDIA H100", 80 * GIB), Gpu("GPU-a", "NVIDIA H100", 40 * GIB)]
    assert known.facts() == {
        "cuda": "13.0",
        "gpu_count": "2",
        "gpu_memory": "81920,40960",
        "gpu_model": "NVIDIA H100,NVIDIA H100",
        "nvidia_driver": "580.1",
    }


def test_what_processes_hold_is_told_by_gpu() -> None:
    known = nvml(
        Device("GPU-a", processes=[Process(1, 5), Process(2, 7), Process(3, 100)]),
        Device("GPU-b", processes=[Process(1, 11), Process(4, None)]),
        Device("GPU-c"),
    )
    assert known.used_by({1, 2}) == {"GPU-a": 12, "GPU-b": 11}
    assert known.used_by({4}) == {"GPU-b": 0}
    assert known.used_by({9}) == {}


def test_what_is_free_is_told_by_uuid() -> None:
    assert nvml(Device("GPU-a", free=1), Device("GPU-b", free=2)).free("GPU-b") == 2


def test_gpus_for_one_process_at_a_time_are_not_shared(tmp_path: Path) -> None:
    assert sharing(tmp_path, Device("GPU-a", processes=[Process(1)]), Device("GPU-b", mig=None)) == []


def test_mig_is_noticed_on_each_gpu(tmp_path: Path) -> None:
    found = sharing(tmp_path, Device("GPU-a", mig=1), Device("GPU-b"), Device("GPU-c", mig=1))
    assert [(one.kind, one.gpu) for one in found] == [("MIG", "GPU-a"), ("MIG", "GPU-c")]
    assert "GPU-a" in found[0].message


def test_an_mps_server_is_noticed_by_its_name(tmp_path: Path) -> None:
    found = sharing(
        tmp_path, Device("GPU-a"), Device("GPU-b", processes=[Process(5, 1, "nvidia-cuda-mps-server")])
    )
    assert [(one.kind, one.gpu) for one in found] == [("MPS", "GPU-b")]


def test_an_mps_daemon_is_noticed_by_its_pipe_and_not_by_an_empty_directory(tmp_path: Path) -> None:
    (tmp_path / "log").touch()
    assert sharing(tmp_path, Device("GPU-a")) == []
    os.mkfifo(tmp_path / "control")
    (found,) = sharing(tmp_path, Device("GPU-a"))
    assert (found.kind, found.gpu) == ("MPS", "")
    assert str(tmp_path / "control") in found.message


def test_preflight_notes_what_captures_are_refused_for_and_passes(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(preflight, "open_nvml", lambda: Library(Device("GPU-a", mig=1)))
    (finding,) = preflight._check_sharing()
    assert (finding.check, finding.passed, finding.needed) == ("gpu_mig", False, False)
    assert preflight.problems([finding]) == []

    monkeypatch.setattr(preflight, "findings", lambda: [finding])
    monkeypatch.setattr("sys.argv", ["preflight"])
    with pytest.raises(SystemExit) as end:
        preflight.main()
    assert end.value.code == 0
    assert capsys.readouterr().out.startswith("note gpu_mig: MIG is enabled on GPU-a")

    monkeypatch.setattr("sys.argv", ["preflight", "--json"])
    with pytest.raises(SystemExit):
        preflight.main()
    assert json.loads(capsys.readouterr().out)[0]["needed"] is False


def test_what_is_needed_and_missing_is_a_problem() -> None:
    missing = Finding("criu", False, "there is no criu")
    assert preflight.problems([missing, Finding("root", True, "running as root")]) == ["there is no criu"]
