"""Choose the backend that drives CUDA processes on this node."""

from __future__ import annotations

import ctypes
import importlib.util
import os
import shutil
from pathlib import Path
from typing import Final

from dumont.errors import FailedPrecondition
from snapshotd.adapters.cuda.agent import CudaAgent
from snapshotd.adapters.cuda.cli import CudaCheckpoint

PROGRAM: Final = "cuda-checkpoint"


def choose(backend: str, program: Path | None) -> CudaAgent | CudaCheckpoint:
    """The backend for a node with a GPU.

    Args:
        backend: "driver", "cli", or "auto", which prefers the driver's API to the program.
        program: ``cuda-checkpoint``; None for the one on the PATH.

    Raises:
        FailedPrecondition: NO_CUDA_BACKEND, the backend is missing; the message says how to install it.
    """
    missing = missing_for_driver() if backend != "cli" else ""
    if backend != "cli" and not missing:
        return CudaAgent()
    if backend == "driver":
        raise FailedPrecondition("NO_CUDA_BACKEND", f"--cuda-backend driver: {missing}")
    found = find_program(program)
    if found is not None:
        return CudaCheckpoint(found)
    absent = f"there is no {program}" if program else f"there is no {PROGRAM} on the PATH"
    remedy = "github.com/NVIDIA/cuda-checkpoint has it; name its path with --cuda-checkpoint"
    if backend == "cli":
        raise FailedPrecondition("NO_CUDA_BACKEND", f"--cuda-backend cli: {absent}; {remedy}")
    raise FailedPrecondition(
        "NO_CUDA_BACKEND",
        f"nothing here can suspend processes on this node's GPU: {missing}; and {absent} ({remedy}); "
        "or run models on the CPU with --device cpu",
    )


def missing_for_driver() -> str:
    """What the agent lacks, and how to install it; empty if the agent can be started."""
    try:
        present = importlib.util.find_spec("cuda.core.checkpoint") is not None
    except ImportError:
        present = False
    if not present:
        return "cuda-core is not installed; pip install 'dumont-services[gpu]'"
    try:
        ctypes.CDLL("libcuda.so.1")
    except OSError:
        return "libcuda.so.1 cannot be loaded; in a container, give it the driver's compute capability"
    return ""


def find_program(program: Path | None) -> Path | None:
    """The program, if it can be run."""
    if program is None:
        found = shutil.which(PROGRAM)
        return Path(found) if found else None
    return program if program.is_file() and os.access(program, os.X_OK) else None
