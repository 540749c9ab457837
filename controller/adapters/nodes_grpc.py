"""The ``Nodes`` port over snapshotd's API."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from typing import Any, TypeVar

import grpc
import structlog
from google.longrunning import operations_pb2, operations_pb2_grpc
from google.protobuf.message import Message

from controller import convert
from controller.model import NodeModel, Pruned, Report, ResolvedModel, Snapshot, Verified, Weights
from controller.ports import NODE_UNAVAILABLE, Change, ListedSnapshots, Removed, Synchronized
from dumont.errors import Aborted, Cancelled, DeadlineExceeded, DumontError, Internal, Unavailable
from dumont.rpc.status import from_rpc_error, from_status
from dumont.rpc.structs import to_struct
from dumont.sessions import SESSION_KEY, SESSIONS_KEY, Sessions
from dumont.snapshotd.v1 import (
    instance_service_pb2 as instances,
)
from dumont.snapshotd.v1 import (
    instance_service_pb2_grpc,
    node_service_pb2_grpc,
    snapshot_service_pb2_grpc,
)
from dumont.snapshotd.v1 import (
    node_service_pb2 as nodes,
)
from dumont.snapshotd.v1 import (
    snapshot_service_pb2 as snapshots,
)

# Seconds. Short calls answer from the node's memory; long ones freeze, resume or end processes.
SHORT = 10.0
LONG = 120.0
POLL = 30.0
PAGE = 500
OPTIONS = (
    ("grpc.max_receive_message_length", -1),
    ("grpc.max_send_message_length", -1),
    # A node that restarts is found again within a second, not after gRPC's usual two minutes.
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.max_reconnect_backoff_ms", 1000),
    # Notices a node that vanished without closing its connection.
    ("grpc.keepalive_time_ms", 20000),
    ("grpc.keepalive_timeout_ms", 10000),
)
WEIGHTS = {Weights.DETACHED: instances.WEIGHTS_DETACHED, Weights.INCLUDED: instances.WEIGHTS_INCLUDED}
INFERENCE = "/dumont.snapshotd.v1.InferenceService/"

M = TypeVar("M", bound=Message)

log = structlog.get_logger()


class _Link:
    """Two connections to one node and its stubs: one for commands, one for answers.

    A connection takes a limited number of calls at once, and a command must not wait for answers to end.
    """

    def __init__(
        self, endpoint: str, user_agent: str, interceptors: Sequence[grpc.aio.ClientInterceptor]
    ) -> None:
        self.endpoint = endpoint
        options = (*OPTIONS, ("grpc.primary_user_agent", user_agent))
        self.channel = grpc.aio.insecure_channel(endpoint, options=options, interceptors=interceptors)
        own = ("grpc.use_local_subchannel_pool", 1)
        self.answers = grpc.aio.insecure_channel(endpoint, options=(*options, own))
        # The first request must not wait for it.
        self.answers.get_state(try_to_connect=True)
        self.instances: Any = instance_service_pb2_grpc.InstanceServiceStub(self.channel)
        self.snapshots: Any = snapshot_service_pb2_grpc.SnapshotServiceStub(self.channel)
        self.nodes: Any = node_service_pb2_grpc.NodeServiceStub(self.channel)
        self.operations: Any = operations_pb2_grpc.OperationsStub(self.channel)
        # Bytes in, bytes out: a token stream is not decoded on its way.
        self.generate: Any = self.answers.unary_stream(INFERENCE + "Generate")
        self.embed: Any = self.answers.unary_unary(INFERENCE + "Embed")
        self.closed = False

    async def close(self) -> None:
        self.closed = True
        await self.channel.close()
        await self.answers.close()


class GrpcNodes:
    """A channel to each node, kept while the node's endpoint stays the same.

    Args:
        controller: the id of this controller's fleet; a node of another fleet refuses its calls.
        session: the number of this controller's session; 0: it has none.
        sessions: which sessions live, as far as is known when it is called.
        on_ended: called with the number of a session that a node knows, when the node refuses commands of
            this one because it has ended.
    """

    def __init__(
        self,
        controller: str,
        session: int = 0,
        sessions: Callable[[], Sessions] = Sessions,
        on_ended: Callable[[int], None] = lambda _: None,
    ) -> None:
        self._user_agent = f"dumont-controller/{controller}"
        self._session = session
        self._sessions = sessions
        self._on_ended = on_ended
        self._links: dict[str, _Link] = {}
        self._connections = 0
        # The operations under way, by the instance whose job they are.
        self._waiting_for: dict[str, str] = {}

    async def connect(self, node: str, endpoint: str) -> None:
        known = self._links.get(node)
        if known is not None and known.endpoint == endpoint:
            return
        self._connections += 1
        fences = _fences(f"{self._session}.{self._connections}", self._sessions) if self._session else ()
        self._links[node] = _Link(endpoint, self._user_agent, fences)
        if known is not None:
            await known.close()

    async def disconnect(self, node: str) -> None:
        link = self._links.pop(node, None)
        if link is not None:
            await link.close()

    async def close(self) -> None:
        for node in list(self._links):
            await self.disconnect(node)

    async def list_models(self, node: str) -> tuple[NodeModel, ...]:
        found: list[NodeModel] = []
        request = nodes.ListModelsRequest(page_size=PAGE)
        while True:
            async with self._errors(node) as link:
                answer = await link.nodes.ListModels(request, timeout=SHORT)
            found += [
                NodeModel(one.model, node, one.engine, one.weights_size_bytes, one.problem)
                for one in answer.models
            ]
            request.page_token = answer.next_page_token
            if not request.page_token:
                return tuple(found)

    async def resolve_model(self, node: str, model: str, engine: str) -> ResolvedModel:
        request = nodes.ResolveModelRequest(model=model, engine=engine)
        async with self._errors(node) as link:
            found = await link.nodes.ResolveModel(request, timeout=LONG)
        return ResolvedModel(found.model, found.engine, found.weights_size_bytes)

    async def watch(self, node: str) -> AsyncGenerator[Change]:
        async with self._errors(node) as link:
            call = link.instances.WatchInstances(instances.WatchInstancesRequest())
            try:
                async for response in call:
                    kind = response.WhichOneof("change")
                    if kind == "instance":
                        yield convert.report(response.instance)
                    elif kind == "removed":
                        yield Removed(convert.last_segment(response.removed))
                    elif kind == "synchronized":
                        yield Synchronized()
            finally:
                call.cancel()
            raise _silent(node, "it ended the watch")

    async def get_instance(self, node: str, instance: str) -> Report:
        request = instances.GetInstanceRequest(name=f"instances/{instance}")
        async with self._errors(node) as link:
            return convert.report(await link.instances.GetInstance(request, timeout=SHORT))

    async def list_snapshots(self, node: str) -> ListedSnapshots:
        found: list[Snapshot] = []
        token = ""
        while True:
            request = snapshots.ListSnapshotsRequest(page_size=PAGE, page_token=token)
            async with self._errors(node) as link:
                page = await link.snapshots.ListSnapshots(request, timeout=SHORT)
            found += [convert.snapshot(node, snapshot) for snapshot in page.snapshots]
            token = page.next_page_token
            if not token:
                return ListedSnapshots(tuple(found), page.store_silence)

    async def start(
        self,
        node: str,
        instance: str,
        deployment: str,
        model: str,
        engine: str,
        weights: Weights,
        engine_options: Mapping[str, Any],
        gpu: str = "",
    ) -> Report:
        request = instances.StartInstanceRequest(
            instance_id=instance,
            deployment=f"deployments/{deployment}",
            model=model,
            engine=engine,
            weights=WEIGHTS[weights],
            gpu=gpu,
            engine_options=to_struct(engine_options),
        )
        async with self._errors(node) as link:
            begun = link.instances.StartInstance(request, timeout=LONG)
            return convert.report(await self._outcome(link, begun, instances.Instance(), instance))

    async def restore(
        self,
        node: str,
        instance: str,
        deployment: str,
        snapshot: str,
        manifest_digest: str,
        gpu: str = "",
    ) -> Report:
        request = instances.RestoreInstanceRequest(
            instance_id=instance,
            deployment=f"deployments/{deployment}",
            snapshot=f"snapshots/{snapshot}",
            manifest_digest=manifest_digest,
            gpu=gpu,
        )
        async with self._errors(node) as link:
            begun = link.instances.RestoreInstance(request, timeout=LONG)
            return convert.report(await self._outcome(link, begun, instances.Instance(), instance))

    async def stage(self, node: str, instance: str) -> str:
        if (name := self._waiting_for.get(instance)) is None:
            return ""
        async with self._errors(node) as link:
            request = operations_pb2.GetOperationRequest(name=name)
            operation = await link.operations.GetOperation(request, timeout=SHORT)
        metadata = instances.OperationMetadata()
        operation.metadata.Unpack(metadata)
        return metadata.stage

    async def capture(self, node: str, instance: str, snapshot: str) -> Snapshot:
        request = instances.CaptureInstanceRequest(name=f"instances/{instance}", snapshot_id=snapshot)
        async with self._errors(node) as link:
            begun = link.instances.CaptureInstance(request, timeout=LONG)
            return convert.snapshot(node, await self._outcome(link, begun, snapshots.Snapshot(), instance))

    async def park(self, node: str, instance: str) -> Report:
        request = instances.ParkInstanceRequest(name=f"instances/{instance}")
        async with self._errors(node) as link:
            return convert.report(await link.instances.ParkInstance(request, timeout=LONG))

    async def resume(self, node: str, instance: str, gpu: str = "") -> Report:
        request = instances.ResumeInstanceRequest(name=f"instances/{instance}", gpu=gpu)
        async with self._errors(node) as link:
            return convert.report(await link.instances.ResumeInstance(request, timeout=LONG))

    async def move(self, node: str, instance: str, gpu: str) -> Report:
        request = instances.MoveInstanceRequest(name=f"instances/{instance}", gpu=gpu)
        async with self._errors(node) as link:
            return convert.report(await link.instances.MoveInstance(request, timeout=LONG))

    async def stop(self, node: str, instance: str) -> None:
        request = instances.StopInstanceRequest(name=f"instances/{instance}")
        async with self._errors(node) as link:
            await link.instances.StopInstance(request, timeout=LONG)

    async def get_snapshot(self, node: str, snapshot: str) -> Snapshot:
        request = snapshots.GetSnapshotRequest(name=f"snapshots/{snapshot}")
        async with self._errors(node) as link:
            return convert.snapshot(node, await link.snapshots.GetSnapshot(request, timeout=LONG))

    async def publish(self, node: str, snapshot: str) -> Snapshot:
        request = snapshots.PublishSnapshotRequest(name=f"snapshots/{snapshot}")
        async with self._errors(node) as link:
            begun = link.snapshots.PublishSnapshot(request, timeout=LONG)
            return convert.snapshot(node, await self._outcome(link, begun, snapshots.Snapshot()))

    async def prefetch(self, node: str, snapshot: str, manifest_digest: str) -> Snapshot:
        request = snapshots.PrefetchSnapshotRequest(
            name=f"snapshots/{snapshot}", manifest_digest=manifest_digest
        )
        async with self._errors(node) as link:
            begun = link.snapshots.PrefetchSnapshot(request, timeout=LONG)
            return convert.snapshot(node, await self._outcome(link, begun, snapshots.Snapshot()))

    async def verify(self, node: str, snapshot: str) -> Verified:
        request = snapshots.VerifySnapshotRequest(name=f"snapshots/{snapshot}")
        async with self._errors(node) as link:
            begun = link.snapshots.VerifySnapshot(request, timeout=LONG)
            found = await self._outcome(link, begun, snapshots.VerifySnapshotResponse())
        return Verified(found.local_bytes, found.published_bytes)

    async def prune(self, node: str, dry_run: bool) -> Pruned:
        request = snapshots.PruneSnapshotsRequest(dry_run=dry_run)
        async with self._errors(node) as link:
            begun = link.snapshots.PruneSnapshots(request, timeout=LONG)
            found = await self._outcome(link, begun, snapshots.PruneSnapshotsResponse())
        return Pruned(tuple(found.objects), found.object_count, found.size_bytes, found.kept_bytes)

    async def delete_snapshot(self, node: str, snapshot: str) -> None:
        request = snapshots.DeleteSnapshotRequest(name=f"snapshots/{snapshot}")
        async with self._errors(node) as link:
            await link.snapshots.DeleteSnapshot(request, timeout=LONG)

    async def undelete_snapshot(self, node: str, snapshot: str) -> Snapshot:
        request = snapshots.UndeleteSnapshotRequest(name=f"snapshots/{snapshot}")
        async with self._errors(node) as link:
            found = await link.snapshots.UndeleteSnapshot(request, timeout=LONG)
        return convert.snapshot(node, found)

    async def stream_logs(
        self, node: str, instance: str, tail_lines: int, follow: bool
    ) -> AsyncGenerator[bytes]:
        request = instances.StreamInstanceLogsRequest(
            name=f"instances/{instance}", tail_lines=tail_lines, follow=follow
        )
        async with self._errors(node) as link:
            call = link.instances.StreamInstanceLogs(request)
            try:
                async for response in call:
                    yield response.data
            finally:
                call.cancel()

    def generate(self, node: str, request: bytes, timeout: float | None) -> _Frames:
        link = self._link(node)
        return _Frames(node, link, link.generate(request, timeout=timeout))

    async def embed(self, node: str, request: bytes, timeout: float | None) -> bytes:
        async with self._errors(node, callers_deadline=True) as link:
            answer: bytes = await link.embed(request, timeout=timeout)
            return answer

    @asynccontextmanager
    async def _errors(self, node: str, callers_deadline: bool = False) -> AsyncIterator[_Link]:
        """Turn gRPC's errors into ours. An error without details does not come from snapshotd itself.

        Args:
            node: its id.
            callers_deadline: whether the deadline is the caller's, rather than ours for the node to meet.
        """
        link = self._link(node)
        try:
            yield link
        except (grpc.aio.UsageError, grpc.aio.AioRpcError, asyncio.CancelledError) as error:
            translated = _translate(node, link, error, callers_deadline)
            if isinstance(translated, DumontError) and translated.reason == "SESSION_ENDED":
                # Not the caller's fault: another controller answers.
                self._on_ended(int(translated.metadata.get("highest", "0")))
                translated = Aborted(
                    translated.reason, translated.message, metadata=translated.metadata, retry_after=1.0
                )
            raise translated from error

    def _link(self, node: str) -> _Link:
        link = self._links.get(node)
        if link is None:
            raise _silent(node, "it is not connected")
        return link

    async def _outcome(
        self,
        link: _Link,
        begun: Awaitable[operations_pb2.Operation],
        response: M,
        instance: str = "",
    ) -> M:
        """Wait for an operation's response by long polls; cancelling the wait cancels it on the node.

        Args:
            link: to the node.
            begun: the call that begins it.
            response: an empty message of its response's type.
            instance: whose job it is, so that ``stage`` finds it.
        """
        beginning = asyncio.ensure_future(begun)
        try:
            operation = await asyncio.shield(beginning)
            if instance:
                self._waiting_for[instance] = operation.name
            request = operations_pb2.WaitOperationRequest(name=operation.name)
            request.timeout.FromMilliseconds(int(POLL * 1000))
            while not operation.done:
                operation = await link.operations.WaitOperation(request, timeout=POLL + SHORT)
        except asyncio.CancelledError:
            await self._cancel(link, beginning)
            raise
        finally:
            self._waiting_for.pop(instance, None)
        if operation.HasField("error"):
            raise from_status(operation.error)
        if not operation.response.Unpack(response):
            raise Internal(
                "UNEXPECTED_RESPONSE",
                f"{operation.name} answered with {operation.response.type_url}, which is not its type",
            )
        return response

    async def _cancel(self, link: _Link, beginning: asyncio.Future[operations_pb2.Operation]) -> None:
        # Cancelling needs the operation's name, so an answer that is still on its way is waited for.
        try:
            request = operations_pb2.CancelOperationRequest(name=(await beginning).name)
            await link.operations.CancelOperation(request, timeout=SHORT)
        except (grpc.RpcError, grpc.aio.UsageError, asyncio.CancelledError) as error:
            log.info("cancel_operation_failed", error=repr(error))


class _Frames:
    """An answer under way; see ``ports.Frames``."""

    def __init__(self, node: str, link: _Link, call: Any) -> None:
        self._node = node
        self._link = link
        self._call = call
        self._cancelled = False

    async def read(self) -> bytes | None:
        try:
            frame: Any = await self._call.read()
        except (grpc.aio.UsageError, grpc.aio.AioRpcError, asyncio.CancelledError) as error:
            if self._cancelled and not _being_cancelled():
                raise Cancelled("CALL_CANCELLED", "the call was cancelled from this side") from None
            raise _translate(self._node, self._link, error, callers_deadline=True) from error
        return None if frame is grpc.aio.EOF else frame

    def cancel(self) -> None:
        self._cancelled = True
        self._call.cancel()


def _fences(session: str, sessions: Callable[[], Sessions]) -> tuple[grpc.aio.ClientInterceptor, ...]:
    """Interceptors that say with each command who sends it, and whose commands are late."""

    def fenced(details: grpc.aio.ClientCallDetails) -> grpc.aio.ClientCallDetails:
        metadata = grpc.aio.Metadata(*(details.metadata or ()))
        metadata.add(SESSION_KEY, session)
        metadata.add(SESSIONS_KEY, str(sessions()))
        return grpc.aio.ClientCallDetails(
            details.method, details.timeout, metadata, details.credentials, details.wait_for_ready
        )

    class Unary(grpc.aio.UnaryUnaryClientInterceptor):
        async def intercept_unary_unary(self, continuation: Any, details: Any, request: Any) -> Any:
            return await continuation(fenced(details), request)

    class Stream(grpc.aio.UnaryStreamClientInterceptor):
        async def intercept_unary_stream(self, continuation: Any, details: Any, request: Any) -> Any:
            return await continuation(fenced(details), request)

    return Unary(), Stream()


def _translate(node: str, link: _Link, error: BaseException, callers_deadline: bool) -> BaseException:
    """The error of a failed call, in place of gRPC's own.

    Args:
        node: its id.
        link: the link that the call went over.
        error: what gRPC raised.
        callers_deadline: whether the deadline is the caller's, rather than ours for the node to meet.
    """
    if isinstance(error, grpc.aio.AioRpcError):
        translated = from_rpc_error(error)
        silence = Unavailable if callers_deadline else (Unavailable, DeadlineExceeded)
        if isinstance(translated, silence) and not _from_service(error):
            return _silent(node, translated.message)
        return translated
    # Closing a channel cancels its calls, which looks like a cancellation of their own.
    if isinstance(error, asyncio.CancelledError) and not (link.closed and not _being_cancelled()):
        return asyncio.CancelledError()
    return _silent(node, "its connection was closed")


def _being_cancelled() -> bool:
    """Whether somebody cancels the task that runs now."""
    task = asyncio.current_task()
    return task is not None and bool(task.cancelling())


def _from_service(error: grpc.aio.AioRpcError) -> bool:
    return any(key == "grpc-status-details-bin" for key, _ in error.trailing_metadata() or ())


def _silent(node: str, why: str) -> DumontError:
    return Unavailable(
        NODE_UNAVAILABLE,
        f"nodes/{node} does not answer: {why}",
        metadata={"node": f"nodes/{node}"},
        retry_after=1.0,
    )
