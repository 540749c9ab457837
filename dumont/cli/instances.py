"""``dumont ps``, ``park``, ``resume``, ``migrate``, ``stop`` and ``logs``."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Sequence
from typing import Annotated, Final

import typer
from rich.live import Live

from dumont import sync
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
    table,
)
from dumont.errors import InvalidArgument
from dumont.types import Instance

Target = Annotated[str, typer.Argument(help="An instance, or a deployment for all of its instances.")]


@command
def ps(
    deployment: Annotated[str | None, typer.Option(help="List only this deployment's.")] = None,
    watch: Annotated[bool, typer.Option("--watch", help="Show each change until interrupted.")] = False,
    json: Json = False,
    endpoint: Endpoint = None,
) -> None:
    """List instances."""
    with sync.Client(endpoint) as client:
        if watch:
            wanted = short(deployment) if deployment else None
            changes = (
                [instance for instance in instances if wanted in (None, short(instance.deployment))]
                for instances in client.instances.watch()
            )
            _show_changes(changes, as_json=json)
            return
        found = client.instances.list(deployment)
    if json:
        print_json(found)
    else:
        _print(found, as_json=False)


@command
def park(target: Target, json: Json = False, endpoint: Endpoint = None) -> None:
    """Freeze instances. Their processes stay, and go on at the next request."""
    with sync.Client(endpoint) as client:
        found = [
            instance if instance.state == "parked" else client.instances.park(instance.name)
            for instance in client.instances.find(target)
        ]
    _print(found, as_json=json)


@command
def resume(target: Target, json: Json = False, endpoint: Endpoint = None) -> None:
    """Let parked instances serve again."""
    with sync.Client(endpoint) as client:
        found = [
            instance if instance.state == "serving" else client.instances.resume(instance.name)
            for instance in client.instances.find(target)
        ]
    _print(found, as_json=json)


@command
def migrate(
    instance: Annotated[str, typer.Argument(help="The instance.")],
    gpu: Annotated[
        str | None, typer.Option(metavar="GPU", help="UUID or index of another GPU of its node.")
    ] = None,
    node: Annotated[
        str | None, typer.Option(help="The node to bring it to; by default the controller chooses one.")
    ] = None,
    cold: Annotated[
        bool, typer.Option("--cold", help="Load the model again there if no snapshot can be brought there.")
    ] = False,
    wait: Annotated[
        bool, typer.Option(help="Wait until the source has answered its requests; Ctrl-C gives up.")
    ] = True,
    json: Json = False,
    endpoint: Endpoint = None,
) -> None:
    """Bring an instance to another GPU or node. Running answers are finished, none is lost."""
    if gpu is not None and node is not None:
        raise InvalidArgument("GPU_OR_NODE", "give --gpu for a GPU of the same node, or --node", field="gpu")
    with sync.Client(endpoint) as client, console(stderr=True).status("checking") as status:
        found = client.instances.migrate(
            short(instance), node=node, gpu=gpu, cold=cold, wait=wait, progress=status.update
        )
    _print([found], as_json=json)


@command
def stop(
    instance: Annotated[str, typer.Argument(help="The instance.")],
    json: Json = False,
    endpoint: Endpoint = None,
) -> None:
    """End an instance; its deployment's next request starts another."""
    with sync.Client(endpoint) as client:
        client.instances.stop(instance)
    if json:
        print_json({"stopped": short(instance)})


@command
def logs(
    target: Annotated[str, typer.Argument(help="An instance, or a deployment for its newest one.")],
    follow: Annotated[bool, typer.Option("--follow", "-f", help="Keep printing as it prints.")] = False,
    tail: Annotated[
        int, typer.Option(min=0, help="Begin with so many of the last lines; 0: all that are kept.")
    ] = 0,
    json: Json = False,
    endpoint: Endpoint = None,
) -> None:
    """Print what an instance's model host has printed."""
    with sync.Client(endpoint) as client:
        found = client.instances.find(target)
        newest = max(
            found, key=lambda instance: instance.create_time.timestamp() if instance.create_time else 0.0
        )
        for text in client.instances.logs(newest.name, tail=tail, follow=follow):
            if json:
                print_json({"text": text})
            else:
                sys.stdout.write(text)
                sys.stdout.flush()


def _print(instances: Sequence[Instance], *, as_json: bool) -> None:
    if as_json:
        print_json(instances)
    else:
        print_table(COLUMNS, map(cells, instances))


def _show_changes(changes: Iterable[Sequence[Instance]], *, as_json: bool) -> None:
    if as_json:
        for instances in changes:
            print_json({"instances": instances})
        return
    screen = console()
    if not screen.is_terminal:
        for instances in changes:
            screen.print(table(COLUMNS, map(cells, instances), screen.width))
        return
    with Live(console=screen, auto_refresh=False) as live:
        for instances in changes:
            live.update(table(COLUMNS, map(cells, instances), screen.width), refresh=True)


COLUMNS: Final = Columns(
    (
        "INSTANCE", "DEPLOYMENT", "STATE", "FROM", "NODE", "DEVICE", "PID", "MEMORY", "BUSY", "KV CACHE",
        "AGE", "",
    ),
    drop=("KV CACHE", "PID", "MEMORY", "DEVICE", "AGE", "BUSY", "FROM", "NODE", "DEPLOYMENT"),
    fold=("",),
)  # fmt: skip


def cells(instance: Instance) -> tuple[str, ...]:
    """A row of the table of instances."""
    return (
        short(instance.name),
        short(instance.deployment),
        instance.state,
        short(instance.snapshot) or "cold start",
        short(instance.node),
        instance.device,
        str(instance.pid or ""),
        size(instance.memory_bytes),
        busy(instance),
        kv_cache(instance),
        age(instance.create_time),
        instance.failure_message or ("orphan: no such deployment" if instance.orphan else ""),
    )


def busy(instance: Instance) -> str:
    """Answers under way, and how many an instance computes at once, such as ``12/128``."""
    if instance.state != "serving" or instance.capacity is None:
        return ""
    return f"{instance.in_flight}/{instance.capacity.sequences}"


def kv_cache(instance: Instance) -> str:
    """How much of an instance's KV cache is in use, such as ``12% of 183,296``."""
    if instance.state != "serving" or instance.capacity is None or not instance.capacity.kv_tokens:
        return ""
    whole = instance.capacity.kv_tokens
    return f"{instance.load.kv_tokens_used / whole:.0%} of {whole:,}"
