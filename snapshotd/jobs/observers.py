"""Report the progress of jobs to the log, the metrics, and the operation that a caller watches."""

from __future__ import annotations

from collections.abc import Callable

import structlog
from prometheus_client import Counter, Histogram

from dumont.errors import DumontError
from snapshotd.model import Phase

log = structlog.get_logger(__name__)

STEP_SECONDS = Histogram(
    "dumont_step_seconds",
    "Time of each step of each job.",
    ("job", "step"),
    buckets=(0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1, 3, 10, 30, 100),
)
STEP_FAILURES = Counter(
    "dumont_step_failures_total", "Steps that failed, by reason.", ("job", "step", "reason")
)


class JobObserver:
    """Reports the steps of one instance's jobs.

    Args:
        stage: told the name of each step as it begins; None if no operation watches.
    """

    def __init__(self, instance: str, stage: Callable[[str], None] | None) -> None:
        self.instance = instance
        self.stage = stage

    def step_started(self, name: str) -> None:
        """See :meth:`Observer.step_started`."""
        if self.stage is not None:
            self.stage(name)

    def step_ended(self, job: str, phase: Phase, error: BaseException | None) -> None:
        """See :meth:`Observer.step_ended`."""
        STEP_SECONDS.labels(job, phase.name).observe(phase.seconds)
        line = log.bind(instance=self.instance, job=job, step=phase.name, seconds=round(phase.seconds, 4))
        if error is None:
            line.info("step_done")
            return
        reason = error.reason if isinstance(error, DumontError) else type(error).__name__
        STEP_FAILURES.labels(job, phase.name, reason).inc()
        line.warning("step_failed", reason=reason, error=str(error))


class Observers:
    """Makes the observer of an instance's job.

    Attributes:
        stages: for each instance whose operation watches it, where the names of steps go.
    """

    def __init__(self) -> None:
        self.stages: dict[str, Callable[[str], None]] = {}

    def __call__(self, instance: str) -> JobObserver:
        """The observer of the jobs of an instance, by its id."""
        return JobObserver(instance, self.stages.get(instance))
