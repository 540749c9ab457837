"""A request's life: get an instance, pass its bytes on, and try once more if the instance was dead."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing

from controller.core import Core
from controller.instances import Instances
from controller.model import StartInfo
from controller.starts.starts import Lease, Starts
from dumont.errors import DeadlineExceeded, DumontError, FailedPrecondition, NotFound, Unavailable

# Kept back from a caller's deadline, so that the answer still reaches it in time.
MARGIN = 0.05

Build = Callable[[str], bytes]


class Serving:
    """Answers from deployments. Requests and answers are bytes that only the ends understand."""

    def __init__(self, core: Core, starts: Starts, instances: Instances) -> None:
        self._core = core
        self._starts = starts
        self._instances = instances

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
            with await self._starts.acquire(deployment, why) as lease:
                began = False
                outcome = "cancelled"
                try:
                    request = build(lease.info.instance)
                    frames = self._core.nodes.generate(lease.info.node, request, self._left(deadline))
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
            with await self._starts.acquire(deployment, why) as lease:
                outcome = "cancelled"
                try:
                    request = build(lease.info.instance)
                    answer = await self._core.nodes.embed(lease.info.node, request, self._left(deadline))
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
        return (*why, await self._instances.diagnose(lease.info.instance, error))

    def _count(self, method: str, lease: Lease, outcome: str) -> None:
        self._core.metrics.requests.labels(method, lease.info.tier.value, outcome).inc()

    def _check_engine(self, deployment: str, engine: str) -> None:
        known = self._core.deployments.get_active(deployment)
        if known.engine != engine:
            raise FailedPrecondition(
                "WRONG_ENGINE",
                f"deployments/{deployment} runs the engine {known.engine}, and this call needs {engine}",
                field="deployment",
                metadata={"engine": known.engine, "needed": engine},
            )

    def _deadline(self, timeout: float | None) -> float | None:
        return None if timeout is None else self._core.now() + timeout - MARGIN

    def _left(self, deadline: float | None) -> float | None:
        if deadline is None:
            return None
        left = deadline - self._core.now()
        if left <= 0:
            raise DeadlineExceeded("DEADLINE_EXCEEDED", "the caller's time was up when the model was ready")
        return left


def _dead(error: DumontError) -> bool:
    """Whether the instance, rather than the request, is at fault."""
    return isinstance(error, Unavailable | NotFound) or error.reason == "INSTANCE_NOT_SERVING"
