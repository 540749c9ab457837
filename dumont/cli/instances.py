"""``dumont ps``, ``park``, ``resume``, ``migrate``, ``stop`` and ``logs``."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterable, Sequence
from typing import Annotated, Final

import typer
from rich.live import Live

from dumont import sync
from dumont.cli import completion
from dumont.cli.output import (
    Columns,
    Endpoint,
    Json,
    age,
    command,
    console,
    each,
    print_json,
    print_table,
    short,
    size,
    table,
)
from dumont.errors import InvalidArgument, NotFound
from dumont.types import Instance

Targets = Annotated[
    list[str],
    typer.Argument(
        metavar="TARGET...",
        help="Instances, or deployments for all of their instances.",
        autocompletion=completion.targets,
    ),
]


@command
def ps(
    deployment: Annotated[
        str | None, typer.Option(help="List only this deployment's.", autocompletion=completion.deployments)
    ] = None,
    watch: Annotated[bool, typer.Option("--watch", help="Show each change until interrupted.")] = False,
    why: Annotated[
        bool, typer.Option("--why", help="Say why each is where it is, and to whom it yields.")
    ] = False,
    json: Json = False,
    endpoint: Endpoint = None,
) -> None:
    """List instances."""
    with sync.Client(endpoint) as client:
        if watch:
            if deployment:
                client.deployments.get(deployment)
            wanted = short(deployment) if deployment else None
            changes = (
                [instance for instance in instances if wanted in (None, short(instance.deployment))]
                for instances in client.instances.watch()
            )
            _show_changes(changes, as_json=json)
            return
        found = client.instances.list(deployment)
        if deployment and not found:
            client.deployments.get(deployment)  # raises where there is none
    if json:
        print_json(found)
    elif why:
        print_table(
            Columns(
                ("INSTANCE", "STATE", "NODE", "GPU MEMORY", "MEMORY", "WHY"),
                drop=("MEMORY", "GPU MEMORY", "NODE"),
                fold=("WHY",),
            ),
            (
                (
                    short(instance.name),
                    instance.state,
                    short(instance.node),
                    size(instance.gpu_bytes) if instance.gpu else "",
                    size(instance.ram_bytes),
                    "; ".join(instance.reasons),
                )
                for instance in found
            ),
        )
    else:
        _print(found, as_json=False)


@command
def park(targets: Targets, json: Json = False, endpoint: Endpoint = None) -> None:
    """Freeze instances. Their processes stay, and go on at the next request."""
    with sync.Client(endpoint) as client:
        _change(client, targets, "parked", client.instances.park, as_json=json)


@command
def resume(targets: Targets, json: Json = False, endpoint: Endpoint = None) -> None:
    """Let parked instances serve again."""
    with sync.Client(endpoint) as client:
        _change(client, targets, "serving", client.instances.resume, as_json=json)


def _change(
    client: sync.Client,
    targets: Sequence[str],
    state: str,
    change: Callable[[str], Instance],
    *,
    as_json: bool,
) -> None:
    """Change the instances of all targets that are not in ``state`` yet, and print them."""
    changed: list[Instance] = []

    def one(target: str) -> None:
        changed.extend(
            instance if instance.state == state else change(instance.name)
            for instance in client.instances.find(target)
        )

    try:
        each(targets, one, as_json=as_json)
    finally:
        if changed:
            _print(changed, as_json=as_json)


@command
def migrate(
    instance: Annotated[str, typer.Argument(help="The instance.", autocompletion=completion.instances)],
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
def stop(targets: Targets, json: Json = False, endpoint: Endpoint = None) -> None:
    """End instances; the next request to their deployment starts another."""

    def one(target: str) -> None:
        for instance in client.instances.find(target):
            client.instances.stop(instance.name)
            if json:
                print_json({"stopped": short(instance.name)})

    with sync.Client(endpoint) as client:
        each(targets, one, as_json=json)


@command
def logs(
    target: Annotated[
        str,
        typer.Argument(
            help="An instance, or a deployment for its newest one.", autocompletion=completion.targets
        ),
    ],
    follow: Annotated[
        bool,
        typer.Option(
            "--follow", "-f", help="Keep printing as it prints; with a deployment, its next instances too."
        ),
    ] = False,
    tail: Annotated[
        int, typer.Option(min=0, help="Begin with so many of the last lines; 0: all that are kept.")
    ] = 0,
    json: Json = False,
    endpoint: Endpoint = None,
) -> None:
    """Print what an instance's model host has printed."""

    def show(instance: str, text: str) -> None:
        if json:
            print_json({"instance": short(instance), "text": text})
        else:
            sys.stdout.write(text)
            sys.stdout.flush()

    def note(text: str) -> None:
        if not json:
            sys.stderr.write(f"{text}\n")

    with sync.Client(endpoint) as client:
        if follow:
            _follow(client, target, tail, show, note)
            return
        newest = max(client.instances.find(target), key=_age_key)
        pieces = list(client.instances.logs(newest.name, tail=tail))
        for text in pieces:
            show(newest.name, text)
        if not pieces:
            note(f"{short(newest.name)} has printed nothing so far")


def _follow(
    client: sync.Client,
    target: str,
    tail: int,
    show: Callable[[str, str], None],
    note: Callable[[str], None],
) -> None:
    """Print an instance's log until it ends, or the logs of a deployment's instances, one after the other."""
    instance = _instance(client, target)
    deployment = None if instance else client.deployments.get(target).name
    while True:
        if deployment is not None:
            instance = _next_instance(client, deployment, instance)
        if instance is None:
            return
        if deployment is not None:
            note(f"--- {short(instance.name)} ---")
        printed = False
        # An instance that is gone has taken along what it had printed.
        with contextlib.suppress(NotFound):
            for text in client.instances.logs(instance.name, tail=tail, follow=True):
                printed = True
                show(instance.name, text)
        if not printed:
            note(f"{short(instance.name)} has printed nothing")
        if deployment is None:
            return
        # What a next instance prints is new from its beginning.
        tail = 0


def _instance(client: sync.Client, target: str) -> Instance | None:
    """The instance of this name, if there is one."""
    try:
        return None if target.startswith("deployments/") else client.instances.get(target)
    except NotFound:
        return None


def _next_instance(client: sync.Client, deployment: str, last: Instance | None) -> Instance | None:
    """The newest instance of a deployment, as soon as there is one that is newer than the last."""
    for instances in client.instances.watch():
        newest = max((i for i in instances if i.deployment == deployment), key=_age_key, default=None)
        if newest is not None and (last is None or _age_key(newest) > _age_key(last)):
            return newest
    return None


def _age_key(instance: Instance) -> float:
    return instance.create_time.timestamp() if instance.create_time else 0.0


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
        note(instance),
    )


def note(instance: Instance) -> str:
    """What a reader of the table must know of an instance; usually empty."""
    if instance.failure_message:
        return instance.failure_message
    if instance.orphan:
        return "orphan: no such deployment"
    if instance.draining:
        return "was migrated, and ends after its last answer"
    if instance.capacity is not None and instance.capacity.unbatched_reason:
        return f"computes one answer at a time: {instance.capacity.unbatched_reason}"
    return ""


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
