"""How fast the object store is on this machine, measured with a snapshotd that runs for it.

Everything is measured in one run: what the store itself reads and writes, an upload, restores that find the
snapshot on the node and one that must fetch it, and what a second capture and a second instance add.
"""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import shutil
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Final

from dumont.benchmarks import programs
from dumont.benchmarks.daemon import Snapshotd
from dumont.errors import DumontError, FailedPrecondition, Internal
from dumont.snapshotd.v1 import snapshot_service_pb2

STORE_VARIABLE: Final = "DUMONT_SNAPSHOTD_STORE_URL"
RESTORES: Final = 3
# A model of another deployment, if this machine has one.
SECOND_MODEL: Final = "sentence-transformers/all-MiniLM-L6-v2"
# A cold-cache restore may take as long as reading its bytes from the store, and a quarter more.
ALLOWANCE: Final = 1.25

Say = Callable[[str], None]


@dataclass(frozen=True)
class StoreBench:
    """Megabytes are 10^6 bytes; a duration is the median of several.

    ``bytes_fetched`` are those that came over the wire for a cold-cache restore, which is within its limit
    when it takes no longer than ``cold_cache_limit_seconds``: a local one and these bytes at the store's own
    speed, and a quarter of that. ``cold_cache_limit_image_seconds`` counts the image's bytes in their place:
    what a store that kept the image as it is would have to send. The raw speeds are those of the very objects
    that a fetch reads. Only the snapshot is fetched then: like for a local restore, the node has run the
    model before. ``new_node_restore_seconds`` is the same on a node that started a second ago and knows
    nothing: its weights are read, and what drives its GPUs starts, meanwhile. ``cold_cache_cpu_seconds`` are
    those of cores that snapshotd spent on a cold-cache restore; a store on the same machine needs its own
    beside them.

    ``stored_bytes`` are those of the first snapshot, ``second_capture_bytes`` what another of the same
    instance added, ``second_instance_bytes`` what one of the same model, newly loaded, did, and
    ``second_deployment_bytes`` what one of ``second_model`` did. ``peak_rss_mb`` is the largest of the
    snapshotds that ran.
    """

    upload_mb_per_s: float
    raw_write_mb_per_s: float
    raw_read_mb_per_s: float
    local_restore_seconds: float
    cold_cache_restore_seconds: float
    cold_cache_limit_seconds: float
    within_limit: bool
    cold_cache_limit_image_seconds: float
    within_limit_image: bool
    fetch_seconds: float
    new_node_restore_seconds: float
    cold_cache_cpu_seconds: float
    cores: int
    bytes_fetched: int
    image_bytes: int
    data_bytes: int
    stored_bytes: int
    second_capture_bytes: int
    second_instance_bytes: int
    second_deployment_bytes: int
    second_model: str
    peak_rss_mb: float


