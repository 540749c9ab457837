"""The client for callers without an event loop: each method calls its twin in ``dumont.client`` and waits."""

from __future__ import annotations

import asyncio
import concurrent.futures
import functools
import os
import threading
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Coroutine, Iterable, Iterator, Sequence
from types import TracebackType
from typing import Any, Final, Self, TypeVar, Unpack, cast

from dumont.arguments import Checkpoint, DeploySettings, GenerateOptions, Seconds
from dumont.client import AsyncClient, AsyncDeployment
from dumont.connection import check_not_forked, resolve_endpoint
from dumont.errors import Cancelled, FailedPrecondition
from dumont.starting import OnProgress
from dumont.stream import AsyncTextStream
from dumont.types import (
    DeploymentInfo,
    Explanation,
    Generation,
    Instance,
    Node,
    NodeModel,
    Piece,
    Pruned,
    Remainder,
    Snapshot,
    SnapshotProgress,
    StartInfo,
    Verified,
)

UNWIND_SECONDS: Final = 5.0

Result = TypeVar("Result")
Item = TypeVar("Item")


class LoopThread:
    """An event loop in a thread of its own, which works for callers in threads and in notebooks alike."""

    def __init__(self) -> None:
        self._starting = threading.Lock()
        self._running: tuple[int, threading.Thread, asyncio.AbstractEventLoop] | None = None

    def __reduce__(self) -> tuple[Any, ...]:
        return shared_loop, ()

    def _started(self) -> tuple[threading.Thread, asyncio.AbstractEventLoop]:
        """The thread and its loop in this process: a fork does not take a thread along."""
        if self._running is None or self._running[0] != os.getpid():
            check_not_forked()
            with self._starting:
                if self._running is None or self._running[0] != os.getpid():
                    loop = asyncio.new_event_loop()
                    thread = threading.Thread(target=loop.run_forever, name="dumont-client", daemon=True)
                    thread.start()
                    self._running = (os.getpid(), thread, loop)
        return self._running[1:]

    def run(self, work: Coroutine[Any, Any, Result]) -> Result:
        """Wait for ``work``. An interrupt of the waiting thread cancels it and lets it unwind first.

        Raises:
            Cancelled: CALL_CANCELLED, the client was closed meanwhile.
            FailedPrecondition: FORKED_AFTER_USE, or CALLED_FROM_CALLBACK.
        """
        try:
            thread, loop = self._started()
            if threading.current_thread() is thread:
                raise FailedPrecondition(
                    "CALLED_FROM_CALLBACK",
                    "this call comes from a callback of the client itself, such as progress, where it would "
                    "wait for ever; make it elsewhere",
                )
        except FailedPrecondition:
            work.close()
            raise
        ended = threading.Event()

        async def tracked() -> Result:
            try:
                return await work
            finally:
                ended.set()

        future = asyncio.run_coroutine_threadsafe(tracked(), loop)
        try:
            return future.result()
        except concurrent.futures.CancelledError:
            raise Cancelled("CALL_CANCELLED", "the call was cancelled from this side") from None
        except BaseException:
            if future.cancel():
                ended.wait(UNWIND_SECONDS)
            raise

    def iterate(self, source: AsyncIterator[Item]) -> Iterator[Item]:
        """The items of ``source``, an async generator; leaving the loop early closes it."""
        end = object()

        async def step() -> Item | object:
            return await anext(source, end)

        try:
            while (item := self.run(step())) is not end:
                yield cast(Item, item)
        finally:
            self.run(_close(cast(AsyncGenerator[Item, None], source)))


async def _close(source: AsyncGenerator[Any, None]) -> None:
    await source.aclose()


@functools.cache
def shared_loop() -> LoopThread:
    """The loop of all clients in this process: gRPC reports spurious errors when several loops poll."""
    return LoopThread()


