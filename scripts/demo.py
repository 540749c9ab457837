"""What scripts/demo runs after the set-up.

Each round measures a plain transformers script, deploys the same model, asks it (cold), stops it, asks again
(restored), parks it and asks a third time (resumed). The results are the medians of the rounds.
"""

from __future__ import annotations

import argparse
import json
import os
import socket
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

import dumont
from dumont.benchmarks import plain

MODEL = "HuggingFaceTB/SmolLM2-135M-Instruct"
PROMPT = "The capital of France is"
EXPECTED = "Paris"
MAX_NEW_TOKENS = 8
ROUNDS = 3

progress = Console(stderr=True, highlight=False)


class CheckFailed(Exception):
    """Something that the demo promises has not happened."""


def check(holds: bool, failure: str) -> None:
    if not holds:
        raise CheckFailed(failure)


@dataclass(frozen=True)
class Round:
    plain_seconds: float
    cold: dumont.Generation
    restored: dumont.Generation
    resumed: dumont.Generation
    snapshot: dumont.Snapshot


def main() -> int:
    parser = argparse.ArgumentParser(prog="scripts/demo", description=__doc__)
    parser.add_argument(
        "--json",
        action="store_true",
        help="print one JSON object at the end, and everything else on standard error",
    )
    parser.add_argument("--engine", default="causal_lm", help="that runs the model: causal_lm or vllm")
    arguments = parser.parse_args()
    model = Path(os.environ["DUMONT_CACHE"]) / "models" / MODEL
    try:
        progress.print("one plain run that does not count, so that files are in memory for all runs")
        plain_cold_start(model)
        with tempfile.TemporaryDirectory(prefix="dumont-demo-") as state, services(Path(state)) as client:
            rounds = [play(client, model, arguments.engine, number) for number in range(1, ROUNDS + 1)]
    except (CheckFailed, dumont.DumontError) as error:
        progress.print(f"[red]the demo failed:[/red] {error}")
        return 1
    result = {"engine": arguments.engine, **summarize(rounds)}
    show(result, progress if arguments.json else Console(highlight=False))
    if arguments.json:
        print(json.dumps(result, indent=2))
    return 0


def plain_cold_start(model: Path) -> float:
    """Seconds from the start of a plain script's process to its first token."""
    measured = plain.measure(model, PROMPT, MAX_NEW_TOKENS)
    check(EXPECTED in measured.text, f"the plain script answered {measured.text!r}, without {EXPECTED}")
    return measured.sample.seconds


@contextmanager
def services(state: Path) -> Iterator[dumont.Client]:
    """Both services on free ports with built-in defaults; nothing of them is left afterwards."""
    controller, snapshotd = free_ports(2)
    command = [
        str(Path(sys.executable).with_name("dumont")), "up", "--json", "--state-dir", str(state),
        "--controller-port", str(controller), "--snapshotd-port", str(snapshotd),
    ]  # fmt: skip
    up = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, text=True)
    try:
        assert up.stdout is not None
        # One line: the addresses of both services, or why they do not serve.
        addresses = json.loads(up.stdout.readline() or "{}")
        check(
            "controller" in addresses,
            f"the services did not start: {addresses.get('error', {}).get('message')}",
        )
        with dumont.Client(f"127.0.0.1:{controller}") as client:
            yield client
    finally:
        up.terminate()
        up.wait()


def free_ports(count: int) -> list[int]:
    probes = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = [probe.getsockname()[1] for probe in probes]
    for probe in probes:
        probe.close()
    return ports


def play(client: dumont.Client, model: Path, engine: str, number: int) -> Round:
    progress.print(f"round {number} of {ROUNDS}: plain script", end="", soft_wrap=True)
    plain_seconds = plain_cold_start(model)
    progress.print(f" {plain_seconds:.2f} s", end="")
    deployment = client.deploy(
        str(model),
        start_mode="checkpoint",
        checkpoint={"enabled": True, "ttl": 3600},
        name=f"demo-{number}",
        engine=engine,
    )

    cold = ask(deployment, "cold")
    (snapshot,) = client.snapshots.list(deployment.name)
    first = client.instances.get(cold.start.instance)
    source = Process(first.pid)
    check(source.alive(), f"{first.name} answered, but its process {first.pid} is not there")
    client.instances.stop(first.name)
    check(
        not source.alive(),
        f"process {first.pid} of the first answer still runs, so nothing would be restored",
    )

    restored = ask(deployment, "local")
    check(restored.start.instance != first.name, "the restored answer came from the first instance")
    client.instances.park(restored.start.instance)
    resumed = ask(deployment, "parked")
    check(
        cold.text == restored.text == resumed.text,
        f"the answers differ: {cold.text!r}, {restored.text!r}, {resumed.text!r}",
    )
    deployment.delete()
    progress.print("")
    return Round(plain_seconds, cold, restored, resumed, snapshot)


