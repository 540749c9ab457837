"""Requests of every kind for as long as asked, with parks and captures between, while the memory of the
instance, of both services and of the GPUs is watched: what leaks shows as a slope.
"""

from __future__ import annotations

import asyncio
import contextlib
import random
import statistics
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from dumont.arguments import GenerateOptions
from dumont.benchmarks import configs
from dumont.benchmarks.machine import Gpus
from dumont.benchmarks.run import Subject
from dumont.benchmarks.serve import WORDS, Services
from dumont.client import AsyncClient, AsyncDeployment
from dumont.errors import DumontError, Internal

DEPLOYMENT: Final = "mixed"
CAPTURED: Final = "mixed-captured"
SAMPLE_SECONDS: Final = 5.0
PARK_SECONDS: Final = 20.0
QUIET_SECONDS: Final = 30.0
CAPTURE_SECONDS: Final = 120.0
# Memory grows while libraries warm up, so the slope is that of the samples after this share of them.
WARM_UP_SHARE: Final = 0.25
PROBE: Final = "the of and to"
PROBE_TOKENS: Final = 16
SYSTEM: Final = "in is was for on that by with as at the of and to " * 8
INSTANCE: Final = "instance"
GPUS: Final = "GPUs"
# What callers bring about themselves: they leave, are out of time, or ask for too much.
PROVOKED: Final = frozenset({"LEFT", "DEADLINE_EXCEEDED", "PROMPT_TOO_LONG", "INVALID_TOKEN_ID"})
HEADERS: Final = ("memory of", "first", "last", "least–most", "per hour")

Say = Callable[[str], None]


@dataclass(frozen=True)
class Asked:
    """One request; ``leaves``: seconds after which its caller hangs up, None for never."""

    prompt: str
    options: GenerateOptions
    leaves: float | None = None


def draw(chance: random.Random) -> Asked:
    """A request of any kind: most are short and plain."""
    prompt = " ".join(chance.choices(WORDS, k=round(1 + 300 * chance.random() ** 3)))
    if chance.random() < 0.2:
        prompt = SYSTEM + prompt
    options = GenerateOptions(max_new_tokens=round(1 + 200 * chance.random() ** 2))
    if chance.random() < 0.5:
        options["ignore_eos"] = True
    if chance.random() < 0.4:
        options["temperature"] = chance.choice((0.2, 0.7, 1.0, 1.5))
        options["top_p"] = chance.choice((0.5, 0.9, 1.0))
        options["top_k"] = chance.choice((0, 1, 40))
        options["min_p"] = chance.choice((0.0, 0.05))
        if chance.random() < 0.5:
            options["seed"] = chance.randrange(2**31)
    if chance.random() < 0.15:
        options["repetition_penalty"] = 1.2
        options["presence_penalty"] = 0.5
        options["frequency_penalty"] = 0.5
    if chance.random() < 0.1:
        options["logit_bias"] = {chance.randrange(200): 5.0, chance.randrange(200): -100.0}
    if chance.random() < 0.15:
        options["stop"] = [chance.choice(WORDS), "\n\n"]
    if chance.random() < 0.1:
        options["stop_token_ids"] = [chance.randrange(200)]
        options["min_new_tokens"] = 2
        options["max_new_tokens"] = max(2, options["max_new_tokens"] or 2)
    if chance.random() < 0.1:
        options["logprobs"] = chance.choice((0, 1, 5, 20))
    if chance.random() < 0.1:
        options["n"] = chance.choice((2, 3, 4))
    leaves = None
    fate = chance.random()
    if fate < 0.1:
        leaves = chance.random() * 0.5
    elif fate < 0.2:
        options["timeout"] = 0.01 + chance.random() * 0.5
    elif fate < 0.22:
        prompt = " ".join(WORDS) * 20_000
    elif fate < 0.24:
        options["stop_token_ids"] = [2**30]
    return Asked(prompt, options, leaves)


@dataclass
class Trend:
    """Bytes over time: seconds since the beginning, and bytes."""

    samples: list[tuple[float, int]] = field(default_factory=list)

    @property
    def bytes_per_hour(self) -> float | None:
        """The slope of the line through the samples after the warm-up; None for too few."""
        settled = self.samples[int(len(self.samples) * WARM_UP_SHARE) :]
        if len(settled) < 3:
            return None
        seconds, values = zip(*settled, strict=True)
        return statistics.linear_regression(seconds, values).slope * 3600


