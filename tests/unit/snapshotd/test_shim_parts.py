"""What a shim does to processes, tried in a process of its own."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from snapshotd.shim.hostlog import LONGEST_LINE, HostLog

SCRIPT = """
import subprocess
from snapshotd.shim import linux
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
