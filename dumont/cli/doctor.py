"""``dumont doctor``."""

from __future__ import annotations

import typer

from dumont import doctor as checks
from dumont.cli.output import Columns, Endpoint, Json, command, print_json, print_table


@command
def doctor(json: Json = False, endpoint: Endpoint = None) -> None:
    """Check what this machine lacks, and say what to do. Exit status 1: something needed is missing."""
    found = checks.examine(endpoint)
    if json:
        print_json(found)
    else:
        print_table(
            Columns(("CHECK", "", "WHAT WAS FOUND"), fold=("WHAT WAS FOUND",)),
            ((check.check, verdict(check), check.message) for check in found),
        )
    if any(check.needed and not check.passed for check in found):
        raise typer.Exit(1)


def verdict(check: checks.Check) -> str:
    """A check's result as one word for people."""
    if check.passed:
        return "ok"
    return "missing" if check.needed else "-"
