"""What a daemon has freed is the kernel's again, tried in a process of its own."""

from __future__ import annotations

import os
import subprocess
import sys

# What else sets how malloc gives back.
SETTINGS = {"MALLOC_MMAP_THRESHOLD_", "MALLOC_TRIM_THRESHOLD_", "MALLOC_ARENA_MAX", "GLIBC_TUNABLES"}
# Threads that take chunks as an upload does, each with something small that stays behind it.
SCRIPT = """
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from snapshotd.system import malloc

def resident():
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096

def take(number):
    for _ in range(4):
        chunk = bytearray(8 << 20)
        kept.append(bytearray(1000))
        packed = bytes(chunk[: 1 << 20])
    return number

if sys.argv[1] == "given back":
    malloc.give_back_large_blocks()
kept, before = [], resident()
with ThreadPoolExecutor(8) as threads:
    list(threads.map(take, range(64)))
    print(resident() - before)
"""


def left(how: str) -> int:
    """Bytes that a process holds after it has freed everything large."""
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, how],
        env={name: value for name, value in os.environ.items() if name not in SETTINGS},
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    return int(done.stdout)


def test_what_large_blocks_took_is_given_back() -> None:
    assert left("given back") < left("kept") / 4
