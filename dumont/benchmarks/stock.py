"""The stock pipeline: a plain process with ``cuda-checkpoint`` and ``criu`` used as their manuals show.

Weights are in the image, nothing is dropped from it. What the process needs for it is that it leads a session
of its own, has no terminal and no log that grows, and that its pid is free when it comes back.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from dumont.benchmarks.programs import environment, interrupts_held, run, script, tail
from dumont.benchmarks.results import Costs, Sample, Spread
from dumont.errors import DeadlineExceeded, Internal

STEP_SECONDS: Final = 600.0
POLL_SECONDS: Final = 0.001
# CRIU does not restore the permission to use AMX tiles, so a process dies at its first bf16 product after a
# restore. This makes no difference on a GPU.
WITHOUT_TILES: Final = {"ONEDNN_MAX_CPU_ISA": "AVX512_CORE_BF16", "MKL_ENABLE_INSTRUCTIONS": "AVX512"}
READY, PROMPT, FIRST_TOKEN, TOKENS = "ready", "prompt", "first_token", "tokens"


@dataclass
class Stock:
    """A process that is dumped when this is entered, and restored from the same image at each ``measure``.

    Args:
        model: its directory.
        directory: an empty one, for the image and for what is said to the process.
        criu, cuda_checkpoint: the commands; without the latter the process has nothing on a GPU.

    Raises:
        Internal: STOCK_FAILED, a command or the process.
        DeadlineExceeded: STOCK_TIMEOUT.
    """

    model: Path
    directory: Path
    criu: Path
    cuda_checkpoint: Path | None
    prompt: str
    max_new_tokens: int
    pid: int = 0
    # The process's pid at the dump, and therefore after each restore.
    dumped: int = 0
    pause: dict[str, float] = field(default_factory=dict)

    def __enter__(self) -> Stock:
        self.image = self.directory / "image"
        self.exchange = self.directory / "exchange"
        for folder in (self.image, self.exchange):
            folder.mkdir(parents=True)
        self.log = self.directory / "log"
        try:
            self._load()
            if self.cuda_checkpoint:
                self.pause["cuda_checkpoint"] = self._toggle()
            dump = [str(self.criu), "dump", "-t", str(self.pid), "-D", str(self.image), "-o", "dump.log"]
            self.pause["dump"] = self._command(dump, self.image / "dump.log")
            # CRIU has ended the process; its pid is free only once it has been waited for.
            self.dumped = self.pid
            self._end()
        except BaseException:
            self._end()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self._end()

    def costs(self) -> Costs:
        """The size of the image, and the time it took to make."""
        # Whole blocks, as du counts.
        size = sum(path.stat().st_blocks * 512 for path in self.image.iterdir())
        return Costs(
            image_bytes=size,
            source_pause=Spread.of([sum(self.pause.values())]),
            capture_phases=self.pause,
        )

    def measure(self) -> Sample:
        """Restore the process, measure until its first token, and end it again."""
        try:
            began = time.monotonic()
            # As a child of this process, which can wait for it: a zombie would keep the pid.
            restore = [
                str(self.criu), "restore", "-D", str(self.image), "-o", "restore.log",
                "--restore-detached", "--restore-sibling",
            ]  # fmt: skip
            # Set before CRIU reports it: CRIU may end with the process half restored.
            self.pid = self.dumped
            phases = {"criu": self._command(restore, self.image / "restore.log")}
            if self.cuda_checkpoint:
                phases["cuda_restore"] = self._toggle()
            scratch = self.exchange / "prompt.new"
            scratch.write_text(self.prompt)
            scratch.rename(self.exchange / PROMPT)
            self._take(FIRST_TOKEN)
            seconds = time.monotonic() - began
            phases["first_token"] = seconds - sum(phases.values())
            return Sample(seconds, phases, tuple(json.loads(self._take(TOKENS))))
        finally:
            self._end()

    def _load(self) -> None:
        command = [
            sys.executable, str(script("answering")),
            str(self.model), str(self.exchange), str(self.max_new_tokens),
        ]  # fmt: skip
        with self.log.open("wb") as log, interrupts_held():
            process = subprocess.Popen(
                command,
                env={**environment(), **WITHOUT_TILES},
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
            self.pid = process.pid
            # From here on the process is known by its pid alone, as after a restore.
            process.returncode = 0
        self._take(READY)
        for leftover in (FIRST_TOKEN, TOKENS):
            self._take(leftover)

    def _toggle(self) -> float:
        return self._command([str(self.cuda_checkpoint), "--toggle", "--pid", str(self.pid)])

    def _command(self, command: list[str], log: Path | None = None) -> float:
        """Run a command to its end, which may write a log; returns the seconds that it took."""
        began = time.monotonic()
        try:
            done = run(command, timeout=STEP_SECONDS)
        except subprocess.TimeoutExpired:
            raise self._late(" ".join(command[:2])) from None
        if done.returncode != 0:
            said = tail(log) if log else (done.stderr or done.stdout).strip()[-500:]
            raise Internal(
                "STOCK_FAILED",
                f"{Path(command[0]).name} {command[1]} ended with status {done.returncode}: {said}",
            )
        return time.monotonic() - began

    def _take(self, name: str) -> str:
        """Wait for a file that the process writes, and return its content."""
        path = self.exchange / name
        deadline = time.monotonic() + STEP_SECONDS
        while not path.exists():
            if os.waitpid(self.pid, os.WNOHANG)[0]:
                self.pid = 0
                raise Internal("STOCK_FAILED", f"the process ended before its {name}: {tail(self.log)}")
            if time.monotonic() > deadline:
                raise self._late(f"waiting for its {name}")
            time.sleep(POLL_SECONDS)
        text = path.read_text()
        path.unlink()
        return text

    def _late(self, what: str) -> DeadlineExceeded:
        return DeadlineExceeded("STOCK_TIMEOUT", f"{what} took more than {STEP_SECONDS:.0f} seconds")

    def _end(self) -> None:
        """End the process, if there is one, and free its pid."""
        # Not a child of this process: there is none, or the pid belongs to another process by now.
        with contextlib.suppress(ChildProcessError):
            if self.pid and not os.waitpid(self.pid, os.WNOHANG)[0]:
                os.kill(self.pid, signal.SIGKILL)
                os.waitpid(self.pid, 0)
        self.pid = 0