class Client:
    """A client of one controller, for callers without an event loop; safe to use from several threads.

    What it offers is what ``AsyncClient`` offers, without ``await``.

    Args:
        endpoint: as for ``AsyncClient``.
    """

    def __init__(self, endpoint: str | None = None) -> None:
        self._loop = shared_loop()
        self._client = AsyncClient(endpoint)
        self.endpoint = self._client.endpoint
        self.deployments = Deployments(self._loop, self._client)
        self.instances = Instances(self._loop, self._client)
        self.snapshots = Snapshots(self._loop, self._client)
        self.nodes = Nodes(self._loop, self._client)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """End running calls and disconnect."""
        self._loop.run(self._client.close())

    def deploy(
        self,
        model: str | os.PathLike[str],
        start_mode: str | None = None,
        checkpoint: Checkpoint | None = None,
        **settings: Unpack[DeploySettings],
    ) -> Deployment:
        """Serve a model, or change how it is served; see ``dumont.deploy``."""
        deployment = self._loop.run(self._client.deploy(model, start_mode, checkpoint, **settings))
        return Deployment(self._loop, deployment)


def deploy(
    model: str | os.PathLike[str],
    start_mode: str | None = None,
    checkpoint: Checkpoint | None = None,
    *,
    endpoint: str | None = None,
    **settings: Unpack[DeploySettings],
) -> Deployment:
    """Serve a model, or change how it is served.

    A deployment of the same name and model is used as it is, or has the settings changed that are given here.

    Args:
        model: a Hugging Face id, or a directory on the nodes.
        start_mode: ``"checkpoint"``, which is that of a new deployment when left out, wakes from the fastest
            tier there is, ``"cold"`` loads every time, ``"warm"`` keeps an instance resident.
        checkpoint: ``enabled``, ``ttl`` (seconds a snapshot outlives its last use; a day when left out),
            ``storage`` (``"local"`` or ``"s3"``) and ``weights`` (``"detached"``, or ``"included"`` for
            snapshots that carry them). With start modes other than ``"checkpoint"``, snapshots are made only
            if this is given, and only on request.
        endpoint: of the controller; ``DUMONT_ENDPOINT`` when left out, else ``localhost:7070``.
        settings: ``name``, ``engine``, ``idle_timeout``, ``park_timeout``, ``prewarm``, ``priority``,
            ``min_instances``, ``max_instances``; see ``dumont.arguments.DeploySettings``.

    Raises:
        InvalidArgument: an argument is wrong; its field is named.
        AlreadyExists: the name belongs to a deployment of another model or engine.
    """
    return _client(resolve_endpoint(endpoint)).deploy(model, start_mode, checkpoint, **settings)


@functools.cache
def _client(endpoint: str) -> Client:
    return Client(endpoint)


class Deployment:
    """A deployed model: ``AsyncDeployment`` without ``await``."""

    def __init__(self, loop: LoopThread, deployment: AsyncDeployment) -> None:
        self._loop = loop
        self._deployment = deployment

    @property
    def name(self) -> str:
        """``deployments/{id}``."""
        return self._deployment.name

    @property
    def info(self) -> DeploymentInfo:
        """What the controller last said of the deployment."""
        return self._deployment.info

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {self.name} {self.info.model} {self.info.state}>"

    def generate(self, prompt: str | None = None, **options: Unpack[GenerateOptions]) -> Generation:
        """The whole answer to a prompt or to ``messages``. The model is started first if it has no instance.

        Args:
            prompt: text to continue, as it is.
            options: see ``dumont.arguments.GenerateOptions``.
        """
        return self._loop.run(self._deployment.generate(prompt, **options))

    def stream(self, prompt: str | None = None, **options: Unpack[GenerateOptions]) -> TextStream:
        """The answer in pieces, as it is written. Takes the arguments of ``generate``."""

        async def call() -> AsyncTextStream:
            return self._deployment.stream(prompt, **options)

        return TextStream(self._loop, self._loop.run(call()))

    def embed(
        self,
        inputs: str | Iterable[str],
        *,
        timeout: Seconds | None = None,
        progress: OnProgress | None = None,
    ) -> list[list[float]]:
        """One vector for each text, in order; a single string gives a list of one.

        Args:
            inputs: one text or several.
            timeout: seconds for the whole answer, including a start.
            progress: called in another thread at each step of a start, if one is needed.
        """
        return self._loop.run(self._deployment.embed(inputs, timeout=timeout, progress=progress))

    def started(self, progress: OnProgress | None = None) -> DeploymentInfo:
        """Wait until no start is under way; see ``AsyncDeployment.started``. A thread runs ``progress``."""
        return self._loop.run(self._deployment.started(progress))

    def refresh(self) -> DeploymentInfo:
        """Ask the controller for ``info`` again."""
        return self._loop.run(self._deployment.refresh())

    def explain(self) -> Explanation:
        """What a request that arrived now would do, and why; see ``Explanation``."""
        return self._loop.run(self._deployment.explain())

    def delete(self) -> None:
        """End the deployment's instances, delete its snapshots and remove it."""
        self._loop.run(self._deployment.delete())


