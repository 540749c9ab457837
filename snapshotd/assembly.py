"""Build the parts of snapshotd from its settings. Only this module knows which adapter serves which port."""

from __future__ import annotations

import asyncio
import os
import shutil
import sys
from collections.abc import Mapping
from contextlib import AsyncExitStack
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

import psutil
import structlog

from dumont.errors import FailedPrecondition, ResourceExhausted, Unauthenticated, Unavailable
from dumont.state_directory import locked, make_private
from snapshotd import preflight
from snapshotd.adapters.clock import SystemClock
from snapshotd.adapters.criu_shim.pool import ShimPool
from snapshotd.adapters.cuda import backend as cuda_backend
from snapshotd.adapters.cuda import weight_loader
from snapshotd.adapters.cuda.agent import CudaAgent
from snapshotd.adapters.cuda.cli import CudaCheckpoint
from snapshotd.adapters.cuda.nvml import Nvml
from snapshotd.adapters.facts import node_facts
from snapshotd.adapters.models import NodeModels
from snapshotd.adapters.object_store.key_file import KeyFile
from snapshotd.adapters.snapshot_store.base import STAGED
from snapshotd.adapters.snapshot_store.directory import DirectoryStore
from snapshotd.adapters.snapshot_store.sealed import SealedStore
from snapshotd.config import Settings
from snapshotd.engines import environment, installed
from snapshotd.failpoints import Failpoints
from snapshotd.images.format import ImageFormat
from snapshotd.instances.journal import Journal
from snapshotd.instances.manager import Instances
from snapshotd.jobs.context import Deadlines, Gpus, HostSettings, Node
from snapshotd.jobs.observers import Observers
from snapshotd.model import Budgets, Engine
from snapshotd.object_store import SIGNING_KEY, open_repository
from snapshotd.ports import Clock, SnapshotStore
from snapshotd.preflight import Criu
from snapshotd.repository.repository import Repository, check_conditional_create
from snapshotd.repository.signing import Signer
from snapshotd.snapshots.catalog import Remote, Snapshots
from snapshotd.snapshots.upload_journal import UploadJournal
from snapshotd.snapshots.uploads import Uploads
from snapshotd.system.disk import DiskReservations
from snapshotd.system.mounts import UNSEALED_SOURCE
from snapshotd.system.paths import engines_directory
from snapshotd.system.tmpfs import Tmpfs
from snapshotd.weights import mount
from snapshotd.weights.cache import WeightCache
from snapshotd.weights.files import NodeWeightFiles

log = structlog.get_logger(__name__)

# Directories below the state directory.
FOLDERS = ("damaged", "instances", "journal", "shims", "uploads")
# Below the directory of the plain snapshots; no snapshot can have this id.
SEALED = ".sealed"
# Our packages that a model host imports.
HOST_PACKAGES = ("dumont", "model_host")
# Variables that say where Python and the CUDA driver find their files on this machine.
INHERITED = ("LD_LIBRARY_PATH", "PYTHONPATH")
# The start of the daemon waits no longer for an object store that does not answer.
STORE_SECONDS = 10.0
# Of the node's memory; the rest is for snapshots, parked processes and everything else that runs.
WEIGHT_CACHE_SHARE = 0.4
# Of the file system that the node's own snapshots are on.
FILE_SYSTEM_SHARE = 0.25
MODELS_SHARE = 0.5
OWN_FILE_SYSTEM_SHARE = 0.9
# Of the memory of all instances together, what parked ones may take.
PARKED_MEMORY_SHARE = 0.5
# Of the node's memory, what one model host may take: the rest keeps the node itself alive.
HOST_MEMORY_SHARE = 0.9


