"""The services as a user runs them, and the real grpcurl to speak to them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ANSWER_SECONDS = 100
STOP_SECONDS = 60


@dataclass(frozen=True)
class Refusal:
    """What a refused call told its caller."""

    code: int
    reason: str
    field: str


class Grpcurl:
    """The real grpcurl against one server."""

    def __init__(self, binary: Path, endpoint: str) -> None:
        self._binary = binary
        self._endpoint = endpoint

    def run(self, *words: str, body: Mapping[str, Any] | None = None) -> subprocess.CompletedProcess[str]:
        flags = ["-plaintext", "-format-error"]
        if body is not None:
            flags += ["-d", json.dumps(body)]
        command = [str(self._binary), *flags, self._endpoint, *words]
        return subprocess.run(command, capture_output=True, text=True, timeout=ANSWER_SECONDS, check=False)

    def show(self, *words: str) -> str:
        """The answer to ``list`` or ``describe``."""
        done = self.run(*words)
        assert done.returncode == 0, done.stderr
        return done.stdout

    def call(self, method: str, body: Mapping[str, Any] | None = None) -> list[dict[str, Any]]:
        """Every message of the answer."""
        done = self.run(method, body=body or {})
        assert done.returncode == 0, done.stderr
        messages = []
        rest = done.stdout.strip()
        while rest:
            message, end = json.JSONDecoder().raw_decode(rest)
            messages.append(message)
            rest = rest[end:].strip()
        return messages

    def refused(self, method: str, body: Mapping[str, Any]) -> Refusal:
        """How the call was refused."""
        done = self.run(method, body=body)
        assert done.returncode != 0, f"{method} took {body} and answered {done.stdout}"
        status = json.loads(done.stderr)
        details = {detail["@type"].rpartition(".")[2]: detail for detail in status["details"]}
        violations = details.get("BadRequest", {}).get("field_violations", [{}])
        return Refusal(status["code"], details["ErrorInfo"]["reason"], violations[0].get("field", ""))


class Stack:
    """``dumont up``, started and stopped with ``with``."""

    def __init__(self, state_dir: Path, controller_port: int, snapshotd_port: int, grpcurl: Path) -> None:
        self.endpoint = f"127.0.0.1:{controller_port}"
        self.controller = Grpcurl(grpcurl, self.endpoint)
        self.snapshotd = Grpcurl(grpcurl, f"127.0.0.1:{snapshotd_port}")
        self._command = [
            command("dumont"), "up", "--json", "--state-dir", str(state_dir),
            "--controller-port", str(controller_port), "--snapshotd-port", str(snapshotd_port),
        ]  # fmt: skip

    def __enter__(self) -> Stack:
        self.process = subprocess.Popen(self._command, stdout=subprocess.PIPE, text=True)
        assert self.process.stdout is not None
        # One line, once both serve and the node has registered, or to say why they do not.
        self.announced = json.loads(self.process.stdout.readline())
        assert "controller" in self.announced, self.announced
        return self

    def __exit__(self, *_: object) -> None:
        self.terminate()

    def terminate(self) -> int:
        """End it with SIGTERM; its exit status."""
        self.process.terminate()
        return self.process.wait(STOP_SECONDS)

    def dumont(self, *words: str) -> str:
        """What the command ``dumont`` prints when told to speak to these services."""
        done = subprocess.run(
            [command("dumont"), *words],
            env={**os.environ, "DUMONT_ENDPOINT": self.endpoint},
            capture_output=True,
            text=True,
            timeout=ANSWER_SECONDS,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        return done.stdout


class Controller:
    """A running controller and what its log says."""

    def __init__(self, endpoint: str, state_dir: Path, heartbeat: float = 0.5) -> None:
        self.endpoint = endpoint
        # A file: a pipe that nobody reads would stop the controller once it is full.
        self.log = state_dir.with_suffix(".log")
        with self.log.open("wb") as output:
            self.process = subprocess.Popen(
                (
                    command("dumont-controller"), "--listen", endpoint, "--state-dir", str(state_dir),
                    "--heartbeat-seconds", str(heartbeat),
                ),
                stdout=output,
                stderr=output,
            )  # fmt: skip
        self._read = self.log.open()

    def read_until(self, **facts: str) -> None:
        """Returns when the log tells of an event with these facts."""
        deadline = time.monotonic() + ANSWER_SECONDS
        line = ""
        while time.monotonic() < deadline:
            line += self._read.readline()
            if not line.endswith("\n"):
                time.sleep(0.02)
                continue
            if line.startswith("{") and facts.items() <= json.loads(line).items():
                return
            line = ""
        raise AssertionError(f"the log does not tell of {facts}: {self.log.read_text()[-4000:]}")

    def close(self) -> None:
        self.process.terminate()
        self.process.wait(STOP_SECONDS)
        self._read.close()


def command(name: str) -> str:
    """An installed console script."""
    return str(Path(sys.executable).with_name(name))
