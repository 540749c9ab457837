"""A snapshotd that runs for the benchmark, and its API as a client uses it."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, TypeVar

import grpc
from google.longrunning import operations_pb2, operations_pb2_grpc
from google.protobuf.message import Message

from dumont.benchmarks.programs import interrupts_held, tail
from dumont.errors import DeadlineExceeded, FailedPrecondition
from dumont.rpc.status import from_rpc_error, from_status
from dumont.snapshotd.v1 import (
    inference_service_pb2,
    inference_service_pb2_grpc,
    instance_service_pb2,
    instance_service_pb2_grpc,
    snapshot_service_pb2,
    snapshot_service_pb2_grpc,
)

START_SECONDS: Final = 60.0
# The longest call is an upload to a distant store.
STEP_SECONDS: Final = 1800.0

Response = TypeVar("Response", bound=Message)


@dataclass(frozen=True)
class Answer:
    """A greedy answer.

    Args:
        first_token_time: when the first of its tokens came, by the monotonic clock.
    """

    first_token_time: float
    tokens: tuple[int, ...]


class Snapshotd:
    """A snapshotd that runs while this is entered; its instances end with it.

    Args:
        directory: for its state and its log.
        address: where it listens, on loopback.
        flags: further ones.

    Raises:
        FailedPrecondition: SERVICE_ENDED, it does not serve.
        DeadlineExceeded: STEP_TIMEOUT, a step took too long.
        DumontError: what snapshotd says.
    """

    def __init__(self, directory: Path, address: str, *flags: str) -> None:
        self.log = directory / "snapshotd.log"
        self.shims = directory / "state" / "shims"
        self.address = address
        self.flags = ("--state-dir", str(directory / "state"), "--stop-instances-on-exit", *flags)

    def __enter__(self) -> Snapshotd:
        command = [sys.executable, "-m", "snapshotd.main", "--listen", self.address, *self.flags]
        # Not shared with a channel to an earlier daemon at the same address.
        self.channel = grpc.insecure_channel(self.address, [("grpc.use_local_subchannel_pool", 1)])
        self.instances: Any = instance_service_pb2_grpc.InstanceServiceStub(self.channel)
        self.snapshots: Any = snapshot_service_pb2_grpc.SnapshotServiceStub(self.channel)
        self.inference: Any = inference_service_pb2_grpc.InferenceServiceStub(self.channel)
        self.operations: Any = operations_pb2_grpc.OperationsStub(self.channel)
        self.process: subprocess.Popen[bytes] | None = None
        try:
            with self.log.open("ab") as output, interrupts_held():
                self.process = subprocess.Popen(
                    command, stdin=subprocess.DEVNULL, stdout=output, stderr=output
                )
            self.pid = self.process.pid
            self._wait_until_serving(self.process)
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.channel.close()
        if self.process is not None:
            self.process.terminate()
            self.process.wait()

    def _wait_until_serving(self, process: subprocess.Popen[bytes]) -> None:
        ready = grpc.channel_ready_future(self.channel)
        deadline = time.monotonic() + START_SECONDS
        while True:
            try:
                ready.result(timeout=0.1)
                return
            except grpc.FutureTimeoutError:
                if process.poll() is not None or time.monotonic() > deadline:
                    message = f"snapshotd does not serve: {tail(self.log)}"
                    raise FailedPrecondition("SERVICE_ENDED", message) from None

    def start(
        self, instance: str, model: str | Path, engine: str = "", options: Mapping[str, Any] | None = None
    ) -> instance_service_pb2.Instance:
        """Load a model in a new instance and wait until it serves.

        Args:
            engine: empty: the one that the model's architecture calls for.
            options: of the engine.
        """
        request = instance_service_pb2.StartInstanceRequest(
            instance_id=instance, model=str(model), engine=engine
        )
        if options:
            request.engine_options.update(dict(options))
        return self._run(self.instances.StartInstance, request, instance_service_pb2.Instance())

    def restore(self, instance: str, snapshot: str) -> instance_service_pb2.Instance:
        """Restore an instance from a snapshot and wait until it serves."""
        request = instance_service_pb2.RestoreInstanceRequest(
            instance_id=instance, snapshot=f"snapshots/{snapshot}"
        )
        return self._run(self.instances.RestoreInstance, request, instance_service_pb2.Instance())

    def capture(self, instance: str, snapshot: str) -> snapshot_service_pb2.Snapshot:
        """Make a snapshot of an instance."""
        request = instance_service_pb2.CaptureInstanceRequest(
            name=f"instances/{instance}", snapshot_id=snapshot
        )
        return self._run(self.instances.CaptureInstance, request, snapshot_service_pb2.Snapshot())

    def park(self, instance: str) -> None:
        """Freeze an instance."""
        self._call(
            self.instances.ParkInstance,
            instance_service_pb2.ParkInstanceRequest(name=f"instances/{instance}"),
        )

    def resume(self, instance: str) -> instance_service_pb2.Instance:
        """Let a parked instance go on."""
        resumed: instance_service_pb2.Instance = self._call(
            self.instances.ResumeInstance,
            instance_service_pb2.ResumeInstanceRequest(name=f"instances/{instance}"),
        )
        return resumed

    def stop(self, instance: str) -> None:
        """End an instance."""
        self._call(
            self.instances.StopInstance,
            instance_service_pb2.StopInstanceRequest(name=f"instances/{instance}"),
        )

    def publish(self, snapshot: str) -> None:
        """Upload a snapshot to the object store."""
        request = snapshot_service_pb2.PublishSnapshotRequest(name=f"snapshots/{snapshot}")
        self._run(self.snapshots.PublishSnapshot, request, snapshot_service_pb2.Snapshot())

    def stored(self, snapshot: str) -> snapshot_service_pb2.StoredSnapshot:
        """The space of a published snapshot in the object store."""
        request = snapshot_service_pb2.GetSnapshotRequest(name=f"snapshots/{snapshot}")
        stored: snapshot_service_pb2.StoredSnapshot = self._call(self.snapshots.GetSnapshot, request).stored
        return stored

    def delete(self, snapshot: str) -> None:
        """Delete a snapshot on the node and in the object store."""
        request = snapshot_service_pb2.DeleteSnapshotRequest(name=f"snapshots/{snapshot}")
        self._call(self.snapshots.DeleteSnapshot, request)

    def prune(self) -> None:
        """Delete from the object store what no published snapshot needs."""
        request = snapshot_service_pb2.PruneSnapshotsRequest()
        self._run(self.snapshots.PruneSnapshots, request, snapshot_service_pb2.PruneSnapshotsResponse())

    def settle(self) -> None:
        """Wait until the spare shim is ready, as on any node that has run for a second."""
        deadline = time.monotonic() + START_SECONDS
        while not any(self.shims.glob("*.sock")) and time.monotonic() < deadline:
            time.sleep(0.05)

    def cpu_seconds(self) -> float:
        """CPU seconds that the daemon has used."""
        fields = Path(f"/proc/{self.pid}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

    def peak_rss(self) -> int:
        """The most bytes of memory that the daemon ever had resident."""
        status = Path(f"/proc/{self.pid}/status").read_text()
        return next(int(line.split()[1]) for line in status.splitlines() if line.startswith("VmHWM")) * 1024

    def generate(self, instance: str, prompt: str, max_new_tokens: int) -> Answer:
        """Send a prompt and read the whole greedy answer."""
        request = inference_service_pb2.GenerateRequest(
            name=f"instances/{instance}", prompt=prompt, max_new_tokens=max_new_tokens
        )
        tokens: list[int] = []
        first = 0.0
        with _errors():
            for response in self.inference.Generate(request, timeout=STEP_SECONDS):
                if response.chunk.token_ids:
                    first = first or time.monotonic()
                    tokens += response.chunk.token_ids
        return Answer(first or time.monotonic(), tuple(tokens))

    def _call(self, method: Any, request: Message) -> Any:
        with _errors():
            return method(request, timeout=STEP_SECONDS)

    def _run(self, method: Any, request: Message, response: Response) -> Response:
        operation = self._call(method, request)
        wait = operations_pb2.WaitOperationRequest(name=operation.name)
        wait.timeout.FromSeconds(int(STEP_SECONDS))
        with _errors():
            operation = self.operations.WaitOperation(wait)
        if not operation.done:
            raise DeadlineExceeded(
                "STEP_TIMEOUT", f"{operation.name} did not end in {STEP_SECONDS:.0f} seconds"
            )
        if operation.HasField("error"):
            raise from_status(operation.error)
        operation.response.Unpack(response)
        return response


@contextmanager
def _errors() -> Iterator[None]:
    try:
        yield
    except grpc.RpcError as error:
        raise from_rpc_error(error) from error
