"""Whether this machine can run the GPU tests: ``python -m tests.gpu.machine``.

It says on stderr what it found and what is missing, and on stdout which tests pytest is to choose.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

# The context of three replicas, and their weights.
FREE_GIB = 8
OLDEST_DRIVER = 570
NEEDED = ("pytest", "pytest_asyncio", "pytest_timeout", "psutil", "grpc", "transformers", "tokenizers")
GENERATED = "dumont.snapshotd.v1.instance_service_pb2"


@dataclass(frozen=True)
class Requirement:
    """Something that the tests need, and what was found or what to do about it."""

    met: bool
    message: str


def requirements() -> Iterator[Requirement]:
    """In the order in which to meet them. Stops where the rest needs one that is not met."""
    yield Requirement(os.geteuid() == 0, "root" if os.geteuid() == 0 else "not root; run it with sudo")
    missing = [name for name in NEEDED if not _found(name)] or list(_not_importable())
    yield Requirement(
        not missing, f"Python packages missing: {', '.join(missing)}" if missing else "packages"
    )
    generated = _found(GENERATED)
    yield Requirement(
        generated, "generated code" if generated else "no generated code; run python proto/generate.py"
    )
    if missing or not generated:
        return
    yield from _criu()
    yield from _gpus()
    yield from _backends()


def _not_importable() -> Iterator[str]:
    """What snapshotd cannot be imported without."""
    try:
        importlib.import_module("snapshotd.main")
    except ModuleNotFoundError as error:
        if error.name and not error.name.startswith("dumont."):
            yield error.name


def _found(name: str) -> bool:
    try:
        return importlib.util.find_spec(name) is not None
    except ImportError:
        return False


def _criu() -> Iterator[Requirement]:
    from snapshotd.preflight import find_criu

    _, findings = find_criu()
    for finding in findings:
        yield Requirement(finding.passed, finding.message)


def _gpus() -> Iterator[Requirement]:
    from snapshotd.gpu import sharing as gpu_sharing
    from snapshotd.preflight import open_nvml

    nvml = open_nvml()
    if nvml is None:
        yield Requirement(
            False, "no NVIDIA driver that NVML can use, or no nvidia-ml-py; pip install nvidia-ml-py"
        )
        return
    driver = gpu_sharing.text(nvml.nvmlSystemGetDriverVersion())
    recent = int(driver.split(".")[0]) >= OLDEST_DRIVER
    yield Requirement(recent, f"NVIDIA driver {driver}" + ("" if recent else f"; {OLDEST_DRIVER} is needed"))
    for index in range(nvml.nvmlDeviceGetCount()):
        handle = nvml.nvmlDeviceGetHandleByIndex(index)
        free = int(nvml.nvmlDeviceGetMemoryInfo(handle).free) >> 30
        name = gpu_sharing.text(nvml.nvmlDeviceGetName(handle))
        yield Requirement(
            free >= FREE_GIB,
            f"GPU {index}: {name}, {free} GiB free"
            + ("" if free >= FREE_GIB else f"; {FREE_GIB} are needed"),
        )
    for sharing in gpu_sharing.found(nvml):
        yield Requirement(False, sharing.message)
    import torch

    cuda = torch.cuda.is_available()
    yield Requirement(
        cuda, f"torch {torch.__version__}" + ("" if cuda else " cannot use the GPU; install a CUDA build")
    )


def _backends() -> Iterator[Requirement]:
    from dumont.errors import DumontError
    from snapshotd.adapters.cuda import backend as cuda_backend
    from snapshotd.config import Settings

    usable = []
    for backend in ("driver", "cli"):
        try:
            cuda_backend.choose(backend, Settings().cuda_checkpoint)
            usable.append(backend)
        except DumontError as error:
            sys.stderr.write(f"left out: tests over the backend {backend}: {error.message}\n")
    yield Requirement(bool(usable), f"CUDA backends: {', '.join(usable) or 'none'}")


def twins() -> int:
    """How many GPUs of one model there are, beside the first."""
    from snapshotd.adapters.cuda.nvml import Nvml
    from snapshotd.gpu.placement import alike

    nvml = Nvml.open()
    gpus = nvml.gpus() if nvml else []
    return sum(alike(gpus[0], gpu) for gpu in gpus)


def chosen(requirements: Iterable[Requirement]) -> bool:
    """Report each. Returns whether all are met."""
    met = True
    for requirement in requirements:
        sys.stderr.write(f"{'ok  ' if requirement.met else 'MISS'} {requirement.message}\n")
        met = met and requirement.met
    return met


def main() -> None:
    if not chosen(requirements()):
        sys.stderr.write("GPU tests cannot run on this machine\n")
        raise SystemExit(1)
    count = twins()
    if count < 2:
        sys.stderr.write(f"left out: tests for two GPUs of one model; this machine has {count}\n")
        sys.stdout.write("gpu and not gpus2\n")
    else:
        sys.stdout.write("gpu\n")


if __name__ == "__main__":
    main()
