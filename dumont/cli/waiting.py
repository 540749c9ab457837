"""What a person sees who waits for a model to start."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager

from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

from dumont.cli.output import console, short
from dumont.starting import OnProgress
from dumont.types import StartProgress


@contextmanager
def start_shown(*, as_json: bool) -> Iterator[OnProgress | None]:
    """Show on standard error, if it is a terminal, how far a start is, until the context ends.

    Returns:
        What is to be told of it; None where nothing is shown.
    """
    if as_json or not sys.stderr.isatty():
        yield None
        return
    columns = (SpinnerColumn(), TextColumn("{task.description}", markup=False), TimeElapsedColumn())
    with Progress(*columns, console=console(stderr=True), transient=True) as shown:
        task = shown.add_task("waiting for the model", total=None)
        yield lambda progress: shown.update(task, description=describe_progress(progress))


def describe_progress(progress: StartProgress) -> str:
    """How far a start is, in words: ``loading the model on node-a: warm_up``."""
    if not progress.node:
        return "waiting for a place to start"
    what = f"restoring {short(progress.snapshot)}" if progress.snapshot else "loading the model"
    return f"{what} on {short(progress.node)}: {progress.stage}"