@dataclass(frozen=True)
class Parts:
    """The parts of a snapshotd without its server.

    Attributes:
        cuda: None on a node that uses no GPU.
        loader: None if model hosts copy their weights to a GPU themselves.
    """

    node: Node
    instances: Instances
    snapshots: Snapshots
    observers: Observers
    hosts: ShimPool
    weights: NodeWeightFiles
    cuda: CudaAgent | CudaCheckpoint | None
    loader: weight_loader.LoaderProcess | None

    async def start(self) -> None:
        """Take over what an earlier daemon left running, and start the processes that are kept ready."""
        if self.snapshots.remote is not None:
            self.snapshots.remote.uploads.resume()
        await self.instances.take_over()
        self.hosts.prepare()
        if self.cuda is not None:
            await self.cuda.prepare()
        if self.loader is not None:
            # Not awaited: until the loader is ready, model hosts copy their weights themselves.
            self.loader.begin()


def assemble(settings: Settings, criu: Criu, failpoints: Failpoints, stack: AsyncExitStack) -> Parts:
    """Build the parts of a snapshotd; nothing runs yet.

    Args:
        stack: closes the parts again. The instances go on.

    Raises:
        FailedPrecondition, InvalidArgument: a setting is wrong, or something that it names cannot be used.
    """
    prepare_state(settings.state_dir)
    stack.enter_context(locked(settings.state_dir / "lock", "snapshotd", settings.listen))
    journal = Journal(settings.state_dir / "journal")
    # The snapshot store and the weight cache may mount something. They do so before the first shim starts,
    # because a shim copies the node's mounts into its own namespace.
    store = open_snapshot_store(settings, failpoints, journal)
    stack.callback(unmount_unsealed, settings, journal)
    repository = open_repository(settings, failpoints)
    if repository is not None:
        stack.callback(repository.close)
    nvml = Nvml.open() if settings.device != "cpu" else None
    weight_cache = open_weight_cache(settings, on_gpus=nvml is not None)
    weights = NodeWeightFiles(settings.state_dir / "weights.json", weight_cache)
    stack.push_async_callback(weights.close)
    clock = SystemClock()
    loader = open_loader(weight_cache, clock) if nvml and weight_cache and settings.weight_loader else None
    if loader is not None:
        stack.push_async_callback(loader.close)
    cuda, unsuspendable = open_cuda(settings, nvml.driver) if nvml else (None, "")
    if cuda is not None:
        stack.push_async_callback(cuda.close)
    engines = find_engines(settings.engine_python, engines_directory())
    hosts = ShimPool(
        settings.state_dir / "shims",
        criu.binary,
        criu.pycriu,
        weight_cache.directory if weight_cache else None,
        host_memory(settings),
        {name: engine.directory for name, engine in engines.items()},
    )
    stack.push_async_callback(hosts.close)
    models = NodeModels(settings.models_dir, models_limit(settings))
    node = Node(
        hosts=hosts,
        store=store,
        models=models,
        weights=weights,
        images=ImageFormat(criu.pycriu),
        clock=clock,
        settings=host_settings(settings, engines),
        facts=node_facts(criu.version),
        directory=settings.state_dir,
        threads=settings.threads,
        deadlines=Deadlines(
            start=settings.start_timeout_seconds,
            load=settings.start_timeout_seconds,
            drain=settings.drain_seconds,
        ),
        disk=DiskReservations(settings.disk_reserve_bytes),
        gpus=Gpus(tuple(nvml.gpus()), nvml.facts(), nvml, cuda, loader, unsuspendable=unsuspendable)
        if nvml
        else None,
    )
    observers = Observers()
    instances = Instances(node, journal, observers, failpoints)
    models.in_use = lambda: {instance.model for instance in instances.all()}
    snapshots = open_snapshots(store, repository, settings, instances)
    return Parts(node, instances, snapshots, observers, hosts, weights, cuda, loader)


def host_memory(settings: Settings) -> int:
    """Bytes of memory that one model host may take; 0 for no limit."""
    if settings.host_memory_bytes is not None:
        return settings.host_memory_bytes
    return int(psutil.virtual_memory().total * HOST_MEMORY_SHARE)


