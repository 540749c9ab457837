"""The baseline: a plain script from its start to the first token."""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass
from pathlib import Path

from dumont.benchmarks.programs import environment, run, script
from dumont.benchmarks.results import Sample
from dumont.errors import Internal


@dataclass(frozen=True)
class PlainAnswer:
    """What the script measured, and its answer."""

    sample: Sample
    text: str


def measure(model: Path, prompt: str, max_new_tokens: int) -> PlainAnswer:
    """Run the plain script once; its seconds count from the start of its process.

    Raises:
        Internal: PLAIN_SCRIPT_FAILED.
    """
    command = [sys.executable, str(script("plain_cold_start")), str(model), prompt, str(max_new_tokens)]
    done = run(command, env=environment())
    if done.returncode != 0:
        raise Internal(
            "PLAIN_SCRIPT_FAILED", f"the plain script failed with {model.name}: {done.stderr[-500:]}"
        )
    said = json.loads(done.stdout.splitlines()[-1])
    return PlainAnswer(Sample(said["seconds"], said["phases"], tuple(said["tokens"])), said["answer"])
