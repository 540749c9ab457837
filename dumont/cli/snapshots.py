"""``dumont snapshot``: the commands for snapshots."""

from __future__ import annotations

import sys
from typing import Annotated, Final

import typer

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
    print_facts,
    print_json,
    print_table,
    short,
    size,
    span,
)
from dumont.types import Snapshot, SnapshotProgress, StoredSnapshot

app = typer.Typer(help="Make, list, check and delete snapshots.", no_args_is_help=True)

Name = Annotated[
    str, typer.Argument(metavar="SNAPSHOT", help="The snapshot.", autocompletion=completion.snapshots)
]


@app.command()
@command
def create(
    deployment: Annotated[str, typer.Argument(help="The deployment.", autocompletion=completion.deployments)],
    snapshot_id: Annotated[str | None, typer.Option("--id", help="Else chosen by the controller.")] = None,
    json: Json = False,
    endpoint: Endpoint = None,
) -> None:
    """Capture a deployment, from an instance that no prompt has entered, in place of its earlier snapshot.

    Ctrl-C gives up.
    """
    with sync.Client(endpoint) as client, console(stderr=True).status("starting") as status:
        replaced: list[str] = []

        def show(step: SnapshotProgress) -> None:
            status.update(f"{step.stage} {short(step.instance)}")
            replaced[:] = step.replaces

        snapshot = client.snapshots.create(deployment, snapshot_id=snapshot_id, progress=show)
    for name in replaced:
        sys.stderr.write(f"{short(name)} is replaced, and deleted\n")
    print_snapshot(snapshot, as_json=json)


@app.command()
@command
def ls(
    deployment: Annotated[
        str | None, typer.Option(help="Only this deployment's.", autocompletion=completion.deployments)
    ] = None,
    orphans: Annotated[bool, typer.Option("--orphans", help="Only those of no deployment.")] = False,
    json: Json = False,
    endpoint: Endpoint = None,
) -> None:
    """List snapshots. The controller keeps an orphan until somebody adopts or deletes it."""
    with sync.Client(endpoint) as client:
        found = client.snapshots.list(deployment, orphans=orphans)
        if deployment and not found:
            client.deployments.get(deployment)  # raises where there is none
    if json:
        print_json(found)
        return
    print_table(COLUMNS, map(cells, found))


COLUMNS: Final = Columns(
    ("SNAPSHOT", "DEPLOYMENT", "STATE", "NODE", "KEPT", "SIZE", "AGE", "LAST USE"),
    drop=("LAST USE", "AGE", "NODE", "DEPLOYMENT", "SIZE", "KEPT"),
)


def cells(snapshot: Snapshot) -> tuple[str, ...]:
    """A row of the table of snapshots."""
    return (
        short(snapshot.name),
        short(snapshot.deployment),
        state(snapshot),
        short(snapshot.node),
        places(snapshot),
        size(snapshot.size_bytes),
        age(snapshot.create_time),
        age(snapshot.last_use_time),
    )


@app.command()
@command
def inspect(name: Name, json: Json = False, endpoint: Endpoint = None) -> None:
    """Show a snapshot: its files, its sizes, and what must be equal where it is restored."""
    with sync.Client(endpoint) as client:
        snapshot = client.snapshots.get(name)
    if json:
        print_json(snapshot)
        return
    print_facts(describe(snapshot))
    if snapshot.compatibility:
        console().print()
        print_table(Columns(("MUST BE EQUAL", ""), fold=("",)), sorted(snapshot.compatibility.items()))
    if snapshot.files:
        console().print()
        print_table(
            Columns(("FILE", "SIZE", "BLAKE3"), fold=("BLAKE3",)),
            ((file.name, size(file.size_bytes), file.digest) for file in snapshot.files),
        )


@app.command()
@command
def adopt(
    name: Name,
    deployment: Annotated[
        str | None, typer.Option(help="By default the one that the snapshot names.")
    ] = None,
    json: Json = False,
    endpoint: Endpoint = None,
) -> None:
    """Make an orphan a deployment's snapshot. The deployment is created if it does not exist."""
    with sync.Client(endpoint) as client:
        snapshot = client.snapshots.adopt(name, deployment=deployment)
    print_snapshot(snapshot, as_json=json)


@app.command()
@command
def undelete(name: Name, json: Json = False, endpoint: Endpoint = None) -> None:
    """Publish a deleted snapshot again, as an orphan, within the object store's grace time."""
    with sync.Client(endpoint) as client:
        snapshot = client.snapshots.undelete(name)
    print_snapshot(snapshot, as_json=json)


