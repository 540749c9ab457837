"""Those who use the fleet while things go wrong: some ask, one operates it."""

from __future__ import annotations

import asyncio
import contextlib
import random
import time
from collections import Counter
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import Final

import dumont
from dumont.client import AsyncClient
from dumont.errors import Aborted, DumontError, ResourceExhausted, Unavailable

# What a caller may send again, with hope.
RETRYABLE: Final = (Unavailable, Aborted, ResourceExhausted)
# A single try, a cold start behind a stopped process included.
TRY_SECONDS: Final = 60.0
# What a caller with patience waits for an answer, over all tries.
PATIENCE_SECONDS: Final = 120.0
AGAIN_SECONDS: Final = 0.3
PROVOKE_SECONDS: Final = 2.0
PROMPTS: Final = ("The capital of France is", "One, two, three, four,", "The opposite of hot is")
TOKENS: Final = 6


@dataclass
class Tally:
    """What came of the requests. ``problems`` is what must never happen."""

    answered: int = 0
    # Answered, but not at the first try.
    retried: int = 0
    lost: int = 0
    wrong: int = 0
    tiers: Counter[str] = field(default_factory=Counter)
    refusals: Counter[str] = field(default_factory=Counter)
    operations: Counter[str] = field(default_factory=Counter)
    slowest: float = 0.0
    problems: list[str] = field(default_factory=list)


class Caller:
    """Asks one deployment after the other and compares the answers with those of a quiet time."""

    def __init__(self, endpoint: str, seed: int, tally: Tally, right: dict[str, str]) -> None:
        self._endpoint = endpoint
        self._random = random.Random(seed)
        self._tally = tally
        self._right = right

    async def run(self, deployments: list[str], stop: asyncio.Event) -> None:
        while not stop.is_set():
            await self.ask(self._random.choice(deployments), self._random.choice(PROMPTS))
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(self._random.uniform(0.0, 1.2)):
                    await stop.wait()

    async def ask(self, deployment: str, prompt: str) -> None:
        """Ask until there is an answer."""
        began = time.monotonic()
        tries = 0
        while True:
            tries += 1
            try:
                # Anew, as another process would: no channel that backs off.
                async with AsyncClient(self._endpoint) as client:
                    handle = await client.deployments.get(deployment)
                    answer = await handle.generate(prompt, max_new_tokens=TOKENS, timeout=TRY_SECONDS)
            except RETRYABLE as error:
                self._tally.refusals[f"{type(error).code} {error.reason}"] += 1
            except DumontError as error:
                self._tally.refusals[f"{type(error).code} {error.reason}"] += 1
                self._tally.problems.append(
                    f"a request to {deployment} ended with {type(error).code} {error.reason}: {error.message}"
                )
                return
            else:
                self._settle(deployment, prompt, answer, tries, time.monotonic() - began)
                return
            if time.monotonic() - began > PATIENCE_SECONDS:
                self._tally.lost += 1
                self._tally.problems.append(f"a request to {deployment} had no answer after {tries} tries")
                return
            await asyncio.sleep(AGAIN_SECONDS)

    def _settle(
        self, deployment: str, prompt: str, answer: dumont.Generation, tries: int, seconds: float
    ) -> None:
        self._tally.answered += 1
        self._tally.retried += tries > 1
        self._tally.tiers[answer.start.tier] += 1
        self._tally.slowest = max(self._tally.slowest, seconds)
        if answer.text != self._right.setdefault(prompt, answer.text):
            self._tally.wrong += 1
            self._tally.problems.append(
                f"{deployment} answered {prompt!r} with {answer.text!r}, not {self._right[prompt]!r}; "
                f"it came from {answer.start.tier}"
            )


class Operator:
    """Parks, stops, captures, deletes, verifies; what is refused now may be refused, for a reason."""

    def __init__(self, endpoint: str, seed: int, tally: Tally, model: str) -> None:
        self._endpoint = endpoint
        self._random = random.Random(seed)
        self._tally = tally
        self._model = model
        # Whether the deployment that it makes and deletes must be there; None: no answer said so.
        self.scratch: bool | None = False

    async def run(self, deployments: list[str], stop: asyncio.Event) -> None:
        while not stop.is_set():
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(self._random.uniform(0.2, 1.5)):
                    await stop.wait()
            work = self._random.choice(
                (
                    self.park,
                    self.stop,
                    self.stop,
                    self.capture,
                    self.forget,
                    self.forget,
                    self.verify,
                    self.remake,
                )
            )
            try:
                async with AsyncClient(self._endpoint) as client, asyncio.timeout(TRY_SECONDS):
                    await work(client, self._random.choice(deployments))
                self._tally.operations[f"{work.__name__}: done"] += 1
            except DumontError as error:
                self._tally.operations[f"{work.__name__}: {error.reason}"] += 1
            except TimeoutError:
                self._tally.problems.append(f"{work.__name__} was not answered within {TRY_SECONDS:.0f} s")

    async def provoke(self, phase: str, deployments: list[str]) -> None:
        """Bring instances into ``phase``, again and again; clients who ask do the rest."""
        work = {"parking": self.park, "parked": self.park, "restoring": self.stop}.get(phase, self.forget)
        while True:
            for deployment in deployments:
                with contextlib.suppress(DumontError, TimeoutError):
                    async with AsyncClient(self._endpoint) as client, asyncio.timeout(TRY_SECONDS):
                        # Without a snapshot one is on its way, and that is not to be disturbed.
                        if work == self.park or await client.snapshots.list(deployment):
                            await work(client, deployment)
            await asyncio.sleep(PROVOKE_SECONDS)

    async def park(self, client: AsyncClient, deployment: str) -> None:
        for instance in await client.instances.list(deployment):
            await client.instances.park(instance.name)

    async def stop(self, client: AsyncClient, deployment: str) -> None:
        for instance in await client.instances.list(deployment):
            await client.instances.stop(instance.name)

    async def capture(self, client: AsyncClient, deployment: str) -> None:
        await client.snapshots.create(deployment)

    async def forget(self, client: AsyncClient, deployment: str) -> None:
        """Its next start is cold, with a capture and an upload."""
        for snapshot in await client.snapshots.list(deployment):
            await client.snapshots.delete(snapshot.name)
        await self.stop(client, deployment)

    async def verify(self, client: AsyncClient, deployment: str) -> None:
        for snapshot in (await client.snapshots.list(deployment))[:1]:
            await client.snapshots.verify(snapshot.name)

    async def remake(self, client: AsyncClient, deployment: str) -> None:
        """Make a deployment that nobody asks, or delete it: what was acknowledged must hold."""
        made, self.scratch = self.scratch, None
        if made:
            await client.deployments.delete(SCRATCH)
        else:
            await client.deploy(self._model, name=SCRATCH)
        self.scratch = not made


SCRATCH: Final = "scratch"


async def keep_trying(work: Callable[[], Awaitable[None]], seconds: float) -> str:
    """Repeat ``work`` until it is done; its last error when time is up, else an empty string."""
    deadline = time.monotonic() + seconds
    while True:
        try:
            await work()
        except (DumontError, AssertionError) as error:
            if time.monotonic() > deadline:
                return f"{type(error).__name__} {error}"
            await asyncio.sleep(AGAIN_SECONDS)
        else:
            return ""
