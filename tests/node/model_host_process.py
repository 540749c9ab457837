"""A real model host in a process of its own, told what to do over its two pipes."""

from __future__ import annotations

import fcntl
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from types import TracebackType
from typing import Any

import grpc

from dumont.model_host.v1 import model_host_service_pb2_grpc as pb2_grpc

ROOT = Path(__file__).parents[2]
Json = dict[str, Any]


class Refused(Exception):
    """The host answered with an error."""

    def __init__(self, error: Json) -> None:
        super().__init__(error["message"])
        self.reason = error["reason"]
        self.error = error


class ModelHostProcess:
    """Started at once; ``with`` ends it. Descriptors 3 and 4 are its control pipes."""

    def __init__(self, log: Path) -> None:
        host_in, self._to_host = os.pipe()
        from_host, host_out = os.pipe()
        ends = [fcntl.fcntl(end, fcntl.F_DUPFD_CLOEXEC, 32) for end in (host_in, host_out)]

        def place() -> None:
            os.dup2(ends[0], 3)
            os.dup2(ends[1], 4)

        self.started = time.monotonic()
        with log.open("ab") as output:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "model_host"],
                cwd=ROOT,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                preexec_fn=place,
                pass_fds=(3, 4),
                env={**os.environ, "CUDA_VISIBLE_DEVICES": "", "GOMP_SPINCOUNT": "2000"},
            )
        for end in (host_in, host_out, *ends):
            os.close(end)
        self._answers = os.fdopen(from_host)
        self._channel: grpc.Channel | None = None
        self._id = 0

    def __enter__(self) -> ModelHostProcess:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.hang_up()
        self.process.kill()
        self.process.wait()
        self._answers.close()
        if self._to_host >= 0:
            os.close(self._to_host)

    def write(self, data: bytes) -> None:
        os.write(self._to_host, data)

    def read(self) -> Json:
        answer: Json = json.loads(self._answers.readline())
        return answer

    def tell(self, do: str, **arguments: Any) -> Json:
        """Run one command; its answer.

        Raises:
            Refused: the host refused.
        """
        self._id += 1
        self.write(json.dumps({"id": self._id, "do": do, **arguments}).encode() + b"\n")
        answer = self.read()
        assert answer["id"] == self._id
        if "error" in answer:
            raise Refused(answer["error"])
        ok: Json = answer["ok"]
        return ok

    def serve(self, socket: Path, instance: str = "i-1") -> pb2_grpc.ModelHostServiceStub:
        """Have it serve, and connect."""
        self.tell("serve", socket=str(socket), instance=instance)
        self.hang_up()
        self._channel = grpc.insecure_channel(f"unix:{socket}")
        return pb2_grpc.ModelHostServiceStub(self._channel)

    def hang_up(self) -> None:
        if self._channel is not None:
            self._channel.close()
            self._channel = None

    def close_control(self) -> None:
        os.close(self._to_host)
        self._to_host = -1

    def memory(self, mapping: str | None = None) -> dict[str, int]:
        """Kilobytes by kind in all its mappings, or in those whose file ends in ``mapping``."""
        total: dict[str, int] = {}
        counted = False
        for line in Path(f"/proc/{self.process.pid}/smaps").read_text().splitlines():
            key, _, rest = line.partition(":")
            if key.isidentifier():
                if counted and rest.endswith("kB"):
                    total[key] = total.get(key, 0) + int(rest.split()[0])
            elif "-" in key.split(" ")[0]:
                counted = mapping is None or line.endswith(mapping)
        return total
