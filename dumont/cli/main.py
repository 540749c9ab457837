"""``dumont``: the commands, and how a run of one ends."""

from __future__ import annotations

import sys
from importlib.metadata import version
from typing import Annotated, Final

import typer

from dumont.cli import bench, deployments, doctor, inference, instances, nodes, snapshots, up

EXIT_INTERRUPTED: Final = 130

app = typer.Typer(
    help="Serve models that sleep for free and wake in about a second.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)


def _version(wanted: bool) -> None:
    if wanted:
        sys.stdout.write(f"dumont {version('dumont')}\n")
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """Serve models that sleep for free and wake in about a second."""


for function in (
    up.up,
    deployments.deploy,
    deployments.ls,
    deployments.rm,
    inference.generate,
    inference.embed,
    instances.ps,
    instances.park,
    instances.resume,
    instances.stop,
    instances.logs,
    doctor.doctor,
    bench.bench,
):
    app.command()(function)
app.add_typer(snapshots.app, name="snapshot")
app.add_typer(nodes.app, name="node")


def main() -> None:
    """Run the command line of this process."""
    try:
        app()
    except KeyboardInterrupt:
        sys.exit(EXIT_INTERRUPTED)
    except BrokenPipeError:  # the reader, such as head, has seen enough
        sys.stderr.close()
        sys.exit(0)


if __name__ == "__main__":
    main()
