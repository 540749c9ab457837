"""``dumont up``."""

from __future__ import annotations

import asyncio
import os
import shutil
import sys
from pathlib import Path
from typing import Annotated, Final

import typer

from dumont.cli.output import Json, command, print_json

# scripts/setup installs it, so nothing has to be downloaded.
DEMO_MODEL: Final = "HuggingFaceTB/SmolLM2-135M-Instruct"


def default_state_dir() -> Path:
    """``$XDG_STATE_HOME/dumont``, by default ``~/.local/state/dumont``."""
    return Path(os.environ.get("XDG_STATE_HOME") or Path.home() / ".local/state") / "dumont"


def next_commands(endpoint: str) -> list[str]:
    """What to type in another terminal to talk with a model; Ctrl-C in this one ends both services."""
    # A shell that has not activated the environment does not find the command.
    programs = Path(sys.executable).parent
    path = "" if shutil.which("dumont") else f' PATH="{programs}:$PATH"'
    return [
        "Ctrl-C ends both. In another terminal:",
        "",
        f"  export DUMONT_ENDPOINT={endpoint}{path}",
        f"  dumont run {DEMO_MODEL}",
    ]


Port = Annotated[int, typer.Option(min=1, max=65535)]


@command
def up(
    state_dir: Annotated[
        Path | None,
        typer.Option(help="Where both keep what they know.", show_default="~/.local/state/dumont"),
    ] = None,
    controller_port: Port = 7070,
    snapshotd_port: Port = 7071,
    models_dir: Annotated[Path | None, typer.Option(help="The node's model cache.")] = None,
    device: Annotated[str, typer.Option(help="auto or cpu.")] = "auto",
    verbose: Annotated[bool, typer.Option("--verbose", help="Logs to the terminal, not into files.")] = False,
    json: Json = False,
) -> None:
    """Run both services on this machine until interrupted; the models end with them."""
    from dumont.up import check_installed, check_models_dir, plan, run

    if device not in ("auto", "cpu"):
        raise typer.BadParameter("--device is auto or cpu")
    check_installed()
    if models_dir is not None:
        check_models_dir(models_dir)
    directory = (state_dir or default_state_dir()).expanduser().absolute()
    daemons = plan(directory, controller_port, snapshotd_port, models_dir, device)
    endpoints = {daemon.name: daemon.endpoint for daemon in daemons}

    def ready() -> None:
        if json:
            print_json({**endpoints, "state_dir": str(directory)})
            return
        lines = [f"{name:<11}{endpoint}" for name, endpoint in endpoints.items()]
        lines += [f"{'state':<11}{directory}", "", *next_commands(endpoints["controller"])]
        sys.stdout.write("\n".join(lines) + "\n")
        sys.stdout.flush()

    asyncio.run(run(daemons, ready, verbose=verbose))
