"""What a shim does to processes, tried in a process of its own."""

from __future__ import annotations

import os
import selectors
import subprocess
import sys
from pathlib import Path

import pytest

from snapshotd.shim.hostlog import LONGEST_LINE, HostLog
from snapshotd.shim.namespaces import Pipes
from snapshotd.shim.shim import Shim

SCRIPT = """
import subprocess
from snapshotd.system import linux
children = [subprocess.Popen(["sleep", "60"]) for _ in range(2)]
linux.kill_children()
linux.kill_children()
print([child.poll() is not None for child in children])
"""


def test_no_child_is_left_when_all_are_killed() -> None:
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT], capture_output=True, text=True, timeout=30, check=True
    )
    assert done.stdout.strip() == "[True, True]"


def test_a_log_that_was_drained_since_it_was_seen_is_left_alone(tmp_path: Path) -> None:
    # given: a shim whose model host has printed something and ended; the selector has seen both
    shim = Shim.__new__(Shim)
    reading, writing = os.pipe()
    shim.pipes = Pipes(-1, -1, -1, -1, reading, writing)
    shim.selector = selectors.DefaultSelector()
    shim.selector.register(reading, selectors.EVENT_READ, shim._from_log)
    shim.freezer = shim.client = shim.memory = None
    shim.log = HostLog(tmp_path / "host.log")
    os.write(writing, b"hello\nnot today\n")
    os.close(writing)
    # when: the end is handled first
    shim._ended(256)
    shim._from_log(reading)
    # then
    assert shim.log.last_line() == "not today"
    assert not shim.selector.get_map()
    os.close(reading)


@pytest.mark.parametrize(
    ("printed", "last"),
    [
        (b"", ""),
        (b"\n \n", ""),
        (b"Traceback:\n  File\nValueError: no\n\n", "ValueError: no"),
        (b"half a line", "half a line"),
        (b"red \x1b[31m and \xff bytes", "red  [31m and \ufffd bytes"),
        (b"x" * 100_000, "x" * LONGEST_LINE),
    ],
)
def test_the_last_line_of_a_log_fits_a_message(tmp_path: Path, printed: bytes, last: str) -> None:
    log = HostLog(tmp_path / "host.log")
    log.write(printed)
    assert log.last_line() == last