class TextStream:
    """Pieces of text, in order: ``for text in stream``. Leaving the loop early cancels the call."""

    def __init__(self, loop: LoopThread, stream: AsyncTextStream) -> None:
        self._loop = loop
        self._stream = stream

    def __iter__(self) -> Iterator[str]:
        return self._loop.iterate(aiter(self._stream))

    def pieces(self) -> Iterator[Piece]:
        """Each piece with its tokens, which answer it belongs to and how likely it was."""
        return self._loop.iterate(self._stream.pieces())

    @property
    def start(self) -> StartInfo:
        """How the instance was started; waits until it answers."""
        return self._loop.run(self._stream.started())

    @property
    def generation(self) -> Generation | None:
        """The whole answer; None until the stream has ended."""
        return self._stream.generation

    def cancel(self) -> None:
        """End the call if it still runs."""

        async def cancel() -> None:
            self._stream.cancel()

        self._loop.run(cancel())


class Deployments:
    """``AsyncDeployments`` without ``await``."""

    def __init__(self, loop: LoopThread, client: AsyncClient) -> None:
        self._loop = loop
        self._deployments = client.deployments

    def get(self, name: str) -> Deployment:
        """The deployment of this name."""
        return Deployment(self._loop, self._loop.run(self._deployments.get(name)))

    def delete(self, name: str) -> None:
        """End a deployment's instances, delete its snapshots and remove it."""
        self._loop.run(self._deployments.delete(name))

    def list(self) -> list[Deployment]:
        """All deployments."""
        return [Deployment(self._loop, found) for found in self._loop.run(self._deployments.list())]


class Instances:
    """``AsyncInstances`` without ``await``."""

    def __init__(self, loop: LoopThread, client: AsyncClient) -> None:
        self._loop = loop
        self._instances = client.instances

    def get(self, name: str) -> Instance:
        """The instance of this name."""
        return self._loop.run(self._instances.get(name))

    def find(self, target: str) -> Sequence[Instance]:
        """The instance of this name or else the instances of the deployment of this name."""
        return self._loop.run(self._instances.find(target))

    def park(self, name: str) -> Instance:
        """Freeze an instance; its process stays."""
        return self._loop.run(self._instances.park(name))

    def resume(self, name: str) -> Instance:
        """Let a parked instance serve again."""
        return self._loop.run(self._instances.resume(name))

    def migrate(
        self,
        name: str,
        *,
        node: str | None = None,
        gpu: str | None = None,
        cold: bool = False,
        wait: bool = True,
        progress: Callable[[str], None] | None = None,
    ) -> Instance:
        """Bring an instance elsewhere; see ``AsyncInstances.migrate``. Another thread runs ``progress``."""
        return self._loop.run(
            self._instances.migrate(name, node=node, gpu=gpu, cold=cold, wait=wait, progress=progress)
        )

    def stop(self, name: str) -> None:
        """End an instance; its deployment's next request starts another."""
        self._loop.run(self._instances.stop(name))

    def watch(self) -> Iterator[tuple[Instance, ...]]:
        """All instances now, and again after each change."""
        return self._loop.iterate(self._instances.watch())

    def logs(self, name: str, *, tail: int = 0, follow: bool = False) -> Iterator[str]:
        """What an instance's model host printed; see ``AsyncInstances.logs``."""
        return self._loop.iterate(self._instances.logs(name, tail=tail, follow=follow))

    def list(self, deployment: str | None = None) -> list[Instance]:
        """All instances, or those of one deployment."""
        return self._loop.run(self._instances.list(deployment))