def run(model: str, directory: Path, port: int, say: Say) -> StoreBench:
    """Measure the store that ``DUMONT_SNAPSHOTD_STORE_URL`` names, under a prefix that is emptied afterwards.

    Args:
        model: a Hugging Face id in the node's cache, or a directory.
        directory: an empty one, for the state of the snapshotd that is started.
        port: where it listens, on loopback.
        say: told what is being done.

    Raises:
        FailedPrecondition: no store is configured, or snapshotd does not start.
        DumontError: what snapshotd says.
    """
    base = os.environ.get(STORE_VARIABLE, "")
    if not base:
        raise FailedPrecondition(
            "OBJECT_STORE_NOT_CONFIGURED",
            f"set {STORE_VARIABLE} to s3://BUCKET/PREFIX or file:///DIRECTORY, and for a bucket S3_ENDPOINT, "
            "S3_ACCESS_KEY and S3_SECRET_KEY",
        )
    prefix = f"{base.rstrip('/')}/bench-{secrets.token_hex(4)}"

    def daemon(cache: str) -> Snapshotd:
        return Snapshotd(
            directory, f"127.0.0.1:{port}",
            "--cache-dir", str(directory / cache), "--store-url", prefix, "--store-grace-seconds", "0",
        )  # fmt: skip

    with daemon("cache") as node:
        say(f"loading {model} and capturing it twice")
        node.start("one", model)
        node.capture("one", "first")
        say("uploading")
        upload_seconds = _timed(partial(node.publish, "first"))
        first = node.stored("first")
        node.capture("one", "second")
        node.publish("second")
        second = node.stored("second")
        say("loading and capturing another instance, and another model")
        node.stop("one")
        third = capture_new(node, "other", model, "third")
        try:
            second_model, fourth = SECOND_MODEL, capture_new(node, "unlike", SECOND_MODEL, "fourth")
        except DumontError:
            second_model, fourth = model, capture_new(node, "unlike-again", model, "fourth")
        say("restoring from the node")
        local = [_timed(partial(node.restore, f"local-{number}", "first")) for number in range(RESTORES)]
        peak = node.peak_rss()
    say("measuring the store itself")
    raw = _measure(prefix, "first")
    cold: list[_Cold] = []
    new: list[_Cold] = []
    for number in range(2 * RESTORES):
        known = number % 2 == 1
        with daemon(f"empty-{number}") as node:
            if known:
                say("loading the model on a node without the snapshot")
                node.start("warm", model)
                node.stop("warm")
            say("restoring from the store")
            (cold if known else new).append(_restore_cold(node))
            peak = max(peak, node.peak_rss())
            node.stop("cold")
            if number == 2 * RESTORES - 1:
                for snapshot in ("first", "second", "third", "fourth"):
                    node.delete(snapshot)
                # A deletion is remembered for the grace time, which is none: the first prune takes what it
                # covered.
                node.prune()
                node.prune()
        shutil.rmtree(directory / f"empty-{number}", ignore_errors=True)
    local_seconds = statistics.median(local)
    cold_seconds = statistics.median(one.seconds for one in cold)
    allowed = ALLOWANCE / 1e6 / raw["raw_read_mb_per_s"]
    limit, image_limit = (local_seconds + size * allowed for size in (first.stored_bytes, first.data_bytes))
    return StoreBench(
        upload_mb_per_s=first.data_bytes / 1e6 / upload_seconds,
        raw_write_mb_per_s=raw["raw_write_mb_per_s"],
        raw_read_mb_per_s=raw["raw_read_mb_per_s"],
        local_restore_seconds=local_seconds,
        cold_cache_restore_seconds=cold_seconds,
        cold_cache_limit_seconds=limit,
        within_limit=cold_seconds <= limit,
        cold_cache_limit_image_seconds=image_limit,
        within_limit_image=cold_seconds <= image_limit,
        fetch_seconds=statistics.median(one.fetch_seconds for one in cold),
        new_node_restore_seconds=statistics.median(one.seconds for one in new),
        cold_cache_cpu_seconds=statistics.median(one.cpu_seconds for one in cold),
        cores=len(os.sched_getaffinity(0)),
        bytes_fetched=first.stored_bytes,
        image_bytes=first.image_bytes,
        data_bytes=first.data_bytes,
        stored_bytes=first.stored_bytes,
        second_capture_bytes=second.unique_bytes,
        second_instance_bytes=third.unique_bytes,
        second_deployment_bytes=fourth.unique_bytes,
        second_model=second_model,
        peak_rss_mb=peak / 1e6,
    )


@dataclass(frozen=True)
class _Cold:
    """A restore that had to fetch its snapshot; ``cpu_seconds`` count all threads of the daemon."""

    seconds: float
    fetch_seconds: float
    cpu_seconds: float


def capture_new(
    node: Snapshotd, instance: str, model: str, snapshot: str
) -> snapshot_service_pb2.StoredSnapshot:
    """Load a model, capture and publish it, and end it; returns the space of its snapshot in the store.

    When that fails, both ids are free again.
    """
    node.start(instance, model)
    try:
        node.capture(instance, snapshot)
        node.publish(snapshot)
        return node.stored(snapshot)
    except DumontError:
        with contextlib.suppress(DumontError):
            node.delete(snapshot)
        raise
    finally:
        node.stop(instance)


def _restore_cold(node: Snapshotd) -> _Cold:
    node.settle()
    cpu, before = node.cpu_seconds(), time.monotonic()
    fetched = node.restore("cold", "first")
    seconds = time.monotonic() - before
    fetch = next(phase.duration for phase in fetched.phases if phase.name == "fetch")
    return _Cold(seconds, fetch.ToNanoseconds() / 1e9, node.cpu_seconds() - cpu)


def _timed(work: Callable[[], object]) -> float:
    before = time.monotonic()
    work()
    return time.monotonic() - before


def _measure(store: str, snapshot: str) -> dict[str, float]:
    command = [sys.executable, "-m", "snapshotd.object_store", "measure", snapshot]
    done = programs.run(command, env={**os.environ, STORE_VARIABLE: store})
    try:
        speeds: dict[str, float] = json.loads(done.stdout)
    except ValueError:
        raise Internal("MEASURE_FAILED", f"the store could not be measured: {done.stderr[-500:]}") from None
    return speeds
