"""How long each start will take, and how much memory each instance: moving estimates of what was measured.

Pure: measurements go in, estimates come out. A deployment is estimated by what it took on the same node, else
by what it took elsewhere, else by its size and the speed of the node, else by an assumption.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from enum import Enum
from typing import Final

from controller.model import InstanceState, Phase, Report, Tier, total_seconds


class Work(Enum):
    """What is estimated: a step towards an instance that serves, or towards room for one."""

    RESUME = "resume"
    RESTORE = "restore"
    FETCH = "fetch"
    START = "start"
    PARK = "park"
    STOP = "stop"


# The work of each tier.
WORK_OF: Final = {
    Tier.RESIDENT: (),
    Tier.PARKED: (Work.RESUME,),
    Tier.LOCAL: (Work.RESTORE,),
    Tier.REMOTE: (Work.FETCH, Work.RESTORE),
    Tier.COLD: (Work.START,),
}
# Assumed until something is measured: seconds, and bytes that are moved in one second.
ASSUMED: Final = {
    Work.RESUME: (0.25, 100e9),
    Work.RESTORE: (0.5, 10e9),
    Work.FETCH: (0.1, 500e6),
    Work.START: (15.0, 1e9),
    Work.PARK: (0.5, 10e9),
    Work.STOP: (0.3, 100e9),
}
# Stands for all nodes together.
ANYWHERE: Final = ""
# The share of a new measurement in a moving estimate.
NEWEST: Final = 0.3
# What an engine takes besides the weights of a model that was never measured: a share of the GPU for its KV
# cache, and its context and workspace; of memory, the interpreter and libraries.
ENGINE_SHARE: Final = 0.25
ENGINE_BYTES: Final = 1 << 30
ENGINE_RAM_BYTES: Final = 256 << 20


@dataclass(frozen=True, slots=True)
class Moving:
    """A moving mean, and of how many values."""

    value: float
    count: int = 1

    def moved(self, value: float) -> Moving:
        """The mean after one more value."""
        return Moving(self.value + NEWEST * (value - self.value), self.count + 1)


@dataclass(frozen=True, slots=True)
class Estimate:
    """Seconds that something will take, and what the estimate rests on."""

    seconds: float
    basis: str


@dataclass(frozen=True, slots=True)
class Size:
    """Bytes that an instance takes: of a GPU, and of memory while it serves and while it is parked."""

    gpu_bytes: int = 0
    ram_bytes: int = 0
    parked_bytes: int = 0


@dataclass(slots=True)
class _Measured:
    anywhere: Moving
    here: dict[str, Moving] = field(default_factory=dict)


class Estimates:
    """What was measured, by deployment and node.

    ``weights_bytes`` has the bytes of each deployment's weights, where they are known.
    """

    def __init__(self) -> None:
        self._measured: dict[tuple[str, Work], _Measured] = {}
        # Measured over assumed time, by node and over all nodes.
        self._speeds: dict[Work, dict[str, Moving]] = {work: {} for work in Work}
        self._sizes: dict[str, Size] = {}
        self.weights_bytes: dict[str, int] = {}

    # Measuring

    def took(self, deployment: str, node: str, work: Work, seconds: float, size_bytes: int = 0) -> None:
        """Note how long something took.

        Args:
            deployment: its id.
            node: the node's id.
            work: what was done.
            seconds: how long it took.
            size_bytes: of the snapshot or the weights, if it has to do with any.
        """
        known = self._measured.get((deployment, work))
        if known is None:
            self._measured[deployment, work] = _Measured(Moving(seconds), {node: Moving(seconds)})
        else:
            known.anywhere = known.anywhere.moved(seconds)
            here = known.here.get(node)
            known.here[node] = Moving(seconds) if here is None else here.moved(seconds)
        ratio = seconds / _assumed(work, size_bytes)
        speeds = self._speeds[work]
        for where in (node, ANYWHERE):
            speeds[where] = speeds[where].moved(ratio) if where in speeds else Moving(ratio)

    def learn(self, node: str, report: Report, before: Report | None, snapshot_bytes: int = 0) -> None:
        """Take in the phases and the size that a node reports of an instance.

        Args:
            node: the node's id.
            report: what it reports now.
            before: what it had reported; None: nothing.
            snapshot_bytes: the size of the snapshot that the instance came from, if it did.
        """
        if report.phases and (before is None or report.phases != before.phases):
            for work, seconds in measured(report.phases):
                size = snapshot_bytes if report.snapshot else self.weights_bytes.get(report.deployment, 0)
                self.took(report.deployment, node, work, seconds, size)
        if report.state is InstanceState.SERVING and (report.ram_bytes or report.gpu_bytes):
            known = self._sizes.get(report.deployment, Size())
            gpu = report.gpu_bytes or (known.gpu_bytes if report.gpu else 0)
            self._sizes[report.deployment] = Size(gpu, report.ram_bytes, known.parked_bytes)
        elif report.state is InstanceState.PARKED and report.ram_bytes:
            known = self._sizes.get(report.deployment, Size())
            gpu = report.gpu_bytes or known.gpu_bytes
            self._sizes[report.deployment] = Size(gpu, known.ram_bytes, report.ram_bytes)

    def needs(self, deployment: str, gpu_bytes: int) -> None:
        """A node says how much GPU memory an instance needs at least."""
        known = self.size(deployment)
        if known.gpu_bytes < gpu_bytes:
            self._sizes[deployment] = replace(known, gpu_bytes=gpu_bytes)

    def forget(self, deployment: str) -> None:
        """Drop what was measured of a deployment that is gone."""
        for work in Work:
            self._measured.pop((deployment, work), None)
        self._sizes.pop(deployment, None)
        self.weights_bytes.pop(deployment, None)

    # Estimating

    def seconds(self, deployment: str, node: str, work: Work, size_bytes: int = 0) -> float:
        """The estimate of one piece of work; see ``took`` for the arguments."""
        return self._timer(deployment, work, size_bytes)(node)

    def start(self, deployment: str, node: str, tier: Tier, size_bytes: int = 0) -> Estimate:
        """How long a start from a tier will take, and what says so.

        Args:
            deployment: its id.
            node: the node's id.
            tier: where it starts from.
            size_bytes: of the snapshot, or of the weights for a cold start.
        """
        works = WORK_OF[tier]
        seconds = sum(self.seconds(deployment, node, work, size_bytes) for work in works)
        return Estimate(seconds, ", ".join(self._basis(deployment, node, work) for work in works))

    def timer(self, deployment: str, tier: Tier, size_bytes: int = 0) -> Callable[[str], float]:
        """The seconds of ``start`` by node, for many nodes in a row."""
        timers = [self._timer(deployment, work, size_bytes) for work in WORK_OF[tier]]
        if len(timers) == 1:
            return timers[0]
        first, second = timers
        return lambda node: first(node) + second(node)

    def _timer(self, deployment: str, work: Work, size_bytes: int) -> Callable[[str], float]:
        known = self._measured.get((deployment, work))
        if known is not None and work is not Work.FETCH:
            here, anywhere = known.here, known.anywhere.value
            return lambda node: here[node].value if node in here else anywhere
        assumed, speeds = _assumed(work, size_bytes), self._speeds[work]
        usual = assumed * speeds[ANYWHERE].value if ANYWHERE in speeds else assumed
        return lambda node: assumed * speeds[node].value if node in speeds else usual

    def least(self, deployment: str, tier: Tier, size_bytes: int = 0) -> float:
        """A time below which no node is estimated to start the deployment from a tier."""
        return sum(self._least(deployment, work, size_bytes) for work in WORK_OF[tier])

    def size(self, deployment: str) -> Size:
        """The size of a deployment's instances; zeros where nothing is known."""
        known = self._sizes.get(deployment)
        if known is not None:
            return known if known.parked_bytes else Size(known.gpu_bytes, known.ram_bytes, known.ram_bytes)
        return Size()

    def gpu_bytes(self, deployment: str, whole: int) -> int:
        """GPU memory that a cold start will take: as measured, else by the weights; 0 if nothing is known.

        Args:
            deployment: its id.
            whole: what the GPU has for instances, of which an engine takes a share for its cache.
        """
        if (known := self._sizes.get(deployment)) is not None and known.gpu_bytes:
            return known.gpu_bytes
        if not (weights := self.weights_bytes.get(deployment, 0)):
            return 0
        least = weights + ENGINE_BYTES
        return max(least, min(whole, least + int(whole * ENGINE_SHARE)))

    def ram_bytes(self, deployment: str) -> int:
        """Memory that a cold start will take, as measured, else by the weights; 0 if nothing is known."""
        if (known := self._sizes.get(deployment)) is not None and known.ram_bytes:
            return known.ram_bytes
        weights = self.weights_bytes.get(deployment, 0)
        return weights + ENGINE_RAM_BYTES if weights else 0

    def _least(self, deployment: str, work: Work, size_bytes: int) -> float:
        known = self._measured.get((deployment, work))
        if known is not None and work is not Work.FETCH:
            return min(known.anywhere.value, *(here.value for here in known.here.values()))
        speeds = self._speeds[work].values()
        return _assumed(work, size_bytes) * min((speed.value for speed in speeds), default=1.0)

    def _basis(self, deployment: str, node: str, work: Work) -> str:
        known = self._measured.get((deployment, work))
        if known is not None and work is not Work.FETCH:
            here = known.here.get(node)
            times = f"measured here {here.count} times" if here else ""
            return f"{work.value} {times or f'measured elsewhere {known.anywhere.count} times'}"
        speeds = self._speeds[work]
        if node in speeds:
            return f"{work.value} by its size and the node's speed"
        return f"{work.value} by its size and {'other nodes' if speeds else 'assumption'}"


def measured(phases: Sequence[Phase]) -> Iterator[tuple[Work, float]]:
    """What the phases of an instance's last start, restore or resume measure."""
    names = {phase.name for phase in phases}
    fetch = sum(phase.seconds for phase in phases if phase.name == "fetch")
    total = total_seconds(phases)
    if names & {"criu", "restore"}:
        if fetch:
            yield Work.FETCH, fetch
        # Weights that were not in the node's memory come from its disk once. Counted as the speed of its
        # restores, they would make it look slow for every other deployment.
        weights = sum(phase.seconds for phase in phases if phase.name == "weights")
        yield Work.RESTORE, total - fetch - weights
    elif "load" in names:
        # A download of the model happens once.
        yield Work.START, total - fetch
    elif names & {"thaw", "cuda_restore"}:
        yield Work.RESUME, total


def _assumed(work: Work, size_bytes: int) -> float:
    seconds, speed = ASSUMED[work]
    return seconds + size_bytes / speed