class Snapshots:
    """``AsyncSnapshots`` without ``await``."""

    def __init__(self, loop: LoopThread, client: AsyncClient) -> None:
        self._loop = loop
        self._snapshots = client.snapshots

    def create(
        self,
        deployment: str,
        *,
        snapshot_id: str | None = None,
        progress: Callable[[SnapshotProgress], None] | None = None,
    ) -> Snapshot:
        """Capture a deployment; see ``AsyncSnapshots.create``. ``progress`` runs in another thread."""
        return self._loop.run(self._snapshots.create(deployment, snapshot_id=snapshot_id, progress=progress))

    def get(self, name: str) -> Snapshot:
        """The snapshot of this name."""
        return self._loop.run(self._snapshots.get(name))

    def delete(self, name: str) -> None:
        """Delete a snapshot; refused while a restore reads it."""
        self._loop.run(self._snapshots.delete(name))

    def adopt(self, name: str, *, deployment: str | None = None) -> Snapshot:
        """Make an orphan a deployment's snapshot; see ``AsyncSnapshots.adopt``."""
        return self._loop.run(self._snapshots.adopt(name, deployment=deployment))

    def undelete(self, name: str) -> Snapshot:
        """Publish a deleted snapshot again; see ``AsyncSnapshots.undelete``."""
        return self._loop.run(self._snapshots.undelete(name))

    def prefetch(self, name: str, *, node: str | None = None) -> Snapshot:
        """Fetch a published snapshot to a node; see ``AsyncSnapshots.prefetch``."""
        return self._loop.run(self._snapshots.prefetch(name, node=node))

    def verify(self, name: str) -> Verified:
        """Read all of a snapshot; see ``AsyncSnapshots.verify``."""
        return self._loop.run(self._snapshots.verify(name))

    def prune(self, *, dry_run: bool = False) -> Pruned:
        """Delete from the object store what no published snapshot needs; see ``AsyncSnapshots.prune``."""
        return self._loop.run(self._snapshots.prune(dry_run=dry_run))

    def list(self, deployment: str | None = None, *, orphans: bool = False) -> list[Snapshot]:
        """All snapshots, or those of one deployment, or only the orphans among them."""
        return self._loop.run(self._snapshots.list(deployment, orphans=orphans))


class Nodes:
    """``AsyncNodes`` without ``await``."""

    def __init__(self, loop: LoopThread, client: AsyncClient) -> None:
        self._loop = loop
        self._nodes = client.nodes

    def models(self) -> Sequence[NodeModel]:
        """The models that the ready nodes have, once for each node."""
        return self._loop.run(self._nodes.models())

    def get(self, name: str) -> Node:
        """The node of this name."""
        return self._loop.run(self._nodes.get(name))

    def list(self) -> list[Node]:
        """All nodes."""
        return self._loop.run(self._nodes.list())

    def drain(
        self,
        name: str,
        *,
        timeout: float | None = None,
        wait: bool = True,
        progress: Callable[[int, int], None] | None = None,
    ) -> tuple[Remainder, ...]:
        """Empty a node; see ``AsyncNodes.drain``. Another thread runs ``progress``."""
        return self._loop.run(self._nodes.drain(name, timeout=timeout, wait=wait, progress=progress))

    def undrain(self, name: str) -> Node:
        """Let a node take starts again."""
        return self._loop.run(self._nodes.undrain(name))