def budgets(settings: Settings, weights: NodeWeightFiles) -> Budgets:
    """How much this node has for instances, snapshots and weights."""
    cache = weights.cache.budget if weights.cache else 0
    instances = settings.instance_memory_bytes
    if instances is None:
        instances = int((psutil.virtual_memory().total - cache) * HOST_MEMORY_SHARE)
    parked = settings.parked_memory_bytes
    if parked is None:
        parked = int(instances * PARKED_MEMORY_SHARE)
    return Budgets(
        instances, parked, snapshot_limit(settings), cache, settings.cache_dir or settings.state_dir
    )


def prepare_state(directory: Path) -> None:
    """Make the state directory and its folders, private to root.

    Raises:
        FailedPrecondition: STATE_UNUSABLE.
    """
    for folder in (directory, *(directory / name for name in FOLDERS)):
        make_private(folder)


def find_engines(named: str, directory: Path) -> dict[str, Engine]:
    """The engines of this node that run under an interpreter of their own.

    Args:
        named: the interpreters that the settings name.
        directory: of the environments that ``dumont engine install`` has made.

    Raises:
        InvalidArgument: INVALID_ENGINE_PYTHON.
        FailedPrecondition: ENGINE_UNUSABLE, one that the settings name does not work.
    """
    engines = {
        name: environment.examine(name, python)
        for name, python in environment.parse_interpreters(named).items()
    }
    for name, one in installed.used(installed.found(directory)).items():
        if name in engines:
            continue
        try:
            engines[name] = environment.examine(name, one.python)
        except FailedPrecondition as error:
            # Nobody asked for this one here.
            log.warning("engine_ignored", engine=name, error=error.message)
    for engine in engines.values():
        log.info("engine_found", engine=engine.name, version=engine.version, python=str(engine.python))
    return engines


def host_packages(directory: Path) -> Path:
    """Make the directory with our packages that a model host under another interpreter imports.

    They are beside this node's own packages, which must not be found there.
    """
    directory.mkdir(mode=0o700, exist_ok=True)
    for package in HOST_PACKAGES:
        spec = find_spec(package)
        assert spec is not None
        assert spec.submodule_search_locations is not None
        target, link = next(iter(spec.submodule_search_locations)), directory / package
        if not link.is_symlink() or str(link.readlink()) != target:
            # Another daemon's model hosts may be importing at this moment.
            fresh = directory / f".{package}"
            fresh.unlink(missing_ok=True)
            fresh.symlink_to(target)
            fresh.replace(link)
    return directory


def host_settings(settings: Settings, engines: Mapping[str, Engine] | None = None) -> HostSettings:
    """How model hosts run on this node."""
    environment = {
        "PATH": os.environ.get("PATH", os.defpath),
        "HOME": "/root",
        "LANG": "C.UTF-8",
        # Memory that was touched once is dumped and restored for ever, so malloc gets few arenas.
        "MALLOC_ARENA_MAX": "2",
        # On a CPU, torch keeps compiled code for each number of tokens that a step ever had. With the usual
        # 1,024 pieces of it, a process grew by 200 MB; those of the last dozens of numbers suffice.
        "ONEDNN_PRIMITIVE_CACHE_CAPACITY": "128",
        "TOKENIZERS_PARALLELISM": "false",
        # Compute threads that spin while they wait make a busy machine forty times slower, and a quiet one
        # hardly faster.
        "GOMP_SPINCOUNT": "10000",
        # One queue to the GPU instead of eight takes a third off the time to checkpoint and restore a
        # context (0.16 and 0.11 s instead of 0.24 and 0.16 on an H100), and inference fills one queue.
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
        engines=engines or {},
        packages=host_packages(settings.state_dir / "packages") if engines else Path(),
    )


# The node's own snapshots