@dataclass
class Found:
    """What came of the run.

    Args:
        outcomes: requests by what became of them; ``OK`` for whole answers.
        tokens: that came.
        parks: of the instance.
        captures: of another deployment's instances, each restored once.
        probes: different answers to the same greedy request.
        instances: processes that were the instance in turn; one, unless one of them died.
        memory: by whose it is.
    """

    outcomes: Counter[str] = field(default_factory=Counter)
    tokens: int = 0
    parks: int = 0
    captures: int = 0
    probes: set[tuple[int, ...]] = field(default_factory=set)
    instances: list[int] = field(default_factory=list)
    memory: dict[str, Trend] = field(default_factory=dict)

    @property
    def failed(self) -> dict[str, int]:
        """Requests that failed and should not have."""
        fine = PROVOKED | {"OK"}
        return {reason: count for reason, count in self.outcomes.items() if reason not in fine}


def measure(subject: Subject, streams: int, seconds: float, directory: Path, say: Say) -> Found:
    """Load a model with requests of every kind.

    Args:
        subject: the model.
        streams: callers at once.
        seconds: how long.
        directory: an empty one.
        say: told what is being done.

    Raises:
        DumontError: what the services say of the deployment.
        Internal: INSTANCE_LOST.
    """
    model = subject.directory or directory / "model"
    if subject.directory is None:
        say(f"{subject.name}: making the model")
        configs.build(subject.name, model)
    say(f"{subject.name}: starting the services and loading")
    with Services(directory / "node") as services:
        return asyncio.run(_Run(services, str(model), streams, seconds, say).run())


class _Run:
    def __init__(self, services: Services, model: str, streams: int, seconds: float, say: Say) -> None:
        self._services = services
        self._model = model
        self._streams = streams
        self._seconds = seconds
        self._say = say
        self._gpus = Gpus.open()
        self._found = Found()
        self._began = time.monotonic()
        # An instance with requests is not parked: callers pause while one is.
        self._open = asyncio.Event()
        self._open.set()
        self._asking = 0
        self._quiet = asyncio.Event()

    async def run(self) -> Found:
        async with AsyncClient(self._services.controller) as client:
            deployment = await client.deploy(self._model, "checkpoint", name=DEPLOYMENT, idle_timeout=86400)
            await deployment.generate(PROBE, max_new_tokens=1)
            self._began = time.monotonic()
            callers = [
                asyncio.create_task(self._call(deployment, random.Random(number)))
                for number in range(self._streams)
            ]
            captures = asyncio.create_task(self._capture(client))
            try:
                await self._watch(client, deployment)
            finally:
                for task in (*callers, captures):
                    task.cancel()
                await asyncio.gather(*callers, captures, return_exceptions=True)
        return self._found

    async def _call(self, deployment: AsyncDeployment, chance: random.Random) -> None:
        while True:
            await self._open.wait()
            self._asking += 1
            self._quiet.clear()
            try:
                self._found.outcomes[await self._outcome(deployment, draw(chance))] += 1
            finally:
                self._asking -= 1
                if not self._asking:
                    self._quiet.set()

    async def _outcome(self, deployment: AsyncDeployment, asked: Asked) -> str:
        try:
            async with asyncio.timeout(asked.leaves):
                async for piece in deployment.stream(asked.prompt, **asked.options).pieces():
                    self._found.tokens += len(piece.token_ids)
        except TimeoutError:
            return "LEFT"
        except DumontError as error:
            return error.reason
        return "OK"

    async def _capture(self, client: AsyncClient) -> None:
        """Bring another deployment through a cold start, a capture, a restore and its end."""
        while True:
            await asyncio.sleep(CAPTURE_SECONDS)
            try:
                other = await client.deploy(self._model, "checkpoint", name=CAPTURED, idle_timeout=86400)
                await other.generate(PROBE, max_new_tokens=1)
                for instance in await client.instances.list(CAPTURED):
                    await client.instances.stop(instance.name)
                restored = await other.generate(PROBE, max_new_tokens=1)
                self._found.captures += restored.start.tier == "local"
                await other.delete()
            except DumontError as error:
                self._found.outcomes[f"capture: {error.reason}"] += 1

    async def _watch(self, client: AsyncClient, deployment: AsyncDeployment) -> None:
        """Sample memory and park, until the time is up."""
        services = self._services.pids()
        parked = told = time.monotonic()
        while (now := time.monotonic()) < self._began + self._seconds:
            with contextlib.suppress(DumontError):
                probe = await deployment.generate(PROBE, max_new_tokens=PROBE_TOKENS, ignore_eos=True)
                self._found.probes.add(probe.answers[0].token_ids)
            serving = [one for one in await client.instances.list(DEPLOYMENT) if one.state == "serving"]
            if serving:
                pid = serving[0].pid
                if pid not in self._found.instances:
                    self._found.instances.append(pid)
                self._sample(services | {INSTANCE: pid})
            if serving and now - parked >= PARK_SECONDS:
                parked = now
                await self._park(client, serving[0].name)
            if now - told >= 60:
                told = now
                self._say(_progress(self._found, now - self._began))
            await asyncio.sleep(SAMPLE_SECONDS)
        if not self._found.instances:
            raise Internal("INSTANCE_LOST", "no instance ever served; its log is in the node's state")

    async def _park(self, client: AsyncClient, instance: str) -> None:
        """Park between requests; the next one resumes it."""
        self._open.clear()
        try:
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._quiet.wait(), QUIET_SECONDS)
            await client.instances.park(instance)
            self._found.parks += 1
        except DumontError as error:
            self._found.outcomes[f"park: {error.reason}"] += 1
        finally:
            self._open.set()

    def _sample(self, pids: Mapping[str, int]) -> None:
        at = time.monotonic() - self._began
        for name, pid in pids.items():
            with contextlib.suppress(FileNotFoundError):
                self._found.memory.setdefault(name, Trend()).samples.append((at, _resident(pid)))
        if self._gpus:
            self._found.memory.setdefault(GPUS, Trend()).samples.append((at, self._gpus.used_bytes()))


