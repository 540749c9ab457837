"""Room for an instance on a node: whether it fits, and which other instances must yield for it. Pure.

An idle instance yields to anyone: it is parked where that makes enough room, else it ends and only its
snapshot stays. One that is in use yields only to a strictly higher priority, and not within
``ACTIVE_SECONDS`` after it began to serve. Among those that may yield, the first is the one whose return
costs least for the time that it was not used.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Final

from controller.model import Gpu, Instance, InstanceState, Node

# An instance that is in use serves for so long before it yields, so that two deployments do not take turns
# at evicting each other.
ACTIVE_SECONDS: Final = 10.0
# Of a node's memory, what is kept free of parked instances.
FREE_SHARE: Final = 0.05
# States in which an instance holds no memory of a GPU.
OFF_GPU: Final = frozenset({InstanceState.PARKED, InstanceState.FAILED, InstanceState.GONE})


class How(Enum):
    """How an instance yields."""

    PARK = "park"
    STOP = "stop"


@dataclass(frozen=True, slots=True)
class Need:
    """What an instance needs that is to come to a node.

    Args:
        deployment: its id; its own instances do not yield for it.
        priority: of the deployment.
        gpu_bytes: of one GPU; 0 if it uses none or that is not known.
        ram_bytes: of memory, beyond what it takes there already.
        gpu: the UUID of the GPU that was chosen; empty: none is chosen yet.
        home: the UUID of the GPU that it was on when it was parked; it can only go to a GPU of that kind.
        instance: the id of the parked instance that is to resume; empty: it is a new one.
    """

    deployment: str
    priority: int = 0
    gpu_bytes: int = 0
    ram_bytes: int = 0
    gpu: str = ""
    home: str = ""
    instance: str = ""


@dataclass(frozen=True, slots=True)
class Tenant:
    """An instance that takes memory of a node, and what its deployment says about yielding it.

    Args:
        instance: the instance.
        priority: of its deployment.
        kept: its deployment keeps it serving without requests.
        wanted: requests wait for its deployment, or a start of it is under way.
        ours: whether this controller may touch it.
        resume_seconds: how long it would take to bring it back once it was parked.
        back_seconds: the same once it has ended.
        park_seconds, stop_seconds: how long it takes to park or to stop it.
        parked_bytes: of memory, while it is parked.
    """

    instance: Instance
    priority: int = 0
    kept: bool = False
    wanted: bool = False
    ours: bool = True
    resume_seconds: float = 0.5
    back_seconds: float = 1.0
    park_seconds: float = 0.0
    stop_seconds: float = 0.0
    parked_bytes: int = 0

    @property
    def in_use(self) -> bool:
        """Whether it yields only to a higher priority."""
        return self.kept or self.wanted or self.instance.in_flight > 0

    def return_seconds(self, how: How) -> float:
        """How long it would take to bring it back after it has yielded."""
        return self.resume_seconds if how is How.PARK else self.back_seconds

    def yield_seconds(self, how: How) -> float:
        """How long it takes until it has yielded."""
        return self.park_seconds if how is How.PARK else self.stop_seconds

    def loss(self, how: How, now: float) -> float:
        """How much its yielding costs: seconds to bring it back, for each second that it was not used."""
        return self.return_seconds(how) / (1.0 + max(0.0, now - self.instance.idle_since))


@dataclass(frozen=True, slots=True)
class Yield:
    """An instance makes room.

    ``seconds``: how long that takes. ``drains``: it is in use, and answers its requests first.
    """

    instance: str
    how: How
    seconds: float
    drains: bool
    reason: str


@dataclass(frozen=True, slots=True)
class Room:
    """There is room on a GPU (empty: none is needed or chosen), once some instances have yielded."""

    gpu: str = ""
    yields: tuple[Yield, ...] = ()

    @property
    def seconds(self) -> float:
        """How long it takes to make the room."""
        return sum(one.seconds for one in self.yields)


@dataclass(frozen=True, slots=True)
class NoRoom:
    """Why there is no room. ``never``: there would be none even if every instance ended."""

    reason: str
    never: bool = False


def find(node: Node, tenants: Sequence[Tenant], need: Need, now: float) -> Room | NoRoom:
    """The room for an instance on a node that costs least.

    Args:
        node: the node.
        tenants: every instance on it.
        need: what the instance needs.
        now: monotonic time in seconds.
    """
    found: list[tuple[tuple[float, bool, int, int], Room]] = []
    refusals: list[NoRoom] = []
    for number, gpu in enumerate(_gpus(node, need)):
        plan = _Plan(node, tenants, need, now, gpu)
        refusal = plan.make()
        if refusal is not None:
            refusals.append(refusal)
            continue
        room = Room(gpu.uuid if gpu is not None and need.gpu_bytes else "", plan.yields())
        away = gpu is not None and gpu.uuid != need.home
        found.append(((plan.lost(), away, -plan.free_gpu, number), room))
    if found:
        return min(found, key=lambda one: one[0])[1]
    return next((one for one in refusals if not one.never), refusals[0])


def standing(tenant: Tenant, now: float) -> Iterator[str]:
    """To whom an instance yields, and how long it would take to bring it back, each as a sentence."""
    instance = tenant.instance
    if not tenant.ours:
        yield "it yields to nobody: it is not this controller's"
        return
    if instance.state not in (InstanceState.SERVING, InstanceState.PARKED):
        yield f"it is {instance.state.name.lower()}, and yields to nobody meanwhile"
        return
    if not tenant.in_use:
        yield f"it has not been used for {max(0.0, now - instance.idle_since):.0f} s, and yields to anyone"
    else:
        use = "answers requests" if instance.in_flight else "is kept" if tenant.kept else "is wanted"
        yield f"it {use}, and yields to a priority above {tenant.priority}"
    ended = f"{tenant.back_seconds:.1f} s after its process has ended"
    yield f"it would be back in {tenant.resume_seconds:.1f} s from a park, and in {ended}"


def lacking(node: Node, instances: Iterable[Instance]) -> tuple[int, int]:
    """The bytes by which parked instances exceed their budget, and by which the node lacks free memory."""
    limit = node.parked_memory_limit_bytes
    parked = sum(i.report.ram_bytes for i in instances if i.state is InstanceState.PARKED) if limit else 0
    free = int(node.memory_total_bytes * FREE_SHARE)
    return max(0, parked - limit), max(0, free - node.memory_available_bytes)


def reclaim(node: Node, tenants: Sequence[Tenant], now: float) -> tuple[Yield, ...]:
    """The parked instances that end because parked ones take more memory than they may, or it is short.

    Args:
        node: the node.
        tenants: every instance on it.
        now: monotonic time in seconds.
    """
    parked = [t for t in tenants if t.instance.state is InstanceState.PARKED]
    over, short = lacking(node, (tenant.instance for tenant in parked))
    why = (
        f"parked instances take more than {_mib(node.parked_memory_limit_bytes)} of nodes/{node.id}"
        if over >= short
        else f"nodes/{node.id} has only {_mib(node.memory_available_bytes)} of memory left"
    )
    left = max(over, short)
    ends: list[Yield] = []
    for tenant in sorted(parked, key=lambda t: (t.loss(How.STOP, now), t.instance.id)):
        if left <= 0:
            break
        if tenant.ours and not tenant.wanted and not tenant.instance.busy:
            left -= tenant.instance.report.ram_bytes
            ends.append(Yield(tenant.instance.id, How.STOP, tenant.stop_seconds, False, why))
    return tuple(ends)


def _gpus(node: Node, need: Need) -> Iterable[Gpu | None]:
    if not node.gpus or not need.gpu_bytes:
        return (None,)
    home = next((gpu for gpu in node.gpus if gpu.uuid == need.home), None)
    if home is None:
        return node.gpus
    return [gpu for gpu in node.gpus if (gpu.model, gpu.total_bytes) == (home.model, home.total_bytes)]


class _Plan:
    """Who yields so that the need is met on one GPU, or in memory alone."""

    def __init__(
        self, node: Node, tenants: Sequence[Tenant], need: Need, now: float, gpu: Gpu | None
    ) -> None:
        self.node = node
        self.need = need
        self.now = now
        self.gpu = gpu
        self.others = [tenant for tenant in tenants if tenant.instance.id != need.instance]
        self.how: dict[str, How] = {}
        self.by_id = {tenant.instance.id: tenant for tenant in self.others}
        used = sum(held_bytes(t.instance, gpu.uuid) for t in self.others) if gpu else 0
        self.free_gpu = gpu.total_bytes - gpu.other_bytes - used if gpu else 0
        self.ram = sum(tenant.instance.report.ram_bytes for tenant in tenants) + need.ram_bytes
        self.parked = sum(
            t.instance.report.ram_bytes for t in self.others if t.instance.state is InstanceState.PARKED
        )

    def make(self) -> NoRoom | None:
        """Choose who yields; the reason if nobody's yielding is enough."""
        if self.gpu is not None and (refusal := self._make_gpu_room(self.gpu)) is not None:
            return refusal
        return self._make_memory_room()

    def yields(self) -> tuple[Yield, ...]:
        """Who yields and how; those that end first, because a park may need their memory."""
        order = sorted(self.how.items(), key=lambda one: one[1] is How.PARK)
        return tuple(self._yield(self.by_id[instance], how) for instance, how in order)

    def lost(self) -> float:
        """Seconds that making room takes, and that bringing everybody back would take."""
        return sum(
            tenant.return_seconds(how) + tenant.yield_seconds(how)
            for instance, how in self.how.items()
            for tenant in (self.by_id[instance],)
        )

    def _make_gpu_room(self, gpu: Gpu) -> NoRoom | None:
        needed = self.need.gpu_bytes
        if needed > gpu.total_bytes - gpu.other_bytes:
            return NoRoom(
                f"it needs {_mib(needed)} of GPU memory, and {gpu.uuid} of nodes/{self.node.id} has "
                f"{_mib(gpu.total_bytes)}, of which {_mib(gpu.other_bytes)} are not Dumont's",
                never=True,
            )
        there = [t for t in self.others if held_bytes(t.instance, gpu.uuid)]
        free = self.free_gpu
        chosen: list[Tenant] = []
        for tenant in self._willing(there, How.PARK):
            if free >= needed:
                break
            chosen.append(tenant)
            free += tenant.instance.report.gpu_bytes
        if free < needed:
            return NoRoom(
                f"{gpu.uuid} of nodes/{self.node.id} has {_mib(max(0, self.free_gpu))} free of the "
                f"{_mib(needed)} that it needs{self._holders(there, chosen)}"
            )
        for tenant in reversed(chosen[:-1]):
            # Chosen before a larger one that makes enough room without it.
            if free - tenant.instance.report.gpu_bytes >= needed:
                free -= tenant.instance.report.gpu_bytes
                chosen.remove(tenant)
        for tenant in chosen:
            parks = self.node.checkpoint_capable and not tenant.instance.park_refused
            self.how[tenant.instance.id] = How.PARK if parks else How.STOP
        return None

    def _make_memory_room(self) -> NoRoom | None:
        limit, parked_limit = self.node.instance_memory_limit_bytes, self.node.parked_memory_limit_bytes
        if limit and self.need.ram_bytes > limit:
            return NoRoom(
                f"it needs {_mib(self.need.ram_bytes)} of memory, and nodes/{self.node.id} has "
                f"{_mib(limit)} for instances",
                never=True,
            )
        if limit and self.need.instance:
            # Instances may have outgrown the limit; that one of them resumes does not make it worse.
            limit = max(limit, self.ram - self.need.ram_bytes)

        def over() -> bool:
            ram, parked = self.ram, self.parked
            for instance, how in self.how.items():
                tenant = self.by_id[instance]
                if how is How.STOP:
                    ram -= tenant.instance.report.ram_bytes
                    if tenant.instance.state is InstanceState.PARKED:
                        parked -= tenant.instance.report.ram_bytes
                else:
                    ram += max(0, tenant.parked_bytes - tenant.instance.report.ram_bytes)
                    parked += tenant.parked_bytes
            more_parked = any(how is How.PARK for how in self.how.values())
            return bool(limit and ram > limit) or bool(parked_limit and more_parked and parked > parked_limit)

        parks, ended = dict(self.how), []
        for tenant in self._ends():
            if not over():
                break
            self.how[tenant.instance.id] = How.STOP
            ended.append(tenant.instance.id)
        if over():
            return NoRoom(
                f"nodes/{self.node.id} has {_mib(max(0, limit - self.ram + self.need.ram_bytes))} of memory "
                f"left for instances, and it needs {_mib(self.need.ram_bytes)}"
                f"{self._holders(self.others, [])}"
            )
        for instance in ended[-2::-1]:
            # Ended before a larger one that makes enough room without it.
            before = parks.get(instance)
            if before is None:
                del self.how[instance]
            else:
                self.how[instance] = before
            if over():
                self.how[instance] = How.STOP
        return None

    def _ends(self) -> Iterator[Tenant]:
        """Who may end to free memory: parked ones, then those that were to be parked, then others."""
        willing = self._willing(self.others, How.STOP)
        yield from (t for t in willing if t.instance.state is InstanceState.PARKED)
        yield from (t for t in willing if self.how.get(t.instance.id) is How.PARK)
        yield from (t for t in willing if t.instance.id not in self.how)

    def _willing(self, tenants: Iterable[Tenant], how: How) -> list[Tenant]:
        """Those that may yield, the least loss first; idle ones before those in use."""
        return sorted(
            (tenant for tenant in tenants if not self._unwilling(tenant)),
            key=lambda t: (
                t.in_use,
                t.priority if t.in_use else 0,
                t.loss(how, self.now),
                t.instance.id,
            ),
        )

    def _unwilling(self, tenant: Tenant) -> str:
        """Why a tenant does not yield; empty if it does."""
        instance = tenant.instance
        if not tenant.ours:
            return "is not this controller's"
        if instance.busy or instance.state not in (InstanceState.SERVING, InstanceState.PARKED):
            return f"is {instance.state.name.lower()}"
        if instance.deployment == self.need.deployment:
            return "is the deployment's own"
        if not tenant.in_use:
            return ""
        if tenant.priority >= self.need.priority:
            return f"is in use and has priority {tenant.priority}, which is not below {self.need.priority}"
        if instance.state is InstanceState.SERVING and self.now - instance.since < ACTIVE_SECONDS:
            return f"is in use and has served for less than {ACTIVE_SECONDS:g} s"
        return ""

    def _holders(self, tenants: Iterable[Tenant], yielding: Sequence[Tenant]) -> str:
        held = [f"instances/{t.instance.id} {why}" for t in tenants if (why := self._unwilling(t))]
        return f": {'; '.join(held[:3])}" + (" …" if len(held) > 3 else "") if held else ""

    def _yield(self, tenant: Tenant, how: How) -> Yield:
        instance = tenant.instance
        idle = max(0.0, self.now - instance.idle_since)
        if not tenant.in_use:
            why = f"it was not used for {idle:.0f} s"
        else:
            why = f"its priority is {tenant.priority}, below {self.need.priority}"
        word = "parks" if how is How.PARK else "ends"
        reason = (
            f"instances/{instance.id} {word}: {why}, and it is back in {tenant.return_seconds(how):.1f} s"
        )
        return Yield(instance.id, how, tenant.yield_seconds(how), instance.in_flight > 0, reason)


def held_bytes(instance: Instance, gpu: str) -> int:
    """Memory of a GPU that an instance holds now, or is about to."""
    report = instance.report
    return 0 if report.gpu != gpu or instance.state in OFF_GPU else report.gpu_bytes


def active_from(instance: Instance) -> float:
    """The monotonic time from which an instance that is in use may yield."""
    return instance.since + ACTIVE_SECONDS


def _mib(size: int) -> str:
    return f"{size >> 20} MiB"
