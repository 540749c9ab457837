"""Wires snapshotd together and runs it."""

from __future__ import annotations

import asyncio
import os
import sys
from contextlib import AsyncExitStack
from pathlib import Path

import psutil
import structlog
from prometheus_client import start_http_server
from pydantic import ValidationError
from pydantic_settings import CliApp

from dumont.errors import DumontError, FailedPrecondition, ResourceExhausted, Unauthenticated, Unavailable
from dumont.rpc import operations as rpc_operations
from dumont.rpc.logs import configure_logs
from dumont.rpc.server import ServerLimits, add_standard_services, bind, new_server, run_until_signalled
from dumont.snapshotd.v1 import instance_service_pb2_grpc, node_service_pb2_grpc, snapshot_service_pb2_grpc
from dumont.state_directory import locked, make_private
from snapshotd import preflight
from snapshotd.adapters.clock import SystemClock
from snapshotd.adapters.criu_shim.pool import ShimPool
from snapshotd.adapters.cuda import backend as cuda_backend
from snapshotd.adapters.cuda import weight_loader
from snapshotd.adapters.cuda.nvml import Nvml
from snapshotd.adapters.facts import node_facts
from snapshotd.adapters.models import NodeModels
from snapshotd.adapters.registration import keep_registered
from snapshotd.config import Settings, node_id
from snapshotd.failpoints import Failpoints
from snapshotd.images.format import ImageFormat
from snapshotd.instances.journal import Journal
from snapshotd.instances.manager import Instances
from snapshotd.jobs.context import Deadlines, HostSettings, Node
from snapshotd.jobs.observers import Observers
from snapshotd.local_store import give_back_memory, open_store
from snapshotd.object_store import open_repository
from snapshotd.ports import Clock, SnapshotStore
from snapshotd.repository.repository import Repository, check_conditional_create
from snapshotd.service.inference import Inference
from snapshotd.service.instances import InstanceServicer
from snapshotd.service.node import NodeServicer
from snapshotd.service.ownership import Ownership, OwnershipInterceptor
from snapshotd.service.snapshots import SnapshotServicer
from snapshotd.snapshots.catalog import Snapshots
from snapshotd.snapshots.upload_journal import UploadJournal
from snapshotd.snapshots.uploads import Uploads
from snapshotd.system import malloc
from snapshotd.weights import mount
from snapshotd.weights.cache import WeightCache
from snapshotd.weights.files import NodeWeightFiles

log = structlog.get_logger(__name__)

DOMAIN = "snapshotd.dumont"
SERVICES = tuple(
    f"dumont.snapshotd.v1.{name}"
    for name in ("InferenceService", "InstanceService", "SnapshotService", "NodeService")
)
# Where Python and the CUDA driver find their files on this machine.
INHERITED = ("LD_LIBRARY_PATH", "PYTHONPATH")
# A store that is away keeps nobody from being served for longer.
STORE_SECONDS = 10.0
# The rest is for snapshots, parked processes and what else runs.
WEIGHT_CACHE_SHARE = 0.4
FOLDERS = ("damaged", "instances", "journal", "shims", "uploads")


