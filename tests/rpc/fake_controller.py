"""A controller of canned answers, over real gRPC, for tests of the client."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from typing import Any

from google.protobuf.duration_pb2 import Duration
from google.protobuf.empty_pb2 import Empty

from dumont.controller.v1 import deployment_service_pb2 as deployments
from dumont.controller.v1 import deployment_service_pb2_grpc as deployments_grpc
from dumont.controller.v1 import inference_service_pb2 as inference
from dumont.controller.v1 import inference_service_pb2_grpc as inference_grpc
from dumont.controller.v1 import instance_service_pb2 as instances
from dumont.controller.v1 import instance_service_pb2_grpc as instances_grpc
from dumont.controller.v1 import node_service_pb2 as nodes
from dumont.controller.v1 import node_service_pb2_grpc as nodes_grpc
from dumont.controller.v1 import snapshot_service_pb2 as snapshots
from dumont.controller.v1 import snapshot_service_pb2_grpc as snapshots_grpc
from dumont.errors import (
    AlreadyExists,
    DataLoss,
    FailedPrecondition,
    NotFound,
    ResourceExhausted,
    Unavailable,
)
from dumont.inference.v1 import inference_pb2
from dumont.rpc.operations import Operations, Progress
from dumont.rpc.server import bind, new_server

State = instances.Instance.State


class FakeController(
    deployments_grpc.DeploymentServiceServicer,
    inference_grpc.InferenceServiceServicer,
    instances_grpc.InstanceServiceServicer,
    snapshots_grpc.SnapshotServiceServicer,
    nodes_grpc.NodeServiceServicer,
):
    """Keeps deployments; answers "one two three"; records the requests it got."""

    def __init__(self) -> None:
        self.operations = Operations("controller.dumont")
        self.endless = threading.Event()
        self.cancelled = threading.Event()
        self.capture_may_end = threading.Event()
        self.changed = asyncio.Event()
        self.told = asyncio.Event()
        self.reset()

    def reset(self) -> None:
        """As at the beginning: nothing deployed, three instances of ``qa``."""
        self.deployments: dict[str, deployments.Deployment] = {}
        self.instances = {
            name: instances.Instance(
                name=name,
                deployment="deployments/qa",
                node="nodes/one",
                state=State.STATE_SERVING,
                pid=number,
            )
            for number, name in enumerate(("instances/a", "instances/b", "instances/c"), start=1)
        }
        self.requests: list[Any] = []
        self.unavailable = 0
        self.no_snapshots = False
        self.state_after_start = deployments.Deployment.STATE_ACTIVE
        self.watch_ends = False
        self.draining = False
        self.endless.clear()
        self.cancelled.clear()

    async def CreateDeployment(self, request: Any, context: Any) -> deployments.Deployment:
        self.requests.append(request)
        name = f"deployments/{request.deployment_id}"
        if name in self.deployments:
            raise AlreadyExists("DEPLOYMENT_EXISTS", f"{name} exists", field="deployment_id")
        self.deployments[name] = request.deployment
        self.deployments[name].name = name
        self.deployments[name].state = self.state_after_start
        return self.deployments[name]

    async def GetDeployment(self, request: Any, context: Any) -> deployments.Deployment:
        self.requests.append(request)
        if self.unavailable:
            self.unavailable -= 1
            raise Unavailable("REGISTRY_BUSY", "try again")
        try:
            return self.deployments[request.name]
        except KeyError:
            raise NotFound("DEPLOYMENT_NOT_FOUND", f"no {request.name}", field="name") from None

    async def ListDeployments(self, request: Any, context: Any) -> deployments.ListDeploymentsResponse:
        rest = [name for name in sorted(self.deployments) if name > request.page_token]
        return deployments.ListDeploymentsResponse(
            deployments=[self.deployments[name] for name in rest[:2]],
            next_page_token=rest[1] if len(rest) > 2 else "",
        )

    async def UpdateDeployment(self, request: Any, context: Any) -> deployments.Deployment:
        self.requests.append(request)
        current = self.deployments[request.deployment.name]
        request.update_mask.MergeMessage(request.deployment, current, True, True)
        current.state = self.state_after_start
        return current

    async def WatchStart(self, request: Any, context: Any) -> AsyncIterator[deployments.WatchStartResponse]:
        self.requests.append(request)
        for stage in ("waiting", "load", "capture"):
            node = "" if stage == "waiting" else "nodes/one"
            yield deployments.WatchStartResponse(running=True, stage=stage, node=node)
        self.told.set()
        yield deployments.WatchStartResponse()
        await asyncio.Event().wait()

    async def DeleteDeployment(self, request: Any, context: Any) -> Empty:
        if self.deployments.pop(request.name, None) is None:
            raise NotFound("DEPLOYMENT_NOT_FOUND", f"no {request.name}", field="name")
        return Empty()

    async def ExplainDeployment(self, request: Any, context: Any) -> deployments.ExplainDeploymentResponse:
        await self.GetDeployment(request, context)
        chosen = deployments.StartCandidate(
            tier=inference.TIER_LOCAL,
            node="nodes/n1",
            gpu="GPU-a",
            snapshot="snapshots/one",
            start_duration=Duration(nanos=400_000_000),
            room_duration=Duration(nanos=500_000_000),
            basis="restore measured here 4 times",
            yields=["instances/b parks: it was not used for 42 s, and it is back in 0.4 s"],
        )
        other = deployments.StartCandidate(
            tier=inference.TIER_COLD,
            node="nodes/n2",
            start_duration=Duration(seconds=15),
            why_not="n2 is full",
        )
        return deployments.ExplainDeploymentResponse(
            decision="local on nodes/n1: snapshots/one is on nodes/n1", candidates=[chosen, other]
        )

    async def Generate(self, request: Any, context: Any) -> AsyncIterator[inference.GenerateResponse]:
        self.requests.append(request)
        if request.prompt == "full":
            raise ResourceExhausted("QUEUE_FULL", "16 calls wait already", retry_after=1)
        start = start_info(inference.TIER_LOCAL)
        try:
            if request.prompt == "slow":
                await self.told.wait()
                await asyncio.sleep(0.2)
            if request.prompt != "no start":
                yield inference.GenerateResponse(start=start)
            if request.n > 1:
                for message in several(request.n):
                    yield message
                return
            for text in ("one", " two", " three"):
                chunk = inference_pb2.TextChunk(text=text, token_ids=[1])
                if request.HasField("logprobs"):
                    token = chunk.logprobs.add(token_id=1, text=text, logprob=-0.5)
                    token.top.add(token_id=2, text="other", logprob=-0.25)
                yield inference.GenerateResponse(chunk=chunk)
            if request.prompt == "endless":
                self.endless.set()
                await asyncio.Event().wait()
            if request.prompt == "killed":
                raise Unavailable("INSTANCE_GONE", "instances/a ended while it answered: ended by SIGKILL")
            if request.prompt != "cut":
                usage = inference_pb2.Usage(prompt_tokens=4, output_tokens=3)
                reason = inference_pb2.FINISH_REASON_END
                yield inference.GenerateResponse(finish=inference_pb2.Finish(reason=reason, usage=usage))
        finally:
            self.cancelled.set()

    async def Embed(self, request: Any, context: Any) -> inference.EmbedResponse:
        return inference.EmbedResponse(
            start=start_info(inference.TIER_COLD),
            embeddings=[inference_pb2.Embedding(values=[len(text), 0.5]) for text in request.inputs],
        )

    async def GetInstance(self, request: Any, context: Any) -> instances.Instance:
        return self._instance(request.name)

    async def ListInstances(self, request: Any, context: Any) -> instances.ListInstancesResponse:
        found = [i for i in self.instances.values() if request.deployment in ("", i.deployment)]
        return instances.ListInstancesResponse(instances=found)

    async def WatchInstances(
        self, request: Any, context: Any
    ) -> AsyncIterator[instances.WatchInstancesResponse]:
        for instance in self.instances.values():
            yield instances.WatchInstancesResponse(instance=instance)
        yield instances.WatchInstancesResponse(synchronized=Empty())
        if not self.watch_ends:
            await self.changed.wait()
        yield instances.WatchInstancesResponse(removed="instances/a")
        if not self.watch_ends:
            await asyncio.Event().wait()

    async def ParkInstance(self, request: Any, context: Any) -> instances.Instance:
        instance = self._instance(request.name)
        if instance.state == State.STATE_PARKED:
            raise FailedPrecondition("ILLEGAL_TRANSITION", f"{request.name} is parked")
        instance.state = State.STATE_PARKED
        return instance

    async def ResumeInstance(self, request: Any, context: Any) -> instances.Instance:
        instance = self._instance(request.name)
        instance.state = State.STATE_SERVING
        return instance

    async def MigrateInstance(self, request: Any, context: Any) -> Any:
        self.requests.append(request)
        known = self._instance(request.name)

        async def migrate(progress: Progress) -> instances.Instance:
            progress.update(stage="moving" if request.gpu else "restoring")
            del self.instances[known.name]
            arrived = instances.Instance()
            arrived.CopyFrom(known)
            if request.gpu:
                arrived.gpu = request.gpu
            else:
                arrived.name, arrived.node = "instances/successor", request.node or "nodes/two"
            self.instances[arrived.name] = arrived
            return arrived

        return self.operations.start(
            "migrate", migrate, instances.MigrateInstanceMetadata(instance=request.name)
        )

    async def StopInstance(self, request: Any, context: Any) -> Empty:
        self._instance(request.name)
        del self.instances[request.name]
        return Empty()

    async def StreamInstanceLogs(
        self, request: Any, context: Any
    ) -> AsyncIterator[instances.StreamInstanceLogsResponse]:
        if request.name == "instances/c":
            return
        for data in (b"loaded \xe2\x82", b"\xac\n", b"ready\n"):
            yield instances.StreamInstanceLogsResponse(data=data)

    async def CreateSnapshot(self, request: Any, context: Any) -> Any:
        async def capture(progress: Progress) -> snapshots.Snapshot:
            try:
                for stage in ("quiesce", "dump"):
                    progress.update(stage=stage, instance="instances/a")
                    await asyncio.to_thread(self.capture_may_end.wait)
            except asyncio.CancelledError:
                self.cancelled.set()
                raise
            progress.update(replaces=["snapshots/older"])
            if request.snapshot_id == "refused":
                raise ResourceExhausted("DISK_FULL", "no room", metadata={"free": "0"})
            return snapshots.Snapshot(
                name="snapshots/one", deployment=request.deployment, state=snapshots.Snapshot.STATE_ACTIVE
            )

        metadata = snapshots.CreateSnapshotMetadata(deployment=request.deployment, stage="start")
        return self.operations.start("capture", capture, metadata)

    async def DrainNode(self, request: Any, context: Any) -> Any:
        self.requests.append(request)
        self.draining = True

        async def drain(progress: Progress) -> nodes.DrainNodeResponse:
            progress.update(instances_left=1)
            busy = nodes.NodeRemainder(
                instance="instances/a",
                deployment="deployments/qa",
                reason="INSTANCE_BUSY",
                message="it answers",
            )
            return nodes.DrainNodeResponse(
                node=request.name, left=[busy] if request.HasField("timeout") else []
            )

        return self.operations.start(
            "drain", drain, nodes.DrainNodeMetadata(node=request.name, instances_total=3)
        )

    async def UndrainNode(self, request: Any, context: Any) -> nodes.Node:
        self.draining = False
        return self._node(request.name)

    async def ListNodes(self, request: Any, context: Any) -> nodes.ListNodesResponse:
        return nodes.ListNodesResponse(nodes=[self._node("nodes/one")])

    def _node(self, name: str) -> nodes.Node:
        gpu = nodes.NodeGpu(uuid="GPU-a", model="H", memory_total_bytes=80 << 30, memory_free_bytes=20 << 30)
        node = nodes.Node(
            gpus=[gpu],
            instance_memory_limit_bytes=9,
            instance_memory_bytes=7,
            name=name,
            state=nodes.Node.STATE_READY,
            memory_total_bytes=2**34,
            draining=self.draining,
        )
        node.heartbeat_time.GetCurrentTime()
        return node

    async def ListModels(self, request: Any, context: Any) -> nodes.ListModelsResponse:
        return nodes.ListModelsResponse(
            models=[
                nodes.NodeModel(
                    model="org/model", node="nodes/one", engine="causal_lm", weights_size_bytes=2**30
                ),
                nodes.NodeModel(model="org/odd", node="nodes/one", problem="it has no safetensors weights"),
            ]
        )

    async def GetNode(self, request: Any, context: Any) -> nodes.Node:
        raise NotFound("NODE_NOT_FOUND", f"no {request.name}", field="name")

    async def GetSnapshot(self, request: Any, context: Any) -> snapshots.Snapshot:
        snapshot = snapshots.Snapshot(
            name=request.name,
            deployment="deployments/qa",
            node="nodes/one",
            state=snapshots.Snapshot.STATE_ACTIVE,
            size_bytes=214_000_000,
            compatibility={"criu": "4.1.1"},
            manifest_digest="ab12",
            local=True,
            published=True,
            stored=snapshots.StoredSnapshot(
                image_bytes=200 << 20,
                data_bytes=100 << 20,
                stored_bytes=50 << 20,
                unique_bytes=10 << 20,
                chunk_count=25,
                encrypted=True,
                signer="5af3",
            ),
        )
        snapshot.files.add(name="pages-1.img", size_bytes=4096, digest="cd34")
        snapshot.source_pause_duration.FromMilliseconds(304)
        return snapshot

    async def ListSnapshots(self, request: Any, context: Any) -> snapshots.ListSnapshotsResponse:
        if self.no_snapshots:
            return snapshots.ListSnapshotsResponse()
        if request.orphans:
            lost = snapshots.Snapshot(name="snapshots/lost", deployment="deployments/gone", orphan=True)
            return snapshots.ListSnapshotsResponse(snapshots=[lost])
        named = snapshots.GetSnapshotRequest(name="snapshots/one")
        return snapshots.ListSnapshotsResponse(snapshots=[await self.GetSnapshot(named, context)])

    async def AdoptSnapshot(self, request: Any, context: Any) -> snapshots.Snapshot:
        self.requests.append(request)
        owner = request.deployment or "deployments/gone"
        return snapshots.Snapshot(name=request.name, deployment=owner)

    async def UndeleteSnapshot(self, request: Any, context: Any) -> snapshots.Snapshot:
        self.requests.append(request)
        return snapshots.Snapshot(name=request.name, published=True, orphan=True)

    async def DeleteSnapshot(self, request: Any, context: Any) -> Empty:
        if request.name != "snapshots/one":
            raise NotFound("SNAPSHOT_NOT_FOUND", f"no {request.name}", field="name")
        return Empty()

    async def PrefetchSnapshot(self, request: Any, context: Any) -> Any:
        self.requests.append(request)

        async def work(progress: Progress) -> snapshots.Snapshot:
            return await self.GetSnapshot(snapshots.GetSnapshotRequest(name=request.name), context)

        return self.operations.start("prefetch", work, snapshots.PrefetchSnapshotMetadata())

    async def VerifySnapshot(self, request: Any, context: Any) -> Any:
        async def work(progress: Progress) -> snapshots.VerifySnapshotResponse:
            if request.name != "snapshots/one":
                raise DataLoss("CHUNK_DAMAGED", "a chunk is damaged", metadata={"chunk": "ab"})
            return snapshots.VerifySnapshotResponse(local_bytes=2048, published_bytes=1024)

        return self.operations.start("verify", work, snapshots.VerifySnapshotMetadata(snapshot=request.name))

    async def PruneSnapshots(self, request: Any, context: Any) -> Any:
        self.requests.append(request)

        async def work(progress: Progress) -> snapshots.PruneSnapshotsResponse:
            return snapshots.PruneSnapshotsResponse(
                objects=["chunks/ab/ab12"], object_count=1, size_bytes=1 << 20, kept_bytes=3 << 20
            )

        return self.operations.start("prune", work, snapshots.PruneSnapshotsMetadata(node="nodes/one"))

    def _instance(self, name: str) -> instances.Instance:
        try:
            return self.instances[name]
        except KeyError:
            raise NotFound("INSTANCE_NOT_FOUND", f"no {name}", field="name") from None


def several(count: int) -> Iterator[inference.GenerateResponse]:
    """Answers whose pieces come mixed; the last begun is the first that ends."""
    for text in ("a", "b"):
        for index in range(count):
            chunk = inference_pb2.TextChunk(text=f"{text}{index}", token_ids=[index], index=index)
            yield inference.GenerateResponse(chunk=chunk)
    for index in reversed(range(count)):
        usage = inference_pb2.Usage(prompt_tokens=4, output_tokens=2, cached_prompt_tokens=1)
        reason = inference_pb2.FINISH_REASON_STOP if index else inference_pb2.FINISH_REASON_LENGTH
        finish = inference_pb2.Finish(reason=reason, usage=usage, index=index)
        yield inference.GenerateResponse(finish=finish)


def start_info(tier: inference.Tier.ValueType) -> inference.StartInfo:
    start = inference.StartInfo(
        tier=tier, reasons=["no instance", "snapshots/one is local"], instance="instances/a", node="nodes/one"
    )
    start.total_duration.FromMilliseconds(250)
    start.phases.add(name="restore").duration.FromMilliseconds(200)
    return start


@asynccontextmanager
async def serving(controller: FakeController) -> AsyncIterator[str]:
    """The address at which ``controller`` is served, in this event loop."""
    server = new_server("controller.dumont")
    for add in (
        deployments_grpc.add_DeploymentServiceServicer_to_server,
        inference_grpc.add_InferenceServiceServicer_to_server,
        instances_grpc.add_InstanceServiceServicer_to_server,
        snapshots_grpc.add_SnapshotServiceServicer_to_server,
        nodes_grpc.add_NodeServiceServicer_to_server,
    ):
        add(controller, server)
    controller.operations.register(server)
    address = bind(server, "127.0.0.1:0")
    await server.start()
    try:
        yield address
    finally:
        controller.capture_may_end.set()
        await controller.operations.close()
        await server.stop(0)


class Served:
    """A fake controller in a loop and thread of its own."""

    def __init__(self) -> None:
        self._ready = threading.Event()
        self._thread = threading.Thread(target=lambda: asyncio.run(self._serve()), daemon=True)
        self._thread.start()
        assert self._ready.wait(10)

    async def _serve(self) -> None:
        self.controller = FakeController()
        self._loop = asyncio.get_running_loop()
        self._stop = asyncio.Event()
        async with serving(self.controller) as self.address:
            self._ready.set()
            await self._stop.wait()

    def stop(self) -> None:
        self._loop.call_soon_threadsafe(self._stop.set)
        self._thread.join(10)
