"""What the host needs of the world around it; the adapters are wired in ``main``."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Protocol

from model_host.engine import Engine, Phases, Settings
from model_host.gate import Gate
from model_host.scheduler import Scheduler


class Server(Protocol):
    """Answers calls on a socket, from ``start`` until ``stop``, any number of times."""

    def start(self, socket: Path) -> None:
        """Open ``socket`` for this user only; calls may come from now on."""

    def stop(self) -> Path | None:
        """End every call, close and remove the socket; the path it had, None if it was not open."""


class World(Protocol):
    """Makes engines and servers, and answers for the process."""

    def load(self, folder: Path, engine: str, settings: Settings, phases: Phases) -> Engine:
        """An engine with the model in ``folder``, by default the engine its architecture calls for."""

    def server(self, engine: Engine, scheduler: Scheduler, gate: Gate, max_queue: int) -> Server:
        """A server, not started."""

    def regain_cpu(self) -> None:
        """Ask the kernel again for what a restored process has lost."""

    def reseed(self, entropy: bytes) -> None:
        """Reseed every random generator of the process."""

    def draws(self) -> dict[str, object]:
        """One draw from each generator."""

    def give_up(self) -> None:
        """End the process, once what it says now has been sent: another one must take its place."""

    def release_memory(self) -> None:
        """Give free memory back to the kernel."""

    def memory_ranges(self) -> list[tuple[int, int]]:
        """Address ranges of the process's writable anonymous memory."""

    def drop_zero_pages(self, known: list[tuple[int, int]]) -> int:
        """Give the zero pages of large ranges outside ``known`` back to the kernel; their bytes."""

    def settle(self) -> None:
        """What was made so far stays for good: keep it out of later garbage collections."""

    def open_descriptors(self) -> dict[int, str]:
        """Every open descriptor and what it leads to."""

    def wait_for_descriptors(self, allowed: Callable[[int, str], bool]) -> dict[int, str]:
        """Those not ``allowed``, by number and what they lead to, that do not close within a moment."""