def _resident(pid: int) -> int:
    status = Path(f"/proc/{pid}/status").read_text()
    return next((int(line.split()[1]) for line in status.splitlines() if line.startswith("VmRSS")), 0) * 1024


def _progress(found: Found, seconds: float) -> str:
    memory = ", ".join(f"{name} {trend.samples[-1][1] / 1e6:,.0f} MB" for name, trend in found.memory.items())
    done = f"{sum(found.outcomes.values()):,} requests, {found.parks} parks, {found.captures} captures"
    return f"{seconds / 60:.0f} min: {done}, failed: {found.failed or 'none'}; {memory}"


def document(found: Found, streams: int, seconds: float) -> dict[str, Any]:
    """The run as JSON."""
    return {
        "streams": streams,
        "seconds": round(seconds),
        "requests": sum(found.outcomes.values()),
        "tokens": found.tokens,
        "outcomes": dict(found.outcomes.most_common()),
        "failed": found.failed,
        "parks": found.parks,
        "captures": found.captures,
        "probe_answers": len(found.probes),
        "instances": len(found.instances),
        "memory": {
            name: {
                "first_bytes": trend.samples[0][1],
                "last_bytes": trend.samples[-1][1],
                "bytes_per_hour": None if trend.bytes_per_hour is None else round(trend.bytes_per_hour),
                "samples": [[round(at, 1), value] for at, value in trend.samples],
            }
            for name, trend in found.memory.items()
        },
    }


def rows(found: Found) -> list[Sequence[str]]:
    """The table of the memory, with the columns of ``HEADERS``."""
    return [
        (
            name,
            _megabytes(trend.samples[0][1]),
            _megabytes(trend.samples[-1][1]),
            f"{min(v for _, v in trend.samples) / 1e6:,.0f}–{max(v for _, v in trend.samples) / 1e6:,.0f} MB",
            "" if trend.bytes_per_hour is None else f"{trend.bytes_per_hour / 1e6:+,.1f} MB",
        )
        for name, trend in found.memory.items()
    ]


def _megabytes(value: int) -> str:
    return f"{value / 1e6:,.1f} MB"


def told(found: Found) -> dict[str, str]:
    """The rest of the run, in a few words each."""
    provoked = {reason: count for reason, count in found.outcomes.items() if reason in PROVOKED}
    return {
        "requests": f"{sum(found.outcomes.values()):,}, {found.outcomes['OK']:,} whole answers",
        "tokens": f"{found.tokens:,}",
        "ended by their callers": ", ".join(f"{count} {reason}" for reason, count in provoked.items()),
        "failed": ", ".join(f"{count} {reason}" for reason, count in found.failed.items()) or "none",
        "parks and captures": f"{found.parks}, {found.captures}",
        "answers to the same request": str(len(found.probes)),
        "processes": str(len(found.instances)),
    }