def ask(deployment: dumont.Deployment, tier: str) -> dumont.Generation:
    answer = deployment.generate(PROMPT, max_new_tokens=MAX_NEW_TOKENS)
    reasons = "; ".join(answer.start.reasons)
    check(answer.start.tier == tier, f"the start was {answer.start.tier}, not {tier}: {reasons}")
    check(EXPECTED in answer.text, f"the {tier} answer was {answer.text!r}, without {EXPECTED}")
    progress.print(f", {tier} {answer.first_token_seconds:.2f} s", end="")
    return answer


class Process:
    """A process, distinguished from a later one of the same pid by its start time."""

    def __init__(self, pid: int) -> None:
        self._pid = pid
        self._started = self._start_time()

    def alive(self) -> bool:
        return self._started is not None and self._start_time() == self._started

    def _start_time(self) -> str | None:
        try:
            return Path(f"/proc/{self._pid}/stat").read_text().rpartition(")")[2].split()[19]
        except OSError:
            return None


def summarize(rounds: list[Round]) -> dict[str, Any]:
    def median(values: list[float]) -> float:
        return round(statistics.median(values), 4)

    last = rounds[-1]
    return {
        "model": MODEL,
        "plain_cold_seconds": median([r.plain_seconds for r in rounds]),
        "cold_seconds": median([r.cold.first_token_seconds for r in rounds]),
        "restore_seconds": median([r.restored.first_token_seconds for r in rounds]),
        "resume_seconds": median([r.resumed.first_token_seconds for r in rounds]),
        "capture_pause_seconds": median([r.snapshot.source_pause_seconds for r in rounds]),
        "snapshot_bytes": last.snapshot.size_bytes,
        "cold_answer": last.cold.text,
        "restored_answer": last.restored.text,
        "resumed_answer": last.resumed.text,
        # Part of cold_seconds: the snapshot is made before the first prompt enters the process.
        "cold_capture_seconds": median([phases(r.cold).get("capture", 0.0) for r in rounds]),
        "rounds": len(rounds),
        "phases": {
            "cold": phases(last.cold),
            "restore": phases(last.restored),
            "resume": phases(last.resumed),
        },
    }


def phases(answer: dumont.Generation) -> dict[str, float]:
    return {phase.name: round(phase.seconds, 4) for phase in answer.start.phases}


def show(result: dict[str, Any], console: Console) -> None:
    plain = result["plain_cold_seconds"]
    rows = {
        "plain transformers script": plain,
        "cold": result["cold_seconds"],
        "restored from a snapshot": result["restore_seconds"],
        "resumed from parked": result["resume_seconds"],
    }
    table = Table(title=f"{result['model']} with {result['engine']}: seconds to the first token")
    table.add_column("start")
    table.add_column("seconds", justify="right")
    table.add_column("plain ÷ this", justify="right")
    for start, seconds in rows.items():
        table.add_row(start, f"{seconds:.3f}", f"{plain / seconds:.1f}")
    console.print(table)
    console.print(
        f"Medians of {result['rounds']} rounds. The plain script is timed from the start of its process, the "
        f"others from the client's request. {result['cold_capture_seconds']:.2f} s of cold are the capture, "
        f"which pauses the process for {result['capture_pause_seconds']:.2f} s; the snapshot has "
        f"{result['snapshot_bytes'] / 1e6:.0f} MB.\n"
        f"Checked in every round: the answer (always {result['cold_answer']!r}), its tier, and that the "
        "process of the first answer had ended before the restore began."
    )


if __name__ == "__main__":
    sys.exit(main())
