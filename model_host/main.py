"""Wires a model host and runs it: ``python -m model_host`` with descriptors 3 and 4 as its control pipes."""

from __future__ import annotations

import gc
import logging
import sys
from pathlib import Path
from typing import Any, Final

from model_host import control, entropy, memory, model_files, process, tiles
from model_host.engine import Engine, Phases, Settings
from model_host.engines import choice
from model_host.gate import Gate
from model_host.host import Host
from model_host.ports import Server
from model_host.scheduler import Scheduler

# After which a thread that runs Python lets another one go on.
SWITCH_SECONDS: Final = 0.0005


class Process:
    """The real ``World``: this process, its libraries and its kernel."""

    regain_cpu = staticmethod(tiles.request)
    draws = staticmethod(entropy.draws)
    release_memory = staticmethod(process.release_memory)
    give_up = staticmethod(process.give_up)
    memory_ranges = staticmethod(memory.ranges)
    drop_zero_pages = staticmethod(memory.drop_zero_pages)
    open_descriptors = staticmethod(process.open_descriptors)
    wait_for_descriptors = staticmethod(process.wait_for_descriptors)

    def __init__(self) -> None:
        self._generators: list[Any] = []

    def load(self, folder: Path, engine: str, settings: Settings, phases: Phases) -> Engine:
        files = model_files.read(folder, settings.weight_files)
        return choice.load(choice.choose(engine, files), files, settings, phases)

    def server(self, engine: Engine, scheduler: Scheduler, gate: Gate, max_queue: int) -> Server:
        from model_host import service  # brings in gRPC, which a cold start should not wait for earlier

        max_calls = max_queue + engine.capacity.sequences
        return service.Server(service.ModelHostService(engine, scheduler, gate), max_calls)

    def settle(self) -> None:
        # Now: nobody waits yet, and what is frozen below is not listed any more.
        self._generators = entropy.held()
        gc.enable()
        gc.freeze()

    def reseed(self, seed: bytes) -> None:
        entropy.reseed(seed, self._generators)


def main() -> int:
    """Serve until told to stop or left alone."""
    # The thread that computes would wait ten times as long for those that make text and send it.
    sys.setswitchinterval(SWITCH_SECONDS)
    # Importing makes objects by the hundred thousand that all stay; collecting among them costs 0.3 s.
    gc.disable()
    logging.basicConfig(
        stream=sys.stderr, level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s"
    )
    host = Host(Process())
    control.loop(process.CONTROL_IN, process.CONTROL_OUT, host.run)
    if host.state.value != "STOPPED":
        host.run("stop", {})
    return 0
