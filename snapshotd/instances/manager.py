"""The instances of this node: their records, their jobs, and the watchers of their changes.

A request arrives here. The table of transitions in ``lifecycle`` decides whether it is legal, the executor
runs its job, and the end of the job is the next event for the table. Every living instance is in the journal,
so that the next daemon can take it over.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections import OrderedDict
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from dataclasses import replace

import structlog

from dumont.errors import (
    Aborted,
    AlreadyExists,
    DeadlineExceeded,
    DumontError,
    FailedPrecondition,
    NotFound,
)
from snapshotd import jobs
from snapshotd.failpoints import Failpoints
from snapshotd.instances.journal import Journal
from snapshotd.instances.lifecycle import Event, advance
from snapshotd.instances.record import Change, Record
from snapshotd.instances.recovery import recover, sweep
from snapshotd.jobs import actions
from snapshotd.jobs.context import Node
from snapshotd.jobs.executor import Action, Observer, Step, as_defect, run_job
from snapshotd.model import Instance, Model, Phase, Snapshot, State
from snapshotd.ports import Host

log = structlog.get_logger(__name__)

# Failed instances that are remembered, so that callers can ask for the reason.
FAILED_KEPT = 64
# States in which an instance may be ended because its weights have changed; all others lead to these.
RESTING = (State.SERVING, State.PARKED)
# Between two looks at the weight files that instances map.
WEIGHTS_SECONDS = 5.0
# Jobs that go on when their caller leaves. An instance that is half stopped or half resumed is of no use,
# and a model host that drains for a park reads no other command meanwhile, not even one that cancels it.
UNCANCELLED_JOBS = ("stop", "park", "suspend", "resume")


class Instances:
    """Every instance of this node."""

    def __init__(
        self, node: Node, journal: Journal, observer: Callable[[str], Observer], failpoints: Failpoints
    ) -> None:
        """
        Args:
            observer: makes the observer of a job from the id of its instance.
        """
        self.node = node
        self.journal = journal
        self.observer = observer
        self.failpoints = failpoints
        self.pinned: dict[str, int] = {}
        self._records: OrderedDict[str, Record] = OrderedDict()
        self._listeners: set[asyncio.Queue[Change]] = set()
        # References that keep the tasks alive: the caller of a job may leave before it ends.
        self._settling: set[asyncio.Task[Instance]] = set()

    # Queries

    def get(self, instance: str) -> Instance:
        """An instance by its id.

        Raises:
            NotFound: INSTANCE_NOT_FOUND.
        """
        return self._record(instance).instance

    def all(self) -> list[Instance]:
        """Every instance, including the failed ones that are remembered."""
        return [record.instance for record in self._records.values()]

    @contextlib.asynccontextmanager
    async def changes(self) -> AsyncIterator[asyncio.Queue[Change]]:
        """A queue that first holds every instance, then each change as it happens."""
        queue: asyncio.Queue[Change] = asyncio.Queue()
        for instance in self.all():
            queue.put_nowait(Change(instance))
        self._listeners.add(queue)
        try:
            yield queue
        finally:
            self._listeners.discard(queue)

    # Requests. ``admit`` registers or refuses an instance at once; its job then runs until it serves.

    def admit(self, instance: Instance) -> None:
        """Register a new instance.

        Raises:
            AlreadyExists: INSTANCE_EXISTS, its id is in use; nothing has changed.
        """
        existing = self._records.get(instance.id)
        if existing is not None and (existing.instance.state is not State.FAILED or existing.ending.locked()):
            raise AlreadyExists(
                "INSTANCE_EXISTS",
                f"instances/{instance.id} exists and is {existing.instance.state.name}; choose another id",
                field="instance_id",
                metadata={"instance": instance.id},
            )
        self._records[instance.id] = Record(instance)
        self._publish(self._records[instance.id])

    async def start(self, instance: str, model: Model, gpu: str = "") -> Instance:
        """Load a model into an admitted instance.

        Args:
            gpu: UUID or index of the GPU to load it on; empty for the one with the most free memory.
        """
        record = self._record(instance)
        return await self._settle(record, "start", jobs.start(self.node, record, model, gpu))

    async def restore(
        self, instance: str, snapshot: Snapshot, fetch: Action | None = None, gpu: str = ""
    ) -> Instance:
        """Restore an admitted instance from a snapshot.

        Args:
            fetch: fetches the snapshot to this node; None if it is here.
            gpu: UUID or index of the GPU to restore it on; empty for the one with the most free memory.
        """
        record = self._record(instance)
        with self._pin(snapshot.manifest.id):
            steps = jobs.restore(self.node, record, snapshot, fetch, gpu)
            return await self._settle(record, "restore", steps)

    async def capture(self, instance: str, snapshot: str) -> Snapshot:
        """Capture a serving instance as a new snapshot; it serves on."""
        record = self._record(instance)
        self._check_unshared(record, Event.CAPTURE)
        await self._check_weights(record)
        self._advance(record, Event.CAPTURE)
        capture = jobs.Capture(self.node, record, snapshot)
        # A restored instance maps the snapshot that it came from, and the new snapshot copies from there.
        with self._pin(record.instance.snapshot):
            await self._settle(record, "capture", capture.steps(), capture.phases)
        if capture.result is None:
            raise Aborted(
                "CAPTURE_INCOMPLETE", f"the capture of instances/{instance} ended without a snapshot"
            )
        return capture.result

    async def park(self, instance: str) -> Instance:
        """Give up the GPU of a serving instance or, without one, stop its process."""
        record = self._record(instance)
        self._check_unshared(record, Event.PARK)
        self._advance(record, Event.PARK)
        return await self._settle(record, "park", jobs.park(self.node, record))

    async def suspend(self, instance: str) -> Instance:
        """Like ``park``, of an instance on a GPU, but its requests stay and go on when it resumes.

        Raises:
            FailedPrecondition: NOT_PAUSABLE, its engine can only be parked; it serves on.
        """
        record = self._record(instance)
        self._check_unshared(record, Event.PARK)
        self._advance(record, Event.PARK)
        return await self._settle(record, "suspend", jobs.suspend(self.node, record))

    async def resume(self, instance: str, gpu: str = "") -> Instance:
        """Let a parked instance serve again.

        Args:
            gpu: UUID or index of the GPU to resume on; empty for the one it was on or, if that has too little
                memory, another one that it can go to.

        Raises:
            InvalidArgument, FailedPrecondition: it cannot go to that GPU; it stays parked.
            ResourceExhausted: there is too little GPU memory for it now; it stays parked.
        """
        record = self._record(instance)
        # Checked before its state changes: without GPU memory it stays parked.
        self._check_unshared(record, Event.RESUME)
        await self._check_weights(record)
        target = actions.reserve_gpu_to_resume(self.node, record.instance, gpu)
        self._advance(record, Event.RESUME)
        return await self._settle(record, "resume", jobs.resume(self.node, record, target))

    async def stop(self, instance: str) -> None:
        """End an instance in any state. A job under way is cancelled and undone first."""
        record = self._record(instance)
        self._advance(record, Event.STOP)
        await self._settle(record, "stop", jobs.stop(self.node, record))

    async def stop_all(self) -> None:
        """End every instance, as far as that succeeds."""
        for instance in self.all():
            with contextlib.suppress(DumontError):
                await self.stop(instance.id)

    async def measure(self, instance: str) -> None:
        """Ask an instance for its capacity and load, and report them to the watchers if they have changed.

        Nothing changes if a job is under way or the model host does not answer.
        """
        record = self._records.get(instance)
        if record is None or record.host is None or not _idle(record):
            return
        try:
            answer = await record.host.call("status", self.node.deadlines.serve)
        except DumontError as error:
            log.info("load_not_measured", instance=instance, reason=error.reason)
            return
        measured = actions.with_load(record.instance, answer)
        if measured.gpu:
            measured = actions.with_gpu_usage(self.node, measured, self.node.process_tree(measured.pid))
        if _idle(record) and measured != record.instance:
            record.instance = measured
            self._publish(record)

    # Taking over from an earlier daemon

    async def take_over(self) -> None:
        """Adopt the instances of an earlier daemon that still live, and clean up after the others."""
        hosts = {host.instance: host for host in await self.node.hosts.find()}
        await self.node.hosts.end_orphans(self.node.instance_directory(""))
        for instance in self.journal.read():
            host = hosts.pop(instance.id, None)
            record = Record(instance, host)
            self.node.weights.repin(instance.id, instance.weight_files)
            try:
                if host is None or host.lost.is_set():
                    raise Aborted("HOST_LOST", "its process ended while no snapshotd ran")
                record.instance = await recover(self.node, instance, host)
            except DumontError as error:
                log.warning("instance_not_taken_over", instance=instance.id, reason=error.reason)
                await self._forget(record)
                continue
            self._records[instance.id] = record
            self._watch(record, host)
            self._publish(record)
            log.info(
                "instance_taken_over", instance=instance.id, pid=host.pid, state=record.instance.state.name
            )
        for host in hosts.values():
            # A host whose journal entry is gone was being stopped.
            try:
                await host.release()
            except DumontError as error:
                log.error("model_host_not_ended", instance=host.instance, reason=error.reason)
        await asyncio.to_thread(sweep, self.node, frozenset(self._records))

    async def _forget(self, record: Record) -> None:
        """End what is left of an instance that is not taken over. The daemon starts even if that fails."""
        instance = record.instance.id
        try:
            await self._clean_up(record)
        except DumontError as error:
            log.error("instance_not_cleaned_up", instance=instance, reason=error.reason)
        self.journal.forget(instance)

    async def detach(self) -> None:
        """Stop watching the instances once the jobs under way have ended. They run on for the next daemon."""
        if self._settling:
            await asyncio.wait(self._settling)
        for record in self._records.values():
            if record.watch is not None:
                record.watch.cancel()

    # Running jobs

    async def _settle(
        self, record: Record, job: str, steps: Sequence[Step], phases: list[Phase] | None = None
    ) -> Instance:
        """Run a job once the one it replaces has been undone, and advance the instance by its outcome.

        If the caller is cancelled, so is the job, unless it is one of ``UNCANCELLED_JOBS``. Either way its
        outcome advances the instance.
        """
        done: list[Phase] = [] if phases is None else phases
        task = asyncio.create_task(
            self._run(record, job, steps, done, record.job), name=f"{job} {record.instance.id}"
        )
        record.job = task
        settling = asyncio.create_task(
            self._conclude(record, job, task, done, record.host), name=f"{job} {record.instance.id} ends"
        )
        self._settling.add(settling)
        settling.add_done_callback(self._settled)
        try:
            return await asyncio.shield(settling)
        except asyncio.CancelledError:
            if job not in UNCANCELLED_JOBS:
                task.cancel()
            await asyncio.wait([settling])
            raise

    def _settled(self, settling: asyncio.Task[Instance]) -> None:
        self._settling.discard(settling)
        error = None if settling.cancelled() else settling.exception()
        if error is not None and not isinstance(error, DumontError):
            log.error("job_not_concluded", task=settling.get_name(), exc_info=error)

    async def _run(
        self,
        record: Record,
        job: str,
        steps: Sequence[Step],
        done: list[Phase],
        previous: asyncio.Task[None] | None,
    ) -> None:
        if previous is not None:
            previous.cancel()
            await asyncio.wait([previous])
        observer = self.observer(record.instance.id)
        limit = self.node.deadlines.start if job in ("start", "restore") else None
        try:
            async with asyncio.timeout(limit), record.ending if job == "stop" else contextlib.nullcontext():
                await run_job(job, steps, self.node.clock, observer, self.failpoints, done)
        except TimeoutError:
            raise DeadlineExceeded(
                "START_TIMEOUT",
                f"the {job} of instances/{record.instance.id} did not end within {limit:g} s; see the "
                "instance's log, or raise --start-timeout-seconds",
                metadata={"instance": record.instance.id},
            ) from None

    async def _conclude(
        self, record: Record, job: str, task: asyncio.Task[None], done: list[Phase], host: Host | None
    ) -> Instance:
        try:
            await task
        except asyncio.CancelledError:
            cancelled = Aborted("CANCELLED", f"the {job} of instances/{record.instance.id} was cancelled")
            await self._fail(record, cancelled)
            raise cancelled from None
        except Exception as failure:
            # Whatever the failure is, the job has ended, and the state of the instance must say so.
            error = failure if isinstance(failure, DumontError) else as_defect(job, "", failure)
            if job == "stop":
                # Kept, so that the next stop can end it.
                record.host = record.host or host
                self._advance(record, Event.FAILED, error.reason, error.message)
            else:
                await self._fail(record, error)
            if error is failure:
                raise
            raise error from failure
        finally:
            if self.node.gpus is not None:
                self.node.gpus.reservations.release(record.instance.id)
            self.node.disk.release(record.instance.id)
            if record.job is task:
                record.job = None
        if record.instance.state is State.STOPPING and job != "stop":
            raise Aborted("CANCELLED", f"instances/{record.instance.id} was stopped at the end of its {job}")
        if job in ("start", "restore", "resume"):
            record.instance = replace(record.instance, phases=record.with_parts(done))
        self._advance(record, Event.SUCCEEDED)
        if record.watch is None and record.host is not None:
            self._watch(record, record.host)
        return record.instance

    async def _fail(self, record: Record, error: DumontError) -> None:
        if record.instance.state in (State.STOPPING, State.FAILED, State.GONE):
            # A stop has replaced the job, or the loss of the process was noticed first. That decided it.
            return
        lost = record.host is None or record.host.lost.is_set()
        await self._end(record, Event.LOST if lost else Event.FAILED, error.reason, error.message)

    async def _end(self, record: Record, event: Event, reason: str, message: str) -> None:
        self._advance(record, event, reason, message)
        if record.instance.state is State.FAILED:
            await self._clean_up(record)

    async def _clean_up(self, record: Record) -> None:
        steps = jobs.stop(self.node, record)
        observer = self.observer(record.instance.id)
        async with record.ending:
            await run_job("clean_up", steps, self.node.clock, observer, self.failpoints, [])

    async def watch_weights(self) -> None:
        """Check, until cancelled, whether somebody overwrites weights that an instance maps."""
        while True:
            await asyncio.sleep(WEIGHTS_SECONDS)
            await self.check_weights()

    async def check_weights(self) -> None:
        """End every instance whose mapped weights have been overwritten: its answers would be wrong."""
        for record in list(self._records.values()):
            with contextlib.suppress(DumontError):
                await self._check_weights(record)

    async def _check_weights(self, record: Record) -> None:
        """End an instance if its mapped weights have been overwritten.

        Raises:
            FailedPrecondition: WEIGHTS_OVERWRITTEN; the instance has been ended.
            Unavailable: its files cannot be checked now.
        """
        if not record.instance.mapped_files or record.instance.state not in RESTING:
            return
        path = await self.node.weights.overwritten(record.instance.mapped_files)
        # A job that has begun meanwhile goes on; the weights are checked again after it.
        if not path or record.job is not None or record.instance.state not in RESTING:
            return
        message = f"{path} was written to while it was mapped: replace weights by another file, not in place"
        log.error("weights_overwritten", instance=record.instance.id, path=path)
        await self._end(record, Event.LOST, "WEIGHTS_OVERWRITTEN", message)
        raise FailedPrecondition(
            "WEIGHTS_OVERWRITTEN",
            f"instances/{record.instance.id} has been ended: {message}",
            metadata={"instance": record.instance.id, "file": path},
        )

    def _check_unshared(self, record: Record, event: Event) -> None:
        """Refuse a job that GPU sharing rules out, unless the event is illegal; nothing has changed."""
        advance(record.instance.state, event)
        actions.check_suspendable(self.node, record.instance.device)

    def _advance(self, record: Record, event: Event, reason: str = "", message: str = "") -> None:
        """Put an instance into its next state, and tell the journal and all listeners."""
        state = advance(record.instance.state, event)
        failed = state is State.FAILED
        record.instance = replace(
            record.instance,
            state=state,
            failure_reason=reason if failed else "",
            failure_message=message if failed else "",
        )
        self._publish(record)

    def _watch(self, record: Record, host: Host) -> None:
        record.watch = asyncio.create_task(
            self._notice_loss(record, host), name=f"watch {record.instance.id}"
        )

    async def _notice_loss(self, record: Record, host: Host) -> None:
        await host.lost.wait()
        if record.job is not None or record.instance.state in (State.STOPPING, State.FAILED, State.GONE):
            # The job under way fails by itself, with a better reason.
            return
        how = f": {host.end}" if host.end else ""
        await self._end(record, Event.LOST, host.lost_reason, f"its process ended by itself{how}")

    def _publish(self, record: Record) -> None:
        instance = record.instance
        change = Change(instance)
        if instance.state is State.GONE:
            self._records.pop(instance.id, None)
            change = Change(None, instance.id)
        elif instance.state is State.FAILED:
            self._records.move_to_end(instance.id)
            failed = [
                other.instance.id for other in self._records.values() if other.instance.state is State.FAILED
            ]
            for oldest in failed[:-FAILED_KEPT]:
                self._records.pop(oldest)
        if instance.state in (State.GONE, State.FAILED):
            self.journal.forget(instance.id)
            if record.watch is not None and record.watch is not asyncio.current_task():
                record.watch.cancel()
            record.watch = None
        else:
            self.journal.write(instance)
        for queue in self._listeners:
            queue.put_nowait(change)

    def _record(self, instance: str) -> Record:
        try:
            return self._records[instance]
        except KeyError:
            raise NotFound(
                "INSTANCE_NOT_FOUND",
                f"this node has no instances/{instance}",
                field="name",
                metadata={"instance": instance},
            ) from None

    def mapped(self) -> set[str]:
        """The snapshots from which living instances map their memory."""
        return {record.instance.snapshot for record in self._records.values() if record.host is not None}

    @contextlib.contextmanager
    def _pin(self, snapshot: str) -> Iterator[None]:
        self.pinned[snapshot] = self.pinned.get(snapshot, 0) + 1
        try:
            yield
        finally:
            self.pinned[snapshot] -= 1
            if not self.pinned[snapshot]:
                del self.pinned[snapshot]


def _idle(record: Record) -> bool:
    return record.instance.state is State.SERVING and record.job is None
