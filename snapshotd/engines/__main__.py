"""``python -m snapshotd.engines``: what ``dumont engine`` runs on a node."""

from __future__ import annotations

import argparse
import json
import os
import signal
import sys
import time
from pathlib import Path
from types import FrameType

from dumont.errors import DumontError, describe_error
from snapshotd.engines import environment, install, installed
from snapshotd.system.paths import DRIVER_VERSION, engines_directory

NAMED = "DUMONT_SNAPSHOTD_ENGINE_PYTHON"


def main() -> None:
    """Install an engine, or list what is installed."""
    parser = argparse.ArgumentParser(prog="dumont engine")
    commands = parser.add_subparsers(dest="command", required=True)
    adding = commands.add_parser("install")
    adding.add_argument("engine")
    adding.add_argument("--version", default="")
    adding.add_argument("--build", choices=(install.CPU, install.CUDA), default="")
    adding.add_argument("--directory", type=Path)
    adding.add_argument("--python", default="")
    adding.add_argument("--json", action="store_true")
    listing = commands.add_parser("ls", help="always JSON; --json is for errors")
    listing.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    signal.signal(signal.SIGTERM, _interrupt)
    try:
        if arguments.command == "ls":
            sys.stdout.write(json.dumps(listed()) + "\n")
        else:
            add(arguments)
    except KeyboardInterrupt:
        sys.stderr.write("interrupted; nothing is left but pip's downloads\n")
        raise SystemExit(130) from None
    except DumontError as error:
        # As every command of dumont says it.
        if arguments.json:
            sys.stdout.write(json.dumps({"error": describe_error(error)}) + "\n")
        else:
            sys.stderr.write(f"error: {' '.join(error.message.split())} [{error.reason}]\n")
        raise SystemExit(1) from None


def add(arguments: argparse.Namespace) -> None:
    """Install an engine and say how it is used."""
    build = arguments.build or (install.CUDA if DRIVER_VERSION.exists() else install.CPU)
    lock = install.choose(install.locks(), arguments.engine, arguments.version, build)
    directory = arguments.directory.absolute() if arguments.directory else None
    python = arguments.python or install.default_python()
    began = time.monotonic()

    def say(line: str) -> None:
        sys.stderr.write(f"{time.monotonic() - began:6.1f} s  {line}\n")
        sys.stderr.flush()

    made, new = install.install(lock, engines_directory(), directory, python, say)
    if arguments.json:
        sys.stdout.write(json.dumps(described(made) | {"new": new}) + "\n")
        return
    how = f" with --engine-python {made.engine}={made.python}" if directory else ""
    state = "installed" if new else "is installed already"
    sys.stderr.write(
        f"{made.engine} {made.version} ({made.build}) {state} in {made.directory}; "
        f"a snapshotd that is started now uses it{how}\n"
    )


def listed() -> list[dict[str, object]]:
    """The environments of this node, those that a snapshotd would use marked, and what could be installed."""
    known = installed.found(engines_directory())
    named = environment.parse_interpreters(os.environ.get(NAMED, ""))
    used = {one.python for one in installed.used(known).values() if one.engine not in named}
    rows: list[dict[str, object]] = []
    for engine, python in named.items():
        row: dict[str, object] = {"engine": engine, "build": "", "python": str(python), "used": True}
        try:
            rows.append(row | {"version": environment.examine(engine, python).version, "state": "named"})
        except DumontError as error:
            rows.append(row | {"version": "", "state": f"unusable: {error.message}"})
    rows += [described(one) | {"used": one.python in used, "state": "installed"} for one in known]
    there = {(one.engine, one.version, one.build) for one in known}
    for lock in install.locks():
        if (lock.engine, lock.version, lock.build) not in there:
            rows.append(
                {
                    "engine": lock.engine,
                    "version": lock.version,
                    "build": lock.build,
                    "python": "",
                    "used": False,
                    "state": "not installed",
                }
            )
    return rows


def described(one: installed.Installed) -> dict[str, object]:
    """An environment as JSON."""
    return {
        "engine": one.engine,
        "version": one.version,
        "build": one.build,
        "python": str(one.python),
        "directory": str(one.directory),
    }


def _interrupt(number: int, frame: FrameType | None) -> None:
    raise KeyboardInterrupt


if __name__ == "__main__":
    main()
