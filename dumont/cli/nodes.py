"""``dumont node ls``."""

from __future__ import annotations

import typer

from dumont import sync
from dumont.cli.output import Endpoint, Json, age, command, print_json, print_table, short, size
from dumont.types import Node

app = typer.Typer(help="The machines that run models.", no_args_is_help=True)


@app.callback()
def group() -> None:
    """Keeps ``ls`` a command of its own: a group of one would be run without its name."""


@app.command()
@command
def ls(json: Json = False, endpoint: Endpoint = None) -> None:
    """List nodes."""
    with sync.Client(endpoint) as client:
        found = client.nodes.list()
    if json:
        print_json(found)
        return
    print_table(
        (
            "NODE",
            "STATE",
            "ENDPOINT",
            "GPUS",
            "MEMORY FREE",
            "CPUS",
            "SNAPSHOTS",
            "CHECKPOINTS",
            "LAST SEEN",
            "VERSION",
        ),
        (
            (
                short(node.name),
                node.state,
                node.endpoint,
                ", ".join(node.gpu_models) or "none",
                f"{size(node.memory_available_bytes)} of {size(node.memory_total_bytes)}",
                str(node.cpu_count),
                kept(node),
                "yes" if node.checkpoint_capable else "no",
                age(node.heartbeat_time),
                node.version,
            )
            for node in found
        ),
    )


def kept(node: Node) -> str:
    """What its own snapshots take, of what they may."""
    limit = size(node.snapshot_limit_bytes) if node.snapshot_limit_bytes else "no limit"
    return f"{size(node.snapshot_bytes)} of {limit}"