def open_snapshot_store(
    settings: Settings, failpoints: Failpoints, journal: Journal
) -> DirectoryStore | SealedStore:
    """Open the store of this node's own snapshots: plain image files, or encrypted ones.

    Args:
        journal: names the instances that this daemon takes over. Some of them map unsealed image files.

    Raises:
        FailedPrecondition: ENCRYPTION_KEY_MISSING, KEY_FILE_UNUSABLE, PLAIN_SNAPSHOTS or
            UNSEALED_MEMORY_UNUSABLE.
    """
    root = settings.cache_dir or settings.state_dir / "snapshots"
    plain = DirectoryStore(root, settings.threads)
    # Even if plain snapshots are not allowed: this removes unfinished ones, which are readable.
    plain.open()
    if not settings.encrypt_local:
        unmount_unsealed(settings, journal)
        if sealed := _snapshots_in(root / SEALED):
            log.warning("encrypted_snapshots_ignored", snapshots=sealed, remedy="--encrypt-local")
        return plain
    if settings.encryption_key_file is None:
        raise FailedPrecondition(
            "ENCRYPTION_KEY_MISSING", "--encrypt-local needs a key; name it with --encryption-key-file"
        )
    _refuse_plain_snapshots(root)
    unsealed = _unsealed(settings)
    store = SealedStore(
        root / SEALED,
        DirectoryStore(unsealed.directory, settings.threads),
        Signer.open(settings.state_dir / SIGNING_KEY),
        KeyFile(settings.encryption_key_file),
        settings.threads,
        failpoints,
    )
    _mount_unsealed(unsealed)
    for instance in journal.read():
        if instance.snapshot:
            store.pin(instance.id, instance.snapshot)
    store.open()
    return store


def unmount_unsealed(settings: Settings, journal: Journal) -> None:
    """Unmount the tmpfs to which snapshots are unsealed, unless an instance goes on: its shim has this very
    mount, and its next capture is staged there.
    """
    if not journal.read():
        _unsealed(settings).unmount()


def _unsealed(settings: Settings) -> Tmpfs:
    """The tmpfs that holds the image files of sealed snapshots while they are in use."""
    return Tmpfs(UNSEALED_SOURCE, settings.state_dir / "unsealed")


def _mount_unsealed(unsealed: Tmpfs) -> None:
    try:
        unsealed.directory.mkdir(mode=0o700, exist_ok=True)
        if not unsealed.mounted() and (why := unsealed.mount("mode=0700", "noswap")):
            log.warning(
                "unsealed_snapshots_may_be_swapped", error=why, remedy="use no swap, or encrypted swap"
            )
    except OSError as error:
        raise FailedPrecondition(
            "UNSEALED_MEMORY_UNUSABLE",
            f"no tmpfs can be mounted at {unsealed.directory} for snapshots in use: {error}; run without "
            "--encrypt-local",
            metadata={"directory": str(unsealed.directory)},
        ) from error


def _refuse_plain_snapshots(root: Path) -> None:
    # Directories without a manifest count: their files are readable all the same.
    plain = sorted(path.name for path in root.iterdir() if path.name != SEALED)
    if plain:
        raise FailedPrecondition(
            "PLAIN_SNAPSHOTS",
            f"{root} holds snapshots that are not encrypted: {', '.join(plain)}; start without "
            "--encrypt-local and delete them, then start with it",
            metadata={"snapshots": ",".join(plain)},
        )


def _snapshots_in(sealed: Path) -> list[str]:
    return sorted(path.name for path in sealed.glob("*") if not path.name.startswith(STAGED))


# The object store


async def check_repository(repository: Repository) -> None:
    """Refuse an object store in which two nodes could overwrite each other's snapshots.

    Raises:
        FailedPrecondition: the store has no conditional writes, or does not exist.
    """
    # A store that is away is no reason to refuse: the node serves without it, and nothing is published before
    # this check has passed.
    try:
        async with asyncio.timeout(STORE_SECONDS):
            await check_conditional_create(repository.objects)
    except TimeoutError:
        log.warning("object_store_unusable", reason="STORE_UNAVAILABLE", error="no answer")
    except (Unavailable, Unauthenticated, ResourceExhausted) as error:
        log.warning("object_store_unusable", reason=error.reason, error=error.message)


