"""A CUDA driver in files, for machines without one: it survives whoever drives it, as a real process does.

A directory holds a file for each CUDA process, its state the content, and a file ``faults`` with
``OPERATION PID KIND`` a line. Beneath the agent it is ``Process``, as cuda-core has it; run as a program
it is ``cuda-checkpoint``.
"""

from __future__ import annotations

import argparse
import os
import signal
import sys
import threading
import uuid
from collections.abc import Mapping
from pathlib import Path

DIRECTORY = "CUDA_FILES"
TAKING = threading.Lock()
# Operation: the state that it needs, and the one that it leaves.
MOVES = {
    "lock": ("running", "locked"),
    "checkpoint": ("locked", "checkpointed"),
    "restore": ("checkpointed", "locked"),
    "unlock": ("locked", "running"),
}
# What the driver says, by name and in words.
ERRORS = {
    "refuse": ("CUDA_ERROR_INVALID_VALUE", "invalid argument"),
    "busy": ("CUDA_ERROR_NOT_READY", "device not ready"),
    "full": ("CUDA_ERROR_OUT_OF_MEMORY", "out of memory"),
}


class CudaError(Exception):
    """The driver refused; its name and its words for that."""

    def __init__(self, kind: str) -> None:
        self.name, self.words = ERRORS[kind]
        super().__init__(f"{self.name}: {self.words}")


class Process:
    def __init__(self, pid: int) -> None:
        self.pid = pid
        self.path = Path(os.environ[DIRECTORY]) / str(pid)

    @property
    def state(self) -> str:
        self._meet("state", self.path.with_name("faults"))
        return self._read()

    def lock(self, timeout_ms: int) -> None:
        self._note("timeout_ms", str(timeout_ms))
        self._move("lock")

    def checkpoint(self) -> None:
        self._move("checkpoint")

    def restore(self, gpu_mapping: Mapping[str, str] | None) -> None:
        for gpu in {*(gpu_mapping or {}), *(gpu_mapping or {}).values()}:
            # As cuda-core: hexadecimal and nothing before it.
            uuid.UUID(gpu)
        self._note("devices", ",".join(f"{old}={new}" for old, new in (gpu_mapping or {}).items()))
        self._move("restore")

    def unlock(self) -> None:
        self._move("unlock")

    def _move(self, operation: str) -> None:
        faults = self.path.with_name("faults")
        self._meet(operation, faults)
        before, after = MOVES[operation]
        if self._read() != before:
            raise CudaError("refuse")
        self.path.write_text(after)
        self._meet(f"after-{operation}", faults)

    def _read(self) -> str:
        if not self.path.exists():
            raise CudaError("refuse")
        return self.path.read_text()

    def _note(self, name: str, value: str) -> None:
        self.path.with_name(f"{self.pid}.{name}").write_text(value)

    def _meet(self, operation: str, faults: Path) -> None:
        """The fault that was laid here, once."""
        # The agent's threads meet faults at the same time.
        with TAKING:
            laid = faults.read_text().splitlines() if faults.exists() else []
            mine = [line for line in laid if line.split()[:2] == [operation, str(self.pid)]]
            if not mine:
                return
            faults.write_text("\n".join(line for line in laid if line not in mine))
        kind = mine[0].split()[2]
        if kind == "die":
            os.kill(os.getpid(), signal.SIGKILL)
        if kind == "hang":
            while True:
                signal.pause()
        raise CudaError(kind)


def program() -> None:
    """``cuda-checkpoint``, as its help describes it."""
    parser = argparse.ArgumentParser(prog="cuda-checkpoint")
    parser.add_argument("--get-state", action="store_true")
    parser.add_argument("--action", choices=sorted(MOVES))
    parser.add_argument("--pid", "-p", type=int, required=True)
    parser.add_argument("--timeout", "-t", type=int, default=0)
    parser.add_argument("--device-map", "-d", default="")
    asked = parser.parse_args()
    process = Process(asked.pid)
    try:
        if asked.get_state:
            sys.stdout.write(f"{process.state}\n")
        elif asked.action == "lock":
            process.lock(asked.timeout)
        elif asked.action == "restore":
            pairs = dict(pair.split("=") for pair in asked.device_map.split(",") if pair)
            assert all(gpu.startswith("GPU-") for pair in pairs.items() for gpu in pair)
            process.restore({old[4:]: new[4:] for old, new in pairs.items()})
        else:
            getattr(process, asked.action)()
    except CudaError as error:
        what = "get state of" if asked.get_state else asked.action
        sys.stderr.write(f'Could not {what} on process ID {asked.pid}: "{error.words}"\n')
        raise SystemExit(1) from None


if __name__ == "__main__":
    program()