async def run(settings: Settings) -> None:
    """Run until SIGTERM or SIGINT.

    Raises:
        FailedPrecondition: this machine, the state directory or the address cannot be used.
    """
    criu, findings = preflight.find_criu()
    findings = [*preflight.check_machine(gpu=settings.device != "cpu"), *findings]
    problems = preflight.problems(findings)
    if criu is None or problems:
        raise FailedPrecondition("MACHINE_UNFIT", "; ".join(problems))
    async with AsyncExitStack() as stack:
        prepare_state(settings.state_dir)
        stack.enter_context(locked(settings.state_dir / "lock", "snapshotd", settings.listen))
        failpoints = Failpoints.parse(settings.failpoints)
        journal = Journal(settings.state_dir / "journal")
        # This and the weight cache may mount something: before any shim takes the node's mounts over into its
        # own namespace.
        store = open_store(settings, failpoints, journal)
        stack.callback(give_back_memory, settings, journal)
        repository = open_repository(settings, failpoints)
        if repository is not None:
            stack.callback(repository.close)
            await check_store(repository)
        nvml = Nvml.open() if settings.device != "cpu" else None
        weight_cache = open_weight_cache(settings, on_gpus=nvml is not None)
        weights = NodeWeightFiles(settings.state_dir / "weights.json", weight_cache)
        stack.push_async_callback(weights.close)
        hosts = ShimPool(
            settings.state_dir / "shims",
            criu.binary,
            criu.pycriu,
            weight_cache.directory if weight_cache else None,
        )
        clock = SystemClock()
        loader = (
            open_loader(weight_cache, clock) if nvml and weight_cache and settings.weight_loader else None
        )
        if loader:
            stack.push_async_callback(loader.close)
        cuda = cuda_backend.choose(settings.cuda_backend, settings.cuda_checkpoint) if nvml else None
        node = Node(
            hosts=hosts,
            store=store,
            models=NodeModels(settings.models_dir),
            weights=weights,
            images=ImageFormat(criu.pycriu),
            clock=clock,
            settings=host_settings(settings),
            facts=node_facts(criu.version),
            directory=settings.state_dir,
            threads=settings.threads,
            deadlines=Deadlines(drain=settings.drain_seconds),
            cuda=cuda,
            gpus=tuple(nvml.gpus()) if nvml else (),
            gpu_facts=nvml.facts() if nvml else {},
            gpu_status=nvml,
            loader=loader,
        )
        if cuda is not None:
            stack.push_async_callback(cuda.close)
        observers = Observers()
        instances = Instances(node, journal, observers, failpoints)
        snapshots = connect(store, repository, settings, instances)
        operations = rpc_operations.Operations(DOMAIN)
        inference = Inference(instances)
        node_servicer = NodeServicer(node, node_id(settings), findings, settings.store_url)

        ownership = Ownership(settings.state_dir / "controller")
        server = new_server(DOMAIN, ServerLimits(), (OwnershipInterceptor(ownership),))
        health = add_standard_services(server, (*SERVICES, rpc_operations.SERVICE_NAME))
        server.add_generic_rpc_handlers((inference.handler(),))
        instance_service_pb2_grpc.add_InstanceServiceServicer_to_server(
            InstanceServicer(instances, snapshots, operations, observers, health.draining), server
        )
        snapshot_service_pb2_grpc.add_SnapshotServiceServicer_to_server(
            SnapshotServicer(node, snapshots, operations), server
        )
        node_service_pb2_grpc.add_NodeServiceServicer_to_server(node_servicer, server)
        operations.register(server)
        endpoint = bind(server, settings.listen)

        stack.push_async_callback(hosts.close)
        if settings.stop_instances_on_exit:
            stack.push_async_callback(instances.stop_all)
        stack.push_async_callback(instances.detach)
        if snapshots.uploads is not None:
            stack.push_async_callback(snapshots.uploads.close)
            snapshots.uploads.resume()
        await instances.take_over()
        hosts.prepare()
        if cuda is not None:
            await cuda.prepare()
        if loader:
            # Nobody waits for it: until it is ready, model hosts copy their weights themselves.
            loader.begin()
        stack.push_async_callback(inference.close)
        stack.push_async_callback(operations.close)
        await server.start()
        await health.set_all(True)
        if settings.metrics_listen:
            show_metrics(settings.metrics_listen)
        log.info("snapshotd serves", endpoint=endpoint, node=node_servicer.node_id, criu=criu.version)
        if settings.controller:
            registration = asyncio.create_task(
                keep_registered(
                    settings.controller,
                    settings.advertise or endpoint,
                    node_servicer,
                    settings.heartbeat_seconds,
                    ownership,
                    settings.accept_controller,
                )
            )
            stack.callback(registration.cancel)
        await run_until_signalled(server, health, settings.drain_seconds)


def open_weight_cache(settings: Settings, on_gpus: bool) -> WeightCache | None:
    """The node's weight cache, mounted; None: it has none.

    Raises:
        FailedPrecondition: WEIGHT_CACHE_UNUSABLE.
    """
    budget = settings.weight_cache_bytes
    if budget is None:
        # On the CPU a mapped file is as good as a cached one: its pages are the kernel's cache.
        budget = int(psutil.virtual_memory().total * WEIGHT_CACHE_SHARE) if on_gpus else 0
    directory = settings.state_dir / "weights"
    if not budget:
        # Of an earlier daemon; instances that use it keep it alive.
        mount.unmount(directory)
        return None
    cache = WeightCache(directory, budget, settings.threads)
    cache.open()
    log.info("weights are cached", bytes=budget)
    return cache


