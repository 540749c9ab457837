"""The programs that a bench runs beside Dumont, and what they find around them."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Final

from dumont.errors import FailedPrecondition

SCRIPTS: Final = Path(__file__).parent / "scripts"


def script(name: str) -> Path:
    """A script of the bench. It is run by path, so that importing Dumont is no part of what is measured."""
    return SCRIPTS / f"{name}.py"


def environment() -> dict[str, str]:
    """This process's own, without the hub; byte code is kept, or every run would compile again."""
    kept = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
    return {**kept, "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}


def find_criu() -> Path:
    """The CRIU that snapshotd uses here.

    Raises:
        FailedPrecondition: CRIU_NOT_FOUND.
    """
    done = subprocess.run(
        [sys.executable, "-m", "snapshotd.preflight", "--criu"], capture_output=True, text=True, check=False
    )
    if done.returncode != 0:
        raise FailedPrecondition("CRIU_NOT_FOUND", done.stderr.strip()[-500:] or "no CRIU works here")
    return Path(done.stdout.strip())


def tail(path: Path, characters: int = 500) -> str:
    """How a log ends, on one line."""
    try:
        return " ".join(path.read_text(errors="replace")[-characters:].split()) or "its log is empty"
    except OSError:
        return "it wrote no log"
