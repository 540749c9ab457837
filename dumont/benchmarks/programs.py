"""The programs that a benchmark runs beside Dumont, their environment, and how they end."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

from dumont.errors import FailedPrecondition

SCRIPTS: Final = Path(__file__).parent / "scripts"
INTERRUPTS: Final = (signal.SIGINT, signal.SIGTERM)


def script(name: str) -> Path:
    """The path of a script. It is run by path, so that importing Dumont is not part of what is measured."""
    return SCRIPTS / f"{name}.py"


def environment() -> dict[str, str]:
    """This process's environment, without the hub. Byte code is kept, or every run would compile again."""
    kept = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
    return {**kept, "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}


@contextmanager
def interrupts_held() -> Iterator[None]:
    """Delay SIGINT and SIGTERM until the block has ended: a process that is only just starting could not be
    ended, because nothing refers to it yet."""
    if threading.current_thread() is not threading.main_thread():
        # Python handles signals in the main thread only.
        yield
        return
    came: list[int] = []
    before: dict[signal.Signals, Any] = {}
    try:
        for number in INTERRUPTS:
            before[number] = signal.signal(number, lambda which, _: came.append(which))
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        if came:
            signal.raise_signal(came[0])


def run(
    command: Sequence[str],
    *,
    env: Mapping[str, str] | None = None,
    said: str | None = None,
    timeout: float | None = None,
) -> subprocess.CompletedProcess[str]:
    """Run a program to its end. If the timeout passes or an interrupt comes first, it is killed
    with all that it has started.

    Args:
        said: given to it on standard input.
        timeout: in seconds.

    Raises:
        subprocess.TimeoutExpired: it was killed for that.
    """
    process: subprocess.Popen[str] | None = None
    try:
        with interrupts_held():
            process = subprocess.Popen(
                command,
                env=env,
                stdin=subprocess.PIPE if said is not None else subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
                process_group=0,
            )
        stdout, stderr = process.communicate(said, timeout=timeout)
    finally:
        if process is not None and process.returncode is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.communicate()
    return subprocess.CompletedProcess(command, process.returncode, stdout, stderr)


def find_criu() -> Path:
    """The CRIU that snapshotd uses here.

    Raises:
        FailedPrecondition: CRIU_NOT_FOUND.
    """
    done = run([sys.executable, "-m", "snapshotd.preflight", "--criu"])
    if done.returncode != 0:
        raise FailedPrecondition("CRIU_NOT_FOUND", done.stderr.strip()[-500:] or "no CRIU works here")
    return Path(done.stdout.strip())


def tail(path: Path, characters: int = 500) -> str:
    """The end of a log, on one line."""
    try:
        return " ".join(path.read_text(errors="replace")[-characters:].split()) or "its log is empty"
    except OSError:
        return "it wrote no log"
