"""``dumont node``: the commands for nodes."""

from __future__ import annotations

from typing import Annotated, Final

import typer

from dumont import sync
from dumont.cli import completion
from dumont.cli.durations import parse_duration
from dumont.cli.output import (
    Columns,
    Endpoint,
    Json,
    age,
    command,
    console,
    print_json,
    print_table,
    short,
    size,
)
from dumont.types import Node, NodeGpu

app = typer.Typer(help="The machines that run models.", no_args_is_help=True)


Name = Annotated[str, typer.Argument(metavar="NODE", help="The node.", autocompletion=completion.nodes)]


@app.command()
@command
def ls(json: Json = False, endpoint: Endpoint = None) -> None:
    """List nodes."""
    with sync.Client(endpoint) as client:
        found = client.nodes.list()
    if json:
        print_json(found)
        return
    print_table(COLUMNS, map(cells, found))


COLUMNS: Final = Columns(
    (
        "NODE", "STATE", "ENDPOINT", "GPUS", "ENGINES", "MEMORY FREE", "CPUS", "SNAPSHOTS", "CHECKPOINTS",
        "LAST SEEN", "VERSION",
    ),
    drop=(
        "VERSION", "CPUS", "ENGINES", "ENDPOINT", "LAST SEEN", "SNAPSHOTS", "CHECKPOINTS", "MEMORY FREE",
        "GPUS",
    ),
)  # fmt: skip


def cells(node: Node) -> tuple[str, ...]:
    """A row of the table of nodes."""
    return (
        short(node.name),
        f"{node.state}, draining" if node.draining else node.state,
        node.endpoint,
        ", ".join(map(gpu_memory, node.gpus)) or ", ".join(node.gpu_models) or "none",
        ", ".join(f"{name} {version}" for name, version in sorted(node.engines.items())) or "built in",
        f"{size(node.memory_available_bytes)} of {size(node.memory_total_bytes)}",
        str(node.cpu_count),
        kept(node),
        "yes" if node.checkpoint_capable else "no",
        age(node.heartbeat_time),
        node.version,
    )


def gpu_memory(gpu: NodeGpu) -> str:
    """A GPU and how much of its memory is free, such as ``H200 90 GiB of 139 GiB free``."""
    return f"{gpu.model} {size(gpu.memory_free_bytes)} of {size(gpu.memory_total_bytes)} free"


@command
def models(json: Json = False, endpoint: Endpoint = None) -> None:
    """List the models that the nodes have. Others are fetched from the hub when they are deployed."""
    with sync.Client(endpoint) as client:
        found = client.nodes.models()
    if json:
        print_json(found)
        return
    print_table(
        Columns(
            ("MODEL", "ENGINE", "WEIGHTS", "NODE", "PROBLEM"), drop=("NODE", "WEIGHTS"), fold=("PROBLEM",)
        ),
        (
            (one.model, one.engine, size(one.weights_bytes), short(one.node), one.problem)
            for one in sorted(found, key=lambda one: (one.model, one.node))
        ),
    )


@app.command()
@command
def drain(
    name: Name,
    wait: Annotated[bool, typer.Option(help="Wait until it is empty; Ctrl-C only ends the waiting.")] = True,
    deadline: Annotated[
        float | None,
        typer.Option(parser=parse_duration, metavar="DURATION", help="Wait no longer than this."),
    ] = None,
    json: Json = False,
    endpoint: Endpoint = None,
) -> None:
    """Start nothing more on a node, and bring what runs there to others, until it is undrained.

    Ends with status 1 if something is left there.
    """
    with sync.Client(endpoint) as client, console(stderr=True).status("draining") as status:

        def show(left: int, total: int) -> None:
            status.update(f"{left} of {total} instances left")

        left = client.nodes.drain(name, timeout=deadline, wait=wait, progress=show)
    if json:
        print_json({"node": short(name), "left": left})
    elif left:
        print_table(
            Columns(("STILL THERE", "DEPLOYMENT", "WHY"), drop=("DEPLOYMENT",), fold=("WHY",)),
            ((short(one.instance), short(one.deployment), f"{one.reason}: {one.message}") for one in left),
        )
    if left:
        raise typer.Exit(1)


@app.command()
@command
def undrain(name: Name, json: Json = False, endpoint: Endpoint = None) -> None:
    """Let a node take starts again."""
    with sync.Client(endpoint) as client:
        node = client.nodes.undrain(name)
    if json:
        print_json(node)


def kept(node: Node) -> str:
    """What its own snapshots take, of what they may."""
    limit = size(node.snapshot_limit_bytes) if node.snapshot_limit_bytes else "no limit"
    return f"{size(node.snapshot_bytes)} of {limit}"
