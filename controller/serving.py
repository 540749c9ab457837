"""A request's life: get an instance, pass its bytes on, and try once more if the instance was dead."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing

from controller.catalogue import Catalogue
from controller.metrics import Metrics
from controller.model import StartInfo
from controller.ports import Clock, Nodes
from controller.starter import Lease, Starter
from dumont.errors import DeadlineExceeded, DumontError, FailedPrecondition, NotFound, Unavailable

# Kept back from a caller's deadline, so that the answer still reaches it in time.
MARGIN = 0.05

Build = Callable[[str], bytes]


class Serving:
    """Answers from deployments. Requests and answers are bytes that only the ends understand."""

    def __init__(
        self, starter: Starter, nodes: Nodes, catalogue: Catalogue, clock: Clock, metrics: Metrics
    ) -> None:
        self._starter = starter
        self._nodes = nodes
        self._catalogue = catalogue
        self._clock = clock
        self._metrics = metrics

    async def generate(
        self, deployment: str, engine: str, build: Build, timeout: float | None
    ) -> AsyncGenerator[StartInfo | bytes]:
        """How the start went, then the node's frames. Nothing is given before the first frame is there.

        Args:
            deployment: its id.
            engine: the kind of model the request is for.
            build: makes the node's request for an instance id.
            timeout: seconds the caller will still wait, None for no end.

        Raises:
            FailedPrecondition: WRONG_ENGINE.
            DumontError: no instance could be started, or the answer broke off.
        """
        self._check_engine(deployment, engine)
        deadline = self._deadline(timeout)
        why: tuple[str, ...] = ()
        for last in (False, True):
            with await self._starter.acquire(deployment, why) as lease:
                began = False
                outcome = "cancelled"
                try:
                    request = build(lease.info.instance)
                    frames = self._nodes.generate(lease.info.node, request, self._left(deadline))
                    async with aclosing(frames):
                        async for frame in frames:
                            if not began:
                                began = True
                                yield lease.info
                            yield frame
                    if not began:
                        yield lease.info
                    outcome = "ok"
                    return
                except DumontError as error:
                    outcome = error.reason
                    if began or last or not _dead(error):
                        raise
                    why = await self._lost(lease, error, why)
                finally:
                    self._count("generate", lease, outcome)

    async def embed(
        self, deployment: str, engine: str, build: Build, timeout: float | None
    ) -> tuple[StartInfo, bytes]:
        """The whole answer at once; otherwise like ``generate``."""
        self._check_engine(deployment, engine)
        deadline = self._deadline(timeout)
        why: tuple[str, ...] = ()
        while True:
            with await self._starter.acquire(deployment, why) as lease:
                outcome = "cancelled"
                try:
                    request = build(lease.info.instance)
                    answer = await self._nodes.embed(lease.info.node, request, self._left(deadline))
                    outcome = "ok"
                    return lease.info, answer
                except DumontError as error:
                    outcome = error.reason
                    if why or not _dead(error):
                        raise
                    why = await self._lost(lease, error, why)
                finally:
                    self._count("embed", lease, outcome)

    async def _lost(self, lease: Lease, error: DumontError, why: tuple[str, ...]) -> tuple[str, ...]:
        return (*why, await self._starter.lost(lease.info.instance, error))

    def _count(self, method: str, lease: Lease, outcome: str) -> None:
        self._metrics.requests.labels(method, lease.info.tier.value, outcome).inc()

    def _check_engine(self, deployment: str, engine: str) -> None:
        known = self._catalogue.get_active(deployment)
        if known.engine != engine:
            raise FailedPrecondition(
                "WRONG_ENGINE",
                f"deployments/{deployment} runs the engine {known.engine}, and this call needs {engine}",
                field="deployment",
                metadata={"engine": known.engine, "needed": engine},
            )

    def _deadline(self, timeout: float | None) -> float | None:
        return None if timeout is None else self._clock.moment().steady + timeout - MARGIN

    def _left(self, deadline: float | None) -> float | None:
        if deadline is None:
            return None
        left = deadline - self._clock.moment().steady
        if left <= 0:
            raise DeadlineExceeded("DEADLINE_EXCEEDED", "the caller's time was up when the model was ready")
        return left


def _dead(error: DumontError) -> bool:
    """Whether the instance, rather than the request, is at fault."""
    return isinstance(error, Unavailable | NotFound) or error.reason == "INSTANCE_NOT_SERVING"
