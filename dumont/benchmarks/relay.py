"""What passing a token on costs: messages that a model host sends at a given rate, computing nothing, through
snapshotd and the controller.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from dumont import sync
from dumont.benchmarks import configs
from dumont.benchmarks.serve import Generators, Program, Services
from dumont.benchmarks.serving import DIRECT, SERVICES, Percentiles, Wave
from dumont.errors import DeadlineExceeded

CONFIG: Final = "qwen3-tiny"
STREAMS_PER_INSTANCE: Final = 64
INTERVAL: Final = 0.02
SECONDS: Final = 5.0
# Answers of one message each, one after the other, for what the path adds to the first token.
PROBES: Final = 200
PROBE_HEAD_START: Final = 0.005
START_SECONDS: Final = 120.0
HEADERS: Final = (
    "path",
    "streams",
    "asked/s",
    "messages/s",
    "first p50",
    "p99",
    "later p99",
    "CPU per message",
)

Say = Callable[[str], None]


@dataclass(frozen=True)
class RelayRow:
    """Messages of many streams on one path.

    Args:
        asked_per_s: messages per second that the model host was told to send.
        messages_per_s: that arrived.
        first: seconds from a request to its first message.
        gap: seconds between the messages of a stream.
        cpu_per_message: seconds of a core that each process used for a message.
    """

    path: str
    streams: int
    asked_per_s: float
    messages_per_s: float
    first: Percentiles | None
    gap: Percentiles | None
    cpu_per_message: Mapping[str, float]


def measure(streams: Sequence[int], directory: Path, say: Say) -> Iterator[RelayRow]:
    """A row for each number of streams on each path; the first of a path is that of single messages.

    Args:
        streams: how many at once.
        directory: an empty one.
        say: told what is being done.

    Raises:
        DumontError: what the services say.
    """
    model = directory / "model"
    say("making a model and starting the services")
    configs.build(CONFIG, model)
    # An instance on the CPU takes no more at once.
    deployments = [f"relay-{number}" for number in range(-(-max(streams) // STREAMS_PER_INSTANCE))]
    with ExitStack() as stack:
        services = stack.enter_context(Services(directory / "node"))
        client = stack.enter_context(sync.Client(services.controller))
        sockets = [_serving(client, services, model, deployment) for deployment in deployments]
        hosts = [stack.enter_context(_frames(socket, directory)) for socket in sockets]
        watched = {name: [pid] for name, pid in services.pids().items()}
        watched["model host"] = [host.pid for host in hosts]
        names = ",".join(f"deployments/{deployment}" for deployment in deployments)
        ways = {
            SERVICES: ((services.controller, names), None),
            DIRECT: (("unix:host.sock", ""), sockets[0].parent),
        }
        for path, (arguments, cwd) in ways.items():
            with Generators(arguments, _generators(streams), cwd) as generators:
                generators.wave(["warm"] * 8, 8)
                probes = [generators.wave(["x"], 1, PROBE_HEAD_START) for _ in range(PROBES)]
                yield _row(path, probes, 0.0, {})
                for count in streams:
                    say(f"{path}: {count} streams")
                    yield _loaded(path, count, generators, watched | {"client": generators.pids()})


def _frames(socket: Path, directory: Path) -> Program:
    """Answers in the place of the instance that serves on ``socket``; the services see no difference."""
    command = [sys.executable, "-m", "dumont.benchmarks.frames", socket.name, str(INTERVAL)]
    return Program(command, directory / "frames.log", cwd=socket.parent)


def _generators(streams: Sequence[int]) -> int:
    return max(1, min(len(os.sched_getaffinity(0)) // 4, max(streams) // 16))


def _serving(client: sync.Client, services: Services, model: Path, deployment: str) -> Path:
    client.deploy(str(model), "warm", name=deployment, prewarm=True)
    deadline = time.monotonic() + START_SECONDS
    while time.monotonic() < deadline:
        for instance in client.instances.find(deployment):
            if instance.state == "serving":
                return services.socket(instance.name)
        time.sleep(0.2)
    raise DeadlineExceeded("STEP_TIMEOUT", f"no instance served within {START_SECONDS:.0f} seconds")


def _loaded(path: str, count: int, generators: Generators, watched: Mapping[str, Sequence[int]]) -> RelayRow:
    before = {name: sum(map(_cpu_seconds, pids)) for name, pids in watched.items()}
    wave = generators.wave(["x"] * count, round(SECONDS / INTERVAL))
    used = {name: sum(map(_cpu_seconds, pids)) - before[name] for name, pids in watched.items()}
    return _row(path, [wave], count / INTERVAL, used)


def _row(path: str, waves: Sequence[Wave], asked: float, cpu_seconds: Mapping[str, float]) -> RelayRow:
    streams = [stream for wave in waves for stream in wave.streams]
    messages = sum(len(stream.arrivals) for stream in streams)
    began = min(stream.sent for stream in streams)
    ended = max(stream.arrivals[-1][0] for stream in streams)
    gaps = [
        later - earlier
        for stream in streams
        for (earlier, _), (later, _) in zip(stream.arrivals, stream.arrivals[1:], strict=False)
    ]
    return RelayRow(
        path=path,
        streams=max(len(wave.streams) for wave in waves),
        asked_per_s=asked,
        messages_per_s=messages / (ended - began) if asked else 0.0,
        first=Percentiles.of([stream.arrivals[0][0] - stream.sent for stream in streams]),
        gap=Percentiles.of(gaps),
        cpu_per_message={name: used / messages for name, used in cpu_seconds.items()},
    )


def _cpu_seconds(pid: int) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def document(row: RelayRow) -> dict[str, Any]:
    """A row as JSON; seconds."""
    return {
        "path": row.path,
        "streams": row.streams,
        "asked_per_s": row.asked_per_s,
        "messages_per_s": round(row.messages_per_s, 1),
        "first": row.first and {"p50": round(row.first.p50, 6), "p99": round(row.first.p99, 6)},
        "gap": row.gap and {"p50": round(row.gap.p50, 6), "p99": round(row.gap.p99, 6)},
        "cpu_per_message": {name: round(used, 7) for name, used in row.cpu_per_message.items()},
    }


def cells(row: RelayRow) -> tuple[str, ...]:
    """A row of the table with the columns of ``HEADERS``."""
    return (
        row.path,
        str(row.streams),
        f"{row.asked_per_s:,.0f}" if row.asked_per_s else "one by one",
        f"{row.messages_per_s:,.0f}" if row.asked_per_s else "",
        f"{row.first.p50 * 1e3:.2f} ms" if row.first else "",
        f"{row.first.p99 * 1e3:.2f} ms" if row.first else "",
        f"{row.gap.p99 * 1e3:.1f} ms" if row.gap else "",
        ", ".join(f"{name} {used * 1e6:.0f} µs" for name, used in row.cpu_per_message.items()),
    )