def open_loader(cache: WeightCache, clock: Clock) -> weight_loader.LoaderProcess | None:
    """The loader of this cache's weights, not started yet; None: it has nothing to drive GPUs with."""
    if not weight_loader.available():
        log.warning("model hosts copy their weights themselves: the package cuda-bindings is not installed")
        return None
    loader = weight_loader.LoaderProcess(cache.directory, clock, cache.digests)
    cache.on_eviction = loader.files_left
    cache.on_fill = loader.file_came
    return loader


async def check_store(repository: Repository) -> None:
    """Refuse a store in which two nodes could publish over each other.

    Raises:
        FailedPrecondition: it is such a store, or it does not exist.
    """
    # A node serves without its store; nothing is published before the check has passed.
    try:
        async with asyncio.timeout(STORE_SECONDS):
            await check_conditional_create(repository.objects)
    except TimeoutError:
        log.warning("object store cannot be used now", reason="STORE_UNAVAILABLE", error="it does not answer")
    except (Unavailable, Unauthenticated, ResourceExhausted) as error:
        log.warning("object store cannot be used now", reason=error.reason, error=error.message)


def connect(
    store: SnapshotStore, repository: Repository | None, settings: Settings, instances: Instances
) -> Snapshots:
    """The node's snapshots and those of its object store, if there is one."""
    tasks: set[asyncio.Task[None]] = set()

    def published(snapshot: str) -> None:
        # Only now may it leave the node.
        task = asyncio.create_task(snapshots.enforce_budget(), name=f"keep budget after {snapshot}")
        tasks.add(task)
        task.add_done_callback(tasks.discard)

    uploads = None
    if repository is not None:
        journal = UploadJournal(settings.state_dir / "uploads")
        uploads = Uploads(store, repository, journal, published)
    snapshots = Snapshots(
        store,
        repository,
        uploads,
        settings.state_dir / "damaged",
        settings.cache_bytes,
        instances.pinned,
        instances.mapped,
    )
    return snapshots


def show_metrics(address: str) -> None:
    """Open the Prometheus page.

    Raises:
        FailedPrecondition: the address cannot be used.
    """
    host, _, port = address.rpartition(":")
    try:
        start_http_server(int(port), host or "127.0.0.1")
    except (OSError, OverflowError, ValueError) as error:
        raise FailedPrecondition(
            "ADDRESS_UNUSABLE",
            f"metrics cannot be shown on {address}: {error}",
            metadata={"address": address},
        ) from error


def prepare_state(directory: Path) -> None:
    """Make the state directory and its folders, private to root.

    Raises:
        FailedPrecondition: STATE_UNUSABLE.
    """
    for folder in (directory, *(directory / name for name in FOLDERS)):
        make_private(folder)


def host_settings(settings: Settings) -> HostSettings:
    """How model hosts run here."""
    environment = {
        "PATH": os.environ.get("PATH", os.defpath),
        "HOME": "/root",
        "LANG": "C.UTF-8",
        # Few arenas: memory that was touched once is dumped and restored for ever.
        "MALLOC_ARENA_MAX": "2",
        "TOKENIZERS_PARALLELISM": "false",
        # Compute threads that spin while they wait make a busy machine forty times slower, and a quiet one
        # hardly faster.
        "GOMP_SPINCOUNT": "10000",
        # One queue to the GPU instead of eight: a third less time to checkpoint and restore a context, and
        # inference fills one. 0.16 and 0.11 s against 0.24 and 0.16 on an H100.
        "CUDA_DEVICE_MAX_CONNECTIONS": "1",
        "HF_HUB_OFFLINE": "1",
    }
    environment |= {name: os.environ[name] for name in INHERITED if name in os.environ}
    if settings.host_threads:
        environment["OMP_NUM_THREADS"] = str(settings.host_threads)
    return HostSettings(
        command=(sys.executable, "-m", "model_host"),
        environment=environment,
        device=settings.device,
        max_queue=settings.max_queue,
        max_new_tokens=settings.max_new_tokens,
    )


def main() -> None:
    """The command ``dumont-snapshotd``."""
    try:
        settings = CliApp.run(Settings)
        configure_logs(settings.log_format)
        malloc.give_back_large_blocks()
        asyncio.run(run(settings))
    except ValidationError as error:
        raise SystemExit(f"dumont-snapshotd: {error}") from None
    except DumontError as error:
        raise SystemExit(f"dumont-snapshotd: {error.message} ({error.reason})") from None
    except ValueError as error:
        raise SystemExit(f"dumont-snapshotd: {error}") from None


if __name__ == "__main__":
    main()
