"""A frozen process does not run, with cgroup v2 and without, and goes on where it was."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from snapshotd.adapters.criu_shim.host import forget
from snapshotd.system.freezer import Freezer, cgroup2_root
from snapshotd.system.memory_limit import MemoryLimit

pytestmark = pytest.mark.node

# Answers each line with its own count, so that an answer proves that it runs.
ECHO = "import sys\nfor number, _ in enumerate(sys.stdin): print(number, flush=True)"


@pytest.fixture
def process(root: None) -> Iterator[subprocess.Popen[str]]:
    running = subprocess.Popen(
        [sys.executable, "-c", ECHO], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    yield running
    running.kill()
    running.wait()


def test_with_cgroups_it_is_frozen_in_a_group_of_its_own(process: subprocess.Popen[str]) -> None:
    freezer = Freezer.create(f"test-{process.pid}", process.pid)
    assert (freezer.group is None) == (cgroup2_root() is None)
    assert ask(process) == "0"

    freezer.freeze()
    assert freezer.group is None or (freezer.group / "cgroup.freeze").read_text().strip() == "1"
    freezer.thaw()
    assert ask(process) == "1"

    process.kill()
    process.wait()
    freezer.remove()
    assert freezer.group is None or not freezer.group.exists()


async def test_what_a_dead_shim_left_is_ended_before_its_cgroups_are_removed(
    process: subprocess.Popen[str], tmp_path: Path
) -> None:
    shim = f"shim-test-{process.pid}"
    freezer = Freezer.create(shim, process.pid)
    limit = MemoryLimit.create(shim, process.pid, 1 << 30)
    (tmp_path / f"{shim}.sock").touch()

    await forget(tmp_path / f"{shim}.sock")

    assert list(tmp_path.iterdir()) == []
    for group in (freezer.group, limit.group):
        assert group is None or not group.exists()
    # Without a cgroup nobody knows what the shim's was.
    assert freezer.group is None or process.wait(10) == -signal.SIGKILL


def test_without_cgroups_it_is_stopped(process: subprocess.Popen[str]) -> None:
    freezer = Freezer(None, process.pid)
    assert ask(process) == "0"

    freezer.freeze()
    _, status = os.waitpid(process.pid, os.WUNTRACED)
    assert os.WIFSTOPPED(status)
    assert os.WSTOPSIG(status) == signal.SIGSTOP
    assert Path(f"/proc/{process.pid}/stat").read_text().rpartition(")")[2].split()[0] == "T"

    freezer.thaw()
    assert ask(process) == "1"


def ask(process: subprocess.Popen[str]) -> str:
    assert process.stdin is not None
    assert process.stdout is not None
    process.stdin.write("\n")
    process.stdin.flush()
    return process.stdout.readline().strip()
