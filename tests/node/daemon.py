"""snapshotd as its own process, reached over gRPC."""

from __future__ import annotations

import signal
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, TypeVar

import grpc
import pytest
from google.longrunning import operations_pb2, operations_pb2_grpc
from google.protobuf.message import Message
from grpc_health.v1 import health_pb2, health_pb2_grpc

from dumont.errors import DumontError
from dumont.rpc.status import from_rpc_error, from_status
from dumont.rpc.structs import to_struct
from dumont.snapshotd.v1 import inference_service_pb2 as inference_pb2
from dumont.snapshotd.v1 import inference_service_pb2_grpc as inference_grpc
from dumont.snapshotd.v1 import instance_service_pb2 as instances_pb2
from dumont.snapshotd.v1 import instance_service_pb2_grpc as instances_grpc
from dumont.snapshotd.v1 import node_service_pb2_grpc as nodes_grpc
from dumont.snapshotd.v1 import snapshot_service_pb2_grpc as snapshots_grpc
from snapshotd.failpoints import CRASHED

ROOT = Path(__file__).parents[2]
START_SECONDS = 30.0
# An engine that is imported for the first time on a busy machine takes its time.
START_LIMIT = 300.0
CHANNEL = (
    # Not shared with the channel to the process before, whose connection may be dying yet.
    ("grpc.use_local_subchannel_pool", 1),
    # The first connection is refused, because the daemon is starting: soon try again.
    ("grpc.initial_reconnect_backoff_ms", 20),
    ("grpc.min_reconnect_backoff_ms", 20),
    ("grpc.max_reconnect_backoff_ms", 100),
)


M = TypeVar("M", bound=Message)


class Daemon:
    """A running snapshotd and stubs of its services.

    Args:
        within: a command that runs it, as the same process, in other circumstances.
    """

    def __init__(
        self, state_dir: Path, port: int, *flags: str, device: str = "cpu", within: Sequence[str] = ()
    ) -> None:
        self.state_dir = state_dir
        self.address = f"127.0.0.1:{port}"
        self.flags = flags
        self.device = device
        self.within = within
        self.process: subprocess.Popen[bytes] | None = None
        # While this file is there, the daemon crashes at the failpoint that it names.
        self.failpoint = state_dir.parent / f"{state_dir.name}.failpoint"

    def __enter__(self) -> Daemon:
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.terminate()

    def start(self) -> None:
        """Start it and wait until it says that it serves."""
        command = [*self.within, sys.executable, "-m", "tests.node.failing_snapshotd", str(self.failpoint)]
        command += ["--state-dir", str(self.state_dir), "--listen", self.address, "--device", self.device]
        self.output = (self.state_dir.parent / f"{self.state_dir.name}.log").open("ab")
        self.process = subprocess.Popen(
            [*command, *self.flags], cwd=ROOT, stdout=self.output, stderr=self.output
        )
        self.channel = grpc.insecure_channel(self.address, CHANNEL)
        self.instances = instances_grpc.InstanceServiceStub(self.channel)
        self.snapshots = snapshots_grpc.SnapshotServiceStub(self.channel)
        self.nodes = nodes_grpc.NodeServiceStub(self.channel)
        self.inference = inference_grpc.InferenceServiceStub(self.channel)
        self.operations = operations_pb2_grpc.OperationsStub(self.channel)
        health = health_pb2_grpc.HealthStub(self.channel)
        request = health_pb2.HealthCheckRequest(service="dumont.snapshotd.v1.InstanceService")
        answer = health.Check(request, wait_for_ready=True, timeout=START_SECONDS)
        assert answer.status == health_pb2.HealthCheckResponse.SERVING

    def kill(self) -> None:
        """As a crash would."""
        self._end(signal.SIGKILL)

    def crash(self, failpoint: str, call: Callable[[], object]) -> None:
        """Have it die when ``call`` comes to ``failpoint``."""
        assert self.process is not None
        self.failpoint.write_text(failpoint)
        try:
            with pytest.raises((grpc.RpcError, DumontError)):
                call()
            assert self.process.wait(timeout=30) == CRASHED
        finally:
            self.failpoint.unlink()
        self.kill()

    def terminate(self) -> int:
        """Ask it to drain; its exit status."""
        return self._end(signal.SIGTERM)

    def _end(self, number: int) -> int:
        process, self.process = self.process, None
        if process is None:
            return 0
        self.channel.close()
        process.send_signal(number)
        status = process.wait(timeout=60)
        self.output.close()
        return status

    def log(self) -> str:
        return Path(self.output.name).read_text()

    def wait(self, operation: operations_pb2.Operation, answer: M) -> M:
        """The answer of an operation; its error is raised."""
        request = operations_pb2.WaitOperationRequest(name=operation.name)
        done = self.operations.WaitOperation(request, timeout=START_LIMIT)
        if done.HasField("error"):
            raise from_status(done.error)
        assert done.response.Unpack(answer)
        return answer

    def start_instance(
        self, instance: str, model: Path, engine: str = "", options: Mapping[str, Any] | None = None
    ) -> instances_pb2.Instance:
        request = instances_pb2.StartInstanceRequest(
            instance_id=instance, model=str(model), engine=engine, engine_options=to_struct(options or {})
        )
        answer = instances_pb2.Instance()
        self.wait(self.instances.StartInstance(request), answer)
        return answer

    def get(self, instance: str) -> instances_pb2.Instance:
        try:
            return self.instances.GetInstance(instances_pb2.GetInstanceRequest(name=f"instances/{instance}"))
        except grpc.RpcError as error:
            raise from_rpc_error(error) from error

    def stop_instance(self, instance: str) -> None:
        self.instances.StopInstance(instances_pb2.StopInstanceRequest(name=f"instances/{instance}"))

    def generate(self, instance: str, prompt: str = "The capital of France is", tokens: int = 6) -> str:
        request = inference_pb2.GenerateRequest(
            name=f"instances/{instance}", prompt=prompt, max_new_tokens=tokens
        )
        try:
            return "".join(answer.chunk.text for answer in self.inference.Generate(request, timeout=60))
        except grpc.RpcError as error:
            raise from_rpc_error(error) from error
