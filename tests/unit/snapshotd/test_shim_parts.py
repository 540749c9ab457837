"""What a shim does to processes, tried in a process of its own."""

from __future__ import annotations

import subprocess
import sys

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
