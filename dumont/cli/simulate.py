"""``dumont simulate``: the controller's own code over simulated nodes."""

from __future__ import annotations

import os
import subprocess
import sys
from importlib.util import find_spec

import typer

from dumont.cli.output import command
from dumont.errors import services_not_installed


@command
def simulate(context: typer.Context) -> None:
    """Simulate a fleet in virtual time: GPU-hours and waiting times of several policies. Needs no GPU."""
    if find_spec("controller") is None:
        raise services_not_installed("controller")
    # The order of sets must be the same in every run.
    environment = {**os.environ, "PYTHONHASHSEED": "0"}
    words = [sys.executable, "-m", "controller.simulation", *context.args]
    raise typer.Exit(subprocess.run(words, env=environment, check=False).returncode)
