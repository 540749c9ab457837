"""``dumont``: its commands, and how it ends."""

from __future__ import annotations

import sys
from collections.abc import Callable
from importlib import import_module
from importlib.util import find_spec
from typing import Annotated, Any, Final

import typer

import dumont
from dumont.cli import deployments, doctor, engines, inference, instances, nodes, run, snapshots
from dumont.cli.output import command
from dumont.errors import services_not_installed

EXIT_INTERRUPTED: Final = 130

app = typer.Typer(
    help="Serve models that sleep for free and wake in about a second.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _version(wanted: bool) -> None:
    if wanted:
        sys.stdout.write(f"dumont {dumont.__version__}\n")
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """Serve models that sleep for free and wake in about a second."""


def _from_services(name: str) -> Callable[..., Any]:
    """The command ``name`` of dumont-services, or one that says what to install if that is missing."""
    module = f"dumont.cli.{name}"
    if find_spec(module):
        return getattr(import_module(module), name)  # type: ignore[no-any-return]

    @command
    def missing() -> None:
        raise services_not_installed()

    missing.__doc__ = "Needs dumont-services, which is not installed here."
    return missing


# A command that is missing takes any arguments, so that its answer is what to install.
ANYTHING: Final = {"ignore_unknown_options": True, "allow_extra_args": True, "help_option_names": []}

for name in ("up", "bench", "simulate"):
    found = _from_services(name)
    # The simulation reads its arguments itself, in a process of its own.
    passed_on = found.__module__ == __name__ or name == "simulate"
    app.command(name, context_settings=ANYTHING if passed_on else {})(found)
for function in (
    deployments.deploy,
    deployments.ls,
    deployments.rm,
    deployments.explain,
    run.run,
    inference.generate,
    inference.embed,
    instances.ps,
    nodes.models,
    instances.park,
    instances.resume,
    instances.migrate,
    instances.stop,
    instances.logs,
    doctor.doctor,
):
    app.command()(function)
app.add_typer(snapshots.app, name="snapshot")
app.add_typer(nodes.app, name="node")
app.add_typer(engines.app, name="engine")


def main() -> None:
    """The console script."""
    try:
        app()
    except KeyboardInterrupt:
        sys.exit(EXIT_INTERRUPTED)
    except BrokenPipeError:  # the reader, such as head, has seen enough
        sys.stderr.close()
        sys.exit(0)


if __name__ == "__main__":
    main()
