"""A model host's surroundings in memory: an engine that remembers, a server that is a flag."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from dumont.errors import FailedPrecondition, Unavailable
from model_host.engine import Canary, Engine, Phases, Settings
from model_host.gate import Gate
from model_host.ports import Server
from model_host.scheduler import Scheduler
from tests.fakes.step_engine import StepEngine


class FakeEngine(StepEngine):
    """Writes down what is done to it; ``fail`` names the one thing that goes wrong."""

    name, context_length = "fake", 16

    def __init__(self) -> None:
        super().__init__(sequences=4)
        self.log: list[str] = []
        self.fail = ""

    def _do(self, what: str) -> None:
        self.log.append(what)
        if what == self.fail:
            raise FailedPrecondition(f"{what.upper()}_FAILED", f"{what} failed")

    def warm_up(self) -> None:
        self._do("warm_up")

    def canary(self) -> Canary:
        self._do("canary")
        return Canary([1, 2, 3], -0.5)

    def quiesce(self) -> None:
        self._do("quiesce")

    def pause(self) -> None:
        self._do("pause")

    def resume(self) -> None:
        self._do("resume")

    def order_weights(self, loader: Path, gpu: str) -> None:
        self.log.append(f"order_weights {loader} {gpu}")

    def wake(self) -> None:
        self._do("wake")

    def versions(self) -> dict[str, str]:
        return {"python": "3"}


class FakeServer:
    def __init__(self) -> None:
        self.socket: Path | None = None
        self.fail = False

    def start(self, socket: Path) -> None:
        if self.fail:
            raise Unavailable("SERVE_FAILED", "no")
        self.socket = socket

    def stop(self) -> Path | None:
        socket, self.socket = self.socket, None
        return socket


class FakeWorld:
    def __init__(self) -> None:
        self.engine = FakeEngine()
        self.socket = FakeServer()
        self.descriptors = {0: "/dev/null", 1: "pipe", 2: "pipe", 3: "pipe", 4: "pipe"}
        self.seeds: list[bytes] = []
        self.gate: Gate | None = None
        self.loaded: tuple[Path, str, Settings] | None = None

    def load(self, folder: Path, engine: str, settings: Settings, phases: Phases) -> Engine:
        if folder.name == "bad":
            raise FailedPrecondition("MODEL_INVALID", "bad", field="model")
        self.loaded = (folder, engine, settings)
        return self.engine

    def server(self, engine: Engine, scheduler: Scheduler, gate: Gate, max_queue: int) -> Server:
        self.gate = gate
        return self.socket

    def regain_cpu(self) -> None:
        self.engine.log.append("regain_cpu")

    def reseed(self, entropy: bytes) -> None:
        self.seeds.append(entropy)

    def draws(self) -> dict[str, Any]:
        return {"python": 0.5}

    def give_up(self) -> None:
        self.engine.log.append("give_up")

    def release_memory(self) -> None:
        self.engine.log.append("release_memory")

    def memory_ranges(self) -> list[tuple[int, int]]:
        return [(0, 4096)]

    def drop_zero_pages(self, known: list[tuple[int, int]]) -> int:
        self.engine.log.append(f"drop_zero_pages outside {known}")
        return 4096

    def settle(self) -> None:
        self.engine.log.append("settle")

    def open_descriptors(self) -> dict[int, str]:
        return dict(self.descriptors)

    def wait_for_descriptors(self, allowed: Callable[[int, str], bool]) -> dict[int, str]:
        return {number: to for number, to in self.descriptors.items() if not allowed(number, to)}
