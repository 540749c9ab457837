"""Kills and stops at random moments, drawn from a fixed seed: nothing is wrong, lost, stuck or left over.

``scripts/soak`` does the same for longer; docs/reliability.md has its figures.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.node

SEED = 11
FAULTS = 8
# No fault begins later, so that a busy machine sees fewer of them.
SECONDS = 40.0


@pytest.mark.timeout(240)
def test_a_fleet_survives_what_befalls_it(
    criu: Path, weed: Path, instruct_model: Path, tmp_path: Path
) -> None:
    # A process of its own: it waits for everything that anybody leaves behind.
    done = subprocess.run(
        [
            sys.executable, "-m", "tests.nemesis", "--seed", str(SEED), "--faults", str(FAULTS),
            "--seconds", str(SECONDS), "--directory", str(tmp_path / "fleet"), "--model", str(instruct_model),
            "--json", str(tmp_path / "report.json"),
        ],
        stderr=subprocess.PIPE,
        text=True,
        check=False,
    )  # fmt: skip
    assert (tmp_path / "report.json").exists(), done.stderr
    report = json.loads((tmp_path / "report.json").read_text())

    assert report["tally"]["problems"] == [], done.stderr
    assert report["leaks"] == [], done.stderr
    # And there was something to survive, and somebody who asked.
    assert sum(report["faults"].values()) >= FAULTS // 4, done.stderr
    assert report["tally"]["answered"] >= FAULTS, done.stderr