@app.command()
@command
def prefetch(
    name: Name,
    node: Annotated[str | None, typer.Option(help="By default the node that a start would choose.")] = None,
    json: Json = False,
    endpoint: Endpoint = None,
) -> None:
    """Fetch a published snapshot to a node, so that the next start there is a local one."""
    with sync.Client(endpoint) as client, console(stderr=True).status("fetching"):
        snapshot = client.snapshots.prefetch(name, node=node)
    print_snapshot(snapshot, as_json=json)


@app.command()
@command
def verify(name: Name, json: Json = False, endpoint: Endpoint = None) -> None:
    """Read all of a snapshot, on its node and in the object store. Exit status 1: it is damaged."""
    with sync.Client(endpoint) as client:
        found = client.snapshots.verify(name)
    if json:
        print_json(found)
        return
    print_facts(
        {
            "snapshot": short(name),
            "on its node": f"{size(found.local_bytes)} read, intact" if found.local_bytes else "not there",
            "object store": f"{size(found.published_bytes)} read, intact"
            if found.published_bytes
            else "not there",
        }
    )


@app.command()
@command
def prune(
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only print what would be deleted.")] = False,
    json: Json = False,
    endpoint: Endpoint = None,
) -> None:
    """Delete from the object store what no published snapshot needs."""
    with sync.Client(endpoint) as client:
        found = client.snapshots.prune(dry_run=dry_run)
    if json:
        print_json(found)
        return
    for name in found.objects if dry_run else ():
        console().print(name)
    verb = "would delete" if dry_run else "deleted"
    kept = f"{size(found.kept_bytes)} of chunks remain"
    console().print(f"{verb} {found.object_count} objects, {size(found.size_bytes)}; {kept}")


@app.command()
@command
def rm(
    names: Annotated[list[str], typer.Argument(metavar="SNAPSHOT...", autocompletion=completion.snapshots)],
    json: Json = False,
    endpoint: Endpoint = None,
) -> None:
    """Delete snapshots on all nodes and in the object store."""

    def delete(name: str) -> None:
        client.snapshots.delete(name)
        if json:
            print_json({"deleted": short(name)})

    with sync.Client(endpoint) as client:
        each(names, delete, as_json=json)


def print_snapshot(snapshot: Snapshot, *, as_json: bool) -> None:
    """Print a snapshot."""
    if as_json:
        print_json(snapshot)
    else:
        print_facts(describe(snapshot))


def describe(snapshot: Snapshot) -> dict[str, str]:
    """A snapshot as names and values for people."""
    return {
        "snapshot": short(snapshot.name),
        "deployment": short(snapshot.deployment),
        "model": snapshot.model,
        "node": short(snapshot.node),
        "state": state(snapshot),
        "quarantined": snapshot.quarantine_reason,
        "kept": places(snapshot),
        "size": size(snapshot.size_bytes),
        **(describe_stored(snapshot.stored) if snapshot.stored else {}),
        "source paused": span(snapshot.source_pause_seconds),
        "made": snapshot.create_time.isoformat() if snapshot.create_time else "",
        "last use": snapshot.last_use_time.isoformat() if snapshot.last_use_time else "",
        "expires": snapshot.expire_time.isoformat() if snapshot.expire_time else "",
        "manifest": snapshot.manifest_digest,
    }


def state(snapshot: Snapshot) -> str:
    """A snapshot's state, and whether it is an orphan."""
    return f"{snapshot.state}, orphan" if snapshot.orphan else snapshot.state


def places(snapshot: Snapshot) -> str:
    """The places where a snapshot is kept."""
    kept = ("node" if snapshot.local else "", "store" if snapshot.published else "")
    return "+".join(filter(None, kept))


def describe_stored(stored: StoredSnapshot) -> dict[str, str]:
    """A snapshot's space in the object store as names and values for people."""
    shared = stored.stored_bytes - stored.unique_bytes
    share = stored.stored_bytes / stored.image_bytes if stored.image_bytes else 0.0
    return {
        "without zeros": size(stored.data_bytes),
        "stored": f"{size(stored.stored_bytes)} in {stored.chunk_count} chunks, {share:.1%} of the image",
        "shared": f"{size(shared)} with other snapshots",
        "encrypted": "yes" if stored.encrypted else "no",
        "signed by": stored.signer,
    }
