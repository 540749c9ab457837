"""What a fleet has left behind on the machine and in its bucket, once everything in it was deleted."""

from __future__ import annotations

import contextlib
from pathlib import Path

import psutil
from minio import Minio

from tests.helpers.s3_server import BUCKET
from tests.nemesis.fleet import Fleet, descendants

CGROUPS = Path("/sys/fs/cgroup")
# What a node keeps for the next daemon: who it is, whose commands it takes, what it knows of models, the
# links to the packages of its model hosts, and its empty folders.
KEPT = frozenset(
    {
        "controller", "lock", "node_id", "sessions", "signing.key", "signing.pub", "weights.json",
        "packages/dumont", "packages/model_host",
    }
)  # fmt: skip


def in_nodes(fleet: Fleet) -> list[str]:
    """Files and directories of the nodes that belong to nothing; the services have ended."""
    found = []
    for node in fleet.nodes:
        for path in sorted(node.state_dir.rglob("*")):
            inside = path.relative_to(node.state_dir)
            folder = path.is_dir() and len(inside.parts) == 1
            if not folder and str(inside) not in KEPT:
                found.append(f"file of node {node.name}: {inside}")
    found += [f"temporary file: {path.name}" for path in sorted((fleet.root / "tmp").iterdir())]
    return found


def on_machine(fleet: Fleet) -> list[str]:
    """Processes, mounts and cgroups; only the store may run yet."""
    found = [
        f"process {process.pid}: {described(process)}"
        for process in descendants()
        if process.pid != fleet.services["store"].pid
    ]
    mounts = Path("/proc/self/mountinfo").read_text().splitlines()
    found += [f"mount: {line.split()[4]}" for line in mounts if str(fleet.root) in line]
    # Of version 2, alone or beside version 1, and of each hierarchy of version 1.
    for depth in ("", "*/"):
        groups = CGROUPS.glob(f"{depth}dumont/shim-*/")
        found += [f"cgroup: {path}" for path in sorted(groups) if path.name in fleet.shims]
    return found


def in_bucket(fleet: Fleet) -> list[str]:
    """Objects, and uploads in parts that nobody will end."""
    ports = fleet.store_ports
    client = Minio(
        ports.endpoint.removeprefix("http://"), ports.access_key, ports.secret_key, secure=False,
        region="us-east-1",
    )  # fmt: skip
    found = [f"object: {item.object_name}" for item in client.list_objects(BUCKET, recursive=True)]
    uploads = client._list_multipart_uploads(BUCKET).uploads
    return found + [f"unfinished upload: {upload.object_name}" for upload in uploads]


def described(process: psutil.Process) -> str:
    with contextlib.suppress(psutil.Error):
        return f"{' '.join(process.cmdline())[:200]} ({process.status()})"
    return "gone"