def models_limit(settings: Settings) -> int:
    """Bytes that models fetched from the hub may take; 0 for no limit."""
    if settings.models_bytes is not None:
        return settings.models_bytes
    existing = next(path for path in (settings.models_dir, *settings.models_dir.parents) if path.exists())
    return int(shutil.disk_usage(existing).total * MODELS_SHARE)


def snapshot_limit(settings: Settings) -> int:
    """Bytes that the node's own snapshots may take; 0 for no limit."""
    if settings.cache_bytes is not None:
        return settings.cache_bytes
    directory = settings.cache_dir or settings.state_dir
    share = OWN_FILE_SYSTEM_SHARE if settings.cache_dir and directory.is_mount() else FILE_SYSTEM_SHARE
    return int(shutil.disk_usage(directory).total * share)


def open_snapshots(
    store: SnapshotStore, repository: Repository | None, settings: Settings, instances: Instances
) -> Snapshots:
    """The snapshots of this node and of its object store, if it has one."""
    tasks: set[asyncio.Task[None]] = set()

    def published(snapshot: str) -> None:
        # From now on the snapshot may be evicted from this node.
        task = asyncio.create_task(snapshots.enforce_budget(), name=f"enforce budget after {snapshot}")
        tasks.add(task)
        task.add_done_callback(tasks.discard)

    remote = None
    if repository is not None:
        journal = UploadJournal(settings.state_dir / "uploads")
        remote = Remote(repository, Uploads(store, repository, journal, published))
    snapshots = Snapshots(
        store,
        remote,
        settings.state_dir / "damaged",
        snapshot_limit(settings),
        instances,
        instances.node.disk,
    )
    return snapshots


# Weights


def open_weight_cache(settings: Settings, on_gpus: bool) -> WeightCache | None:
    """Mount the node's weight cache; None if it has none.

    Raises:
        FailedPrecondition: WEIGHT_CACHE_UNUSABLE.
    """
    budget = settings.weight_cache_bytes
    if budget is None:
        # On the CPU a mapped file is as good as a cached one: its pages are in the kernel's cache.
        budget = int(psutil.virtual_memory().total * WEIGHT_CACHE_SHARE) if on_gpus else 0
    directory = settings.state_dir / "weights"
    if not budget:
        # An earlier daemon may have mounted one. Instances that map its files keep them alive.
        mount.unmount(directory)
        return None
    cache = WeightCache(directory, budget, settings.threads)
    cache.open()
    log.info("weight_cache_opened", bytes=budget)
    return cache


def open_cuda(settings: Settings, driver: str) -> tuple[CudaAgent | CudaCheckpoint | None, str]:
    """What suspends CUDA processes; or None, and why nothing does: models then start cold on the node's GPUs.

    Args:
        driver: version of the NVIDIA driver.

    Raises:
        FailedPrecondition: NO_CUDA_BACKEND, the one that the settings name is not here.
    """
    asked_for = settings.cuda_backend != "auto"
    why = "" if asked_for else preflight.driver_problem(driver)
    if not why:
        try:
            return cuda_backend.choose(settings.cuda_backend, settings.cuda_checkpoint), ""
        except FailedPrecondition as error:
            if asked_for:
                raise
            why = error.message
    log.warning("gpu_processes_not_suspended", why=why)
    return None, why


def open_loader(cache: WeightCache, clock: Clock) -> weight_loader.LoaderProcess | None:
    """The loader of the cache's weights, not started yet; None if its package is not installed."""
    if not weight_loader.available():
        log.warning("weight_loader_unavailable", error="the package cuda-bindings is not installed")
        return None
    loader = weight_loader.LoaderProcess(cache.directory, clock, cache.digests)
    cache.on_eviction = loader.files_left
    cache.on_fill = loader.file_came
    return loader
