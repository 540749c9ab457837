"""``dumont bench``."""

from __future__ import annotations

import socket
import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from dumont.cli.output import Json, command, console, print_facts, print_json, size

MODEL = "HuggingFaceTB/SmolLM2-135M-Instruct"


@command
def bench(
    store: Annotated[bool, typer.Option("--store", help="Measure the object store.")] = False,
    model: Annotated[str, typer.Option(help="In the model cache of this machine, or a directory.")] = MODEL,
    directory: Annotated[
        Path | None, typer.Option(help="Where snapshots go meanwhile; else a temporary directory.")
    ] = None,
    json: Json = False,
) -> None:
    """Measure this machine, with services of its own. Needs root, and an idle machine to mean anything.

    The store is the one that DUMONT_SNAPSHOTD_STORE_URL and S3_* in the environment name.
    """
    from dumont.bench import run
    from dumont.up import check_installed

    if not store:
        raise typer.BadParameter("say what to measure: --store")
    check_installed()
    with (
        tempfile.TemporaryDirectory(prefix="dumont-bench-", dir=directory) as state,
        console(stderr=True).status("starting") as status,
    ):
        found = run(model, Path(state), _free_port(), status.update)
    if json:
        print_json(found)
        return
    speeds = {
        "upload": found.upload_mb_per_s,
        "store's own write": found.raw_write_mb_per_s,
        "store's own read": found.raw_read_mb_per_s,
    }
    seconds = {
        "restore from the node": found.local_restore_seconds,
        "restore from the store": found.cold_cache_restore_seconds,
        "may take": found.cold_cache_limit_seconds,
    }
    sizes = {name.removesuffix("_bytes"): value for name, value in asdict(found).items() if "bytes" in name}
    print_facts(
        {
            **{name: f"{value:.0f} MB/s" for name, value in speeds.items()},
            **{name: f"{value:.3f} s" for name, value in seconds.items()},
            **{name.replace("_", " "): size(value) for name, value in sizes.items()},
            "snapshotd's memory": f"{found.peak_rss_mb:.0f} MB at most",
        }
    )


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
