"""``dumont simulate``: what a fleet would cost, and how long callers would wait, under several policies."""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from controller.simulation import baselines, figures, trace
from controller.simulation import fleet as fleets
from controller.simulation.results import PERCENTILES, Result, percentile

TIERS = ("resident", "parked", "local", "remote", "cold")


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the simulation that the arguments describe, and print it."""
    options = _parse(arguments)
    models, machine = figures.load()
    made = trace.make(options.deployments, options.hours * 3600, models, options.seed)
    _say(f"{len(made.arrivals)} requests for {options.deployments} deployments in {options.hours:g} h")
    gpus = options.nodes * options.gpus
    results = [
        baselines.always_warm(made, machine),
        baselines.always_cold(made, machine, options.seed),
        baselines.least_recently_used(made, machine, gpus, options.seed),
    ]
    for idle in options.idle:
        began = time.perf_counter()
        fleet = fleets.Fleet(options.nodes, options.gpus, idle, options.park, options.seed)
        results.append(fleets.run(made, fleet, machine, f"Dumont, idle {idle:g} s"))
        _say(f"{results[-1].policy}: simulated in {time.perf_counter() - began:.0f} s")
    document = _document(options, made, results)
    if options.output:
        options.output.write_text(json.dumps(document, indent=1) + "\n")
    if options.plot:
        from controller.simulation import plot

        plot.draw(results, options.plot)
    sys.stdout.write(json.dumps(document) + "\n" if options.json else _table(results))


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="dumont simulate",
        description="Simulate a fleet: the controller's own code over nodes in virtual time. Needs no GPU.",
    )
    parser.add_argument("--nodes", type=_positive, default=50, help="nodes (default: 50)")
    parser.add_argument("--gpus", type=_positive, default=1, help="GPUs of each node (default: 1)")
    parser.add_argument("--deployments", type=_positive, default=1000, help="(default: 1000)")
    parser.add_argument("--hours", type=float, default=0.5, help="of virtual time (default: 0.5)")
    parser.add_argument(
        "--idle", type=float, action="append", help="idle_timeout in seconds; may be repeated (default: 15)"
    )
    parser.add_argument("--park", type=float, default=600.0, help="park_timeout in seconds (default: 600)")
    parser.add_argument("--seed", type=int, default=1, help="the same one gives the same result (default: 1)")
    parser.add_argument("--output", type=Path, help="a file for the figures as JSON")
    parser.add_argument("--plot", type=Path, help="a file for a picture")
    parser.add_argument("--json", action="store_true", help="print JSON")
    options = parser.parse_args(arguments)
    options.idle = options.idle or [15.0]
    return options


def _positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{number} is not positive")
    return number


def _document(options: argparse.Namespace, made: trace.Trace, results: Sequence[Result]) -> dict[str, Any]:
    warm = results[0]
    return {
        "nodes": options.nodes,
        "gpus": options.nodes * options.gpus,
        "deployments": options.deployments,
        "hours": options.hours,
        "seed": options.seed,
        "requests": len(made.arrivals),
        "policies": [
            {
                "policy": result.policy,
                "gpu_hours": round(result.gpu_hours, 3),
                "saved": round(result.saved(warm), 4),
                "first_token": {f"p{p:g}": round(result.percentile(p), 4) for p in PERCENTILES},
                "tiers": dict(result.tiers),
                "failures": dict(result.failures),
                "decisions_per_second": round(result.decisions_per_second, 1),
                "decision_seconds": {
                    f"p{p:g}": round(percentile(result.decision_seconds, p), 7) for p in (50.0, 99.0)
                },
            }
            for result in results
        ],
    }


def _table(results: Sequence[Result]) -> str:
    warm = results[0]
    headers = [
        "POLICY",
        "GPU-HOURS",
        "SAVED",
        *(f"P{p:g}" for p in PERCENTILES),
        *TIERS,
        "FAILED",
        "DECISIONS/S",
    ]
    rows = [[header.upper() for header in headers]]
    for result in results:
        total = sum(result.tiers.values()) or 1
        shares = [f"{result.tiers.get(tier, 0) / total:.1%}" for tier in TIERS]
        times = [f"{result.percentile(p):.3f} s" for p in PERCENTILES]
        failed = str(sum(result.failures.values()))
        speed = f"{result.decisions_per_second:.0f}" if result.decisions_per_second else ""
        saved = f"{result.saved(warm):.1%}"
        rows.append([result.policy, f"{result.gpu_hours:.1f}", saved, *times, *shares, failed, speed])
    widths = [max(len(row[column]) for row in rows) for column in range(len(headers))]
    lines = [
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows
    ]
    return "\n".join(lines) + "\n"


def _say(text: str) -> None:
    sys.stderr.write(text + "\n")


if __name__ == "__main__":
    main()
