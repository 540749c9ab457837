"""The life of a request: get an instance, pass the bytes on, and retry if the instance was dead or full."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from collections.abc import Set as AbstractSet
from dataclasses import dataclass
from functools import partial
from typing import Final, Protocol

from controller.core import Core
from controller.instances import PREEMPTED, Instances
from controller.model import StartInfo
from controller.ports import Frames
from controller.queue import Ticket
from controller.starts.starts import Lease, Starts
from dumont.errors import (
    Cancelled,
    DeadlineExceeded,
    DumontError,
    FailedPrecondition,
    NotFound,
    ResourceExhausted,
    Unavailable,
)

# Kept back from a caller's deadline, so that the answer still reaches it in time.
MARGIN: Final = 0.05
# A model host may have less room than it reported; the request then waits here and tries again.
FULL_TRIES: Final = 30
FULL_PAUSE: Final = 0.2


@dataclass(frozen=True, slots=True)
class Request:
    """A request for inference, as far as the controller reads it.

    Args:
        deployment: its id.
        engines: those that can answer it.
        build: makes the node's request for an instance id.
        timeout: seconds that the caller will still wait; None: for ever.
        sequences: answers that it asks for.
        size: in bytes, which it holds while it waits.
    """

    deployment: str
    engines: AbstractSet[str]
    build: Callable[[str], bytes]
    timeout: float | None = None
    sequences: int = 1
    size: int = 0


class Answer(Protocol):
    """Where an answer goes."""

    async def start(self, info: StartInfo) -> None:
        """Send how the start went; called once, before the first frame."""

    def hold(self, give_back: Callable[[], None]) -> None:
        """Something is held for as long as it is read; called once before ``start``.

        Args:
            give_back: to be called when it is read no more.
        """

    async def frame(self, frame: bytes, /) -> None:
        """Send a frame as the model host wrote it; returns when there is room for the next."""


class Serving:
    """Answers from deployments. Requests and answers are bytes that only the ends understand."""

    def __init__(self, core: Core, starts: Starts, instances: Instances) -> None:
        self._core = core
        self._starts = starts
        self._instances = instances

    async def generate(self, request: Request, answer: Answer) -> None:
        """Pass the whole answer on. Nothing is sent before the first frame has arrived.

        Raises:
            FailedPrecondition: WRONG_ENGINE.
            ResourceExhausted: QUEUE_FULL, too many requests wait for the deployment.
            DumontError: no instance could be started, or the answer broke off.
        """
        attempts = self._attempts(request)
        while True:
            with await self._starts.acquire(request.deployment, attempts.reasons, attempts.ticket) as lease:
                began = False
                outcome = "cancelled"
                instance = lease.info.instance
                try:
                    frames = self._core.nodes.generate(
                        lease.info.node, request.build(instance), attempts.left()
                    )
                    with self._instances.interruptible(instance, frames.cancel) as interruption:
                        try:
                            frame = await frames.read()
                            began = True
                            answer.hold(partial(_give_back, lease, frames))
                            await answer.start(lease.info)
                            while frame is not None:
                                await answer.frame(frame)
                                frame = await frames.read()
                        except Cancelled as error:
                            raise interruption.error or error from None
                        finally:
                            # However the caller's stream ended, the node stops computing.
                            frames.cancel()
                    outcome = "ok"
                    return
                except DumontError as error:
                    outcome = error.reason
                    if began:
                        raise
                    refused = error
                finally:
                    self._count("generate", lease, outcome)
            await attempts.again(lease.info.instance, refused)

    async def embed(self, request: Request) -> tuple[StartInfo, bytes]:
        """The start and the whole answer; otherwise like ``generate``."""
        attempts = self._attempts(request)
        while True:
            with await self._starts.acquire(request.deployment, attempts.reasons, attempts.ticket) as lease:
                outcome = "cancelled"
                try:
                    answer = await self._embed(lease, request, attempts.left())
                    outcome = "ok"
                    return lease.info, answer
                except DumontError as error:
                    outcome = error.reason
                    refused = error
                finally:
                    self._count("embed", lease, outcome)
            await attempts.again(lease.info.instance, refused)

    async def _embed(self, lease: Lease, request: Request, timeout: float | None) -> bytes:
        node, instance = lease.info.node, lease.info.instance
        call = asyncio.ensure_future(self._core.nodes.embed(node, request.build(instance), timeout))
        with self._instances.interruptible(instance, call.cancel) as interruption:
            try:
                return await call
            except asyncio.CancelledError:
                if interruption.error is None:
                    raise
                raise interruption.error from None

    def _attempts(self, request: Request) -> _Attempts:
        self._check_engine(request)
        deadline = None if request.timeout is None else self._core.now() + request.timeout - MARGIN
        return _Attempts(
            self._core, self._instances, self._starts.ticket(deadline, request.sequences, request.size)
        )

    def _count(self, method: str, lease: Lease, outcome: str) -> None:
        self._core.metrics.requests.labels(method, lease.info.tier.value, outcome).inc()

    def _check_engine(self, request: Request) -> None:
        known = self._core.deployments.get_active(request.deployment)
        if known.engine not in request.engines:
            needed = " or ".join(sorted(request.engines))
            raise FailedPrecondition(
                "WRONG_ENGINE",
                f"deployments/{known.id} runs the engine {known.engine}; this call needs {needed}",
                field="deployment",
                metadata={"engine": known.engine, "needed": needed},
            )


class _Attempts:
    """The attempts to answer one request, which keeps its place in the queue."""

    def __init__(self, core: Core, instances: Instances, ticket: Ticket) -> None:
        self.ticket = ticket
        self.reasons: tuple[str, ...] = ()
        self._core = core
        self._instances = instances
        self._died = False
        self._full = 0

    def left(self) -> float | None:
        """Seconds until the caller's deadline; None: it has none.

        Raises:
            DeadlineExceeded: it has passed.
        """
        if self.ticket.deadline is None:
            return None
        left = self.ticket.deadline - self._core.now()
        if left <= 0:
            raise DeadlineExceeded(
                "DEADLINE_EXCEEDED", "the caller's deadline passed before the model was ready"
            )
        return left

    async def again(self, instance: str, error: DumontError) -> None:
        """Return when the request may be tried again.

        Args:
            instance: the id of the instance that did not answer.
            error: what it answered instead.

        Raises:
            DumontError: ``error`` itself, where trying again would not help.
        """
        if error.reason == PREEMPTED:
            # No token was sent, so the request waits for its deployment's turn.
            self.reasons += (error.message,)
        elif isinstance(error, ResourceExhausted) and error.reason == "QUEUE_FULL":
            self._full += 1
            if self._full > FULL_TRIES:
                raise error
            pause = FULL_PAUSE if error.retry_after is None else error.retry_after
            left = self.left()
            await self._core.clock.sleep(pause if left is None else min(pause, left))
        elif _dead(error) and not self._died:
            self._died = True
            self.reasons += (await self._instances.diagnose(instance, error),)
        else:
            raise error


def _dead(error: DumontError) -> bool:
    """Whether the instance, rather than the request, is at fault."""
    return isinstance(error, Unavailable | NotFound) or error.reason == "INSTANCE_NOT_SERVING"


def _give_back(lease: Lease, frames: Frames) -> None:
    frames.cancel()
    lease.release()
