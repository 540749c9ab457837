"""``dumont engine``: the engines of this node that run under an interpreter of their own."""

from __future__ import annotations

import json as jsonlib
import signal
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Any

import typer

from dumont.cli.output import Columns, Json, command, print_json, print_table
from dumont.errors import services_not_installed

app = typer.Typer(
    help="The engines of this node that run under an interpreter of their own.", no_args_is_help=True
)


@app.command()
@command
def install(
    engine: Annotated[str, typer.Argument(help="vllm")],
    version: Annotated[str, typer.Option(help="By default the newest that is pinned here.")] = "",
    directory: Annotated[
        Path | None,
        typer.Option(help="By default in ~/.cache/dumont/engines, where snapshotd finds it by itself."),
    ] = None,
    build: Annotated[
        str, typer.Option(help="cuda or cpu; by default cuda where there is an NVIDIA driver.")
    ] = "",
    python: Annotated[
        str, typer.Option(help="The Python to make the environment with; by default the one that runs this.")
    ] = "",
    json: Json = False,
) -> None:
    """Make an environment for an engine, of pinned packages. Safe to repeat."""
    arguments = ["install", engine]
    given = {"--version": version, "--build": build, "--python": python, "--directory": directory}
    for name, value in given.items():
        if value:
            arguments += [name, str(value)]
    with subprocess.Popen(_node(*arguments, *(["--json"] if json else []))) as node:
        # At Ctrl-C it gets the signal as well, and has to clean up first.
        before = signal.signal(signal.SIGINT, signal.SIG_IGN)
        try:
            raise typer.Exit(node.wait())
        finally:
            signal.signal(signal.SIGINT, before)


@app.command()
@command
def ls(json: Json = False) -> None:
    """List what is installed and what could be; a * marks what a snapshotd that is started now uses."""
    words = _node("ls", *(["--json"] if json else []))
    done = subprocess.run(words, stdout=subprocess.PIPE, text=True, check=False)
    if done.returncode:
        sys.stdout.write(done.stdout)
        raise typer.Exit(done.returncode)
    found: list[dict[str, Any]] = jsonlib.loads(done.stdout)
    if json:
        print_json(found)
        return
    print_table(
        Columns(("", "ENGINE", "VERSION", "BUILD", "STATE", "PYTHON"), drop=("BUILD",), fold=("PYTHON",)),
        (
            (
                "*" if row["used"] else "",
                row["engine"],
                row["version"],
                row["build"],
                row["state"],
                row["python"],
            )
            for row in found
        ),
    )


def _node(*arguments: str) -> list[str]:
    """The command of the node's part, which is a program of its own.

    Raises:
        FailedPrecondition: SERVICES_NOT_INSTALLED.
    """
    if not find_spec("snapshotd") or not find_spec("blake3"):
        raise services_not_installed()
    return [sys.executable, "-m", "snapshotd.engines", *arguments]
