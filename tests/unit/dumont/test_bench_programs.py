"""An interrupt of the bench leaves no program behind."""

from __future__ import annotations

import signal
import subprocess
import sys

import psutil
import pytest

from dumont.benchmarks.programs import interrupts_held, run

WAITING = "import signal; signal.pause()"
INTERRUPTING = f"import os, signal; os.kill(os.getppid(), signal.SIGINT); {WAITING}"


def test_an_interrupt_during_a_start_comes_when_the_process_is_known() -> None:
    known = []

    def start() -> None:
        with interrupts_held():
            signal.raise_signal(signal.SIGINT)
            known.append("the process")

    with pytest.raises(KeyboardInterrupt):
        start()
    assert known == ["the process"]


def test_without_an_interrupt_the_handlers_are_as_they_were() -> None:
    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    with interrupts_held():
        assert signal.getsignal(signal.SIGTERM) not in before
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == before


def test_a_program_is_told_and_tells() -> None:
    done = run([sys.executable, "-c", "print(input().upper())"], said="hello\n")
    assert (done.returncode, done.stdout) == (0, "HELLO\n")


def test_an_interrupted_program_is_gone() -> None:
    before = children()
    with pytest.raises(KeyboardInterrupt):
        run([sys.executable, "-c", INTERRUPTING])
    assert children() == before


def test_a_late_program_is_gone() -> None:
    before = children()
    with pytest.raises(subprocess.TimeoutExpired):
        run([sys.executable, "-c", WAITING], timeout=0.05)
    assert children() == before


def children() -> set[int]:
    return {child.pid for child in psutil.Process().children()}
