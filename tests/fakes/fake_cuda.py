"""The Cuda port without a driver: its states and rules in memory, and faults as a test lays them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from snapshotd.cuda import operations

MOVES = {
    "lock": ("running", "locked"),
    "checkpoint": ("locked", "checkpointed"),
    "restore": ("checkpointed", "locked"),
    "unlock": ("locked", "running"),
}
SAID = {
    "refuse": "CUDA_ERROR_INVALID_VALUE: invalid argument",
    "busy": "CUDA_ERROR_NOT_READY: device not ready",
    "full": "CUDA_ERROR_OUT_OF_MEMORY: out of memory",
}


class FakeCuda:
    """Processes by pid; ``faults`` holds a kind by (operation, pid), met once.

    Kinds: what the driver says (``refuse``, ``busy``, ``full``), ``die`` and ``hang`` of whoever performs the
    operation, ``break``, after which the process is failed for ever. An operation called ``after-lock`` and
    so on meets its fault once it is done.
    """

    def __init__(self, pids: Iterable[int]) -> None:
        self.states = dict.fromkeys(pids, "running")
        self.faults: dict[tuple[str, int], str] = {}
        self.calls: list[tuple[str, int]] = []
        self.devices: list[dict[str, str]] = []
        self.timeouts: list[float] = []

    async def state(self, pid: int) -> str:
        self._meet("state", pid)
        if pid not in self.states:
            raise operations.refused("state", pid, SAID["refuse"])
        return self.states[pid]

    async def lock(self, pid: int, timeout: float) -> None:
        self.timeouts.append(timeout)
        self._move("lock", pid)

    async def checkpoint(self, pid: int) -> None:
        self._move("checkpoint", pid)

    async def restore(self, pid: int, devices: Mapping[str, str]) -> None:
        self.devices.append(dict(devices))
        self._move("restore", pid)

    async def unlock(self, pid: int) -> None:
        self._move("unlock", pid)

    async def close(self) -> None:
        """Nothing to end."""

    def _move(self, operation: str, pid: int) -> None:
        self.calls.append((operation, pid))
        self._meet(operation, pid)
        before, after = MOVES[operation]
        if self.states.get(pid) != before:
            raise operations.refused(operation, pid, SAID["refuse"])
        self.states[pid] = after
        self._meet(f"after-{operation}", pid)

    def _meet(self, operation: str, pid: int) -> None:
        kind = self.faults.pop((operation, pid), "")
        operation = operation.removeprefix("after-")
        if kind == "break":
            self.states[pid] = "failed"
            kind = "refuse"
        if kind == "die":
            raise operations.lost(operation, pid, "the agent", "ended")
        if kind == "hang":
            raise operations.overdue(operation, pid, 1)
        if kind:
            raise operations.refused(operation, pid, SAID[kind])
