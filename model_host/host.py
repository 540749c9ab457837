"""The life of a model host: runs one control command at a time and keeps its state.

A command either succeeds and the state advances as ``lifecycle.TABLE`` says, or it fails and the host is as
it was before.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final

from dumont.errors import DeadlineExceeded, FailedPrecondition, InvalidArgument
from model_host import entropy
from model_host.arguments import Arguments
from model_host.engine import Engine, Phases, Settings, WeightsPlace
from model_host.gate import Gate
from model_host.lifecycle import Command, State, advance
from model_host.ports import Server, World
from model_host.process import EXPECTED, is_gpu_drivers
from model_host.scheduler import Scheduler

log = logging.getLogger(__name__)

Json = dict[str, Any]
Ranges = list[tuple[int, int]]
DEFAULT_MAX_QUEUE: Final = 256
DEFAULT_DRAIN_SECONDS: Final = 10.0


@dataclass
class Loaded:
    """A model in memory and what serves it."""

    engine: Engine
    scheduler: Scheduler
    server: Server
    # What was open when the model was there: on a GPU the driver's own pipes and sockets.
    baseline: frozenset[int]

    def may_hold(self, descriptor: int, leads_to: str) -> bool:
        """Whether a snapshot may find this descriptor open."""
        cuda = self.engine.device.startswith("cuda")
        return descriptor in self.baseline or (cuda and is_gpu_drivers(leads_to))


class Host:
    """Runs control commands.

    Args:
        world: makes engines and servers.
        clock: monotonic seconds, for measuring.
    """

    def __init__(self, world: World, clock: Callable[[], float] = time.perf_counter) -> None:
        self.state = State.NEW
        self.instance = ""
        self._world = world
        self._clock = clock
        self._gate = Gate()
        self._model: Loaded | None = None
        self._memory: Ranges = []
        self._commands: dict[Command, Callable[[Arguments], Json]] = {
            Command.LOAD: self._load,
            Command.SERVE: self._serve,
            Command.DRAIN: self._drain,
            Command.ACCEPT: self._accept,
            Command.PAUSE: self._pause,
            Command.CONTINUE: self._continue,
            Command.QUIESCE: self._quiesce,
            Command.TRIM: self._trim,
            Command.ORDER_WEIGHTS: self._order_weights,
            Command.WAKE: self._wake,
            Command.CANARY: self._canary,
            Command.DRAWS: self._draws,
            Command.STATUS: self._status,
            Command.STOP: self._stop,
        }

    def run(self, command: str, arguments: Json) -> Json:
        """Run one command and return its answer.

        Raises:
            DumontError: it failed and nothing changed. Reasons: UNKNOWN_COMMAND, ILLEGAL_TRANSITION and
                those of the command.
        """
        try:
            known = Command(command)
        except ValueError:
            raise InvalidArgument(
                "UNKNOWN_COMMAND", f"there is no command {command[:80]!r}", field="do"
            ) from None
        following = advance(self.state, known)
        answer = self._commands[known](Arguments(arguments))
        self.state = following
        return answer

    @property
    def _loaded(self) -> Loaded:
        if self._model is None:
            raise FailedPrecondition("NOT_LOADED", "no model is loaded")
        return self._model

    def _load(self, arguments: Arguments) -> Json:
        """Reasons: MODEL_INVALID, MODEL_UNSUPPORTED, UNKNOWN_ENGINE, INVALID_DEVICE, DEVICE_MISSING,
        INVALID_WEIGHTS, and those of the engine.
        """
        phases = Phases()
        max_queue = arguments.integer("max_queue", DEFAULT_MAX_QUEUE, lowest=1)
        settings = Settings(
            device=arguments.text("device", "auto"),
            weights=_weights_place(arguments.text("weights", WeightsPlace.DETACHED.value)),
            weight_files={name: Path(path) for name, path in arguments.texts("weight_files").items()},
            max_new_tokens_limit=arguments.integer(
                "max_new_tokens_limit", Settings.max_new_tokens_limit, lowest=1
            ),
            threads=arguments.integer("threads", 0, lowest=0) or None,
            loader=_path(arguments.text("loader", "")),
            gpu=arguments.text("gpu", ""),
            kv_cache=arguments.integer("kv_cache", 0, lowest=0) or None,
            engine_options=arguments.values("engine_options"),
        )
        folder = Path(arguments.text("model_dir"))
        engine = self._world.load(folder, arguments.text("engine", ""), settings, phases)
        scheduler = Scheduler(engine, max_queue, lost=self._world.give_up)
        try:
            with phases.measure("import_grpc"):
                server = self._world.server(engine, scheduler, self._gate, max_queue)
            # Warmed up on the thread that will compute: each thread has a team of workers of its own.
            with phases.measure("warm_up"):
                scheduler.call(engine.warm_up)
            with phases.measure("canary"):
                canary = self._run_canary(engine, scheduler)
        except BaseException:
            scheduler.close()
            raise
        self._world.settle()
        baseline = EXPECTED
        if engine.device.startswith("cuda"):
            baseline |= self._world.open_descriptors().keys()
        self._model = Loaded(engine, scheduler, server, baseline)
        return {
            "engine": engine.name,
            "device": engine.device,
            "context_length": engine.context_length,
            "capacity": self._capacity(engine),
            "canary": canary,
            "phases": [list(phase) for phase in phases.seconds],
            "versions": engine.versions(),
        }

    def _serve(self, arguments: Arguments) -> Json:
        """Reasons: SOCKET_PATH_TOO_LONG, SERVE_FAILED."""
        instance, socket = arguments.text("instance"), Path(arguments.text("socket"))
        self._gate.set_open(True)
        try:
            self._loaded.server.start(socket)
        except BaseException:
            self._gate.set_open(False)
            raise
        self.instance = instance
        return {}

    def _drain(self, arguments: Arguments) -> Json:
        """Reasons: DRAIN_TIMEOUT, after which calls are accepted again."""
        seconds = arguments.number("deadline_seconds", DEFAULT_DRAIN_SECONDS)
        was_open = self._gate.open
        self._gate.set_open(False)
        if not self._gate.wait_empty(seconds):
            self._gate.set_open(was_open)
            raise DeadlineExceeded(
                "DRAIN_TIMEOUT",
                f"{self._gate.inside} calls were still running after {seconds:g} s; the instance serves on",
                metadata={"in_flight": str(self._gate.inside)},
            )
        return {}

    def _accept(self, arguments: Arguments) -> Json:
        self._gate.set_open(True)
        return {}

    def _pause(self, arguments: Arguments) -> Json:
        """Reasons: NOT_PAUSABLE, after which the host is as it was before."""
        self._loaded.scheduler.hold(self._loaded.engine.pause)
        return {}

    def _continue(self, arguments: Arguments) -> Json:
        self._loaded.scheduler.release(self._loaded.engine.resume)
        return {}

    def _quiesce(self, arguments: Arguments) -> Json:
        """Reasons: QUIESCE_DIRTY, after which the host is as it was before."""
        model = self._loaded
        socket = model.server.stop()
        try:
            model.scheduler.call(model.engine.quiesce)
            self._world.release_memory()
            dirty = self._world.wait_for_descriptors(model.may_hold)
            if dirty:
                raise FailedPrecondition(
                    "QUIESCE_DIRTY",
                    "descriptors that a snapshot cannot hold are open: "
                    + ", ".join(f"{number} ({leads_to})" for number, leads_to in sorted(dirty.items())),
                    metadata={str(number): leads_to for number, leads_to in dirty.items()},
                )
        except BaseException:
            model.scheduler.call(model.engine.wake)
            if socket is not None:
                model.server.start(socket)
            raise
        self._memory = self._world.memory_ranges()
        return {"open_fds": sorted(self._world.open_descriptors())}

    def _trim(self, arguments: Arguments) -> Json:
        """Drop the zero pages of memory that came since quiescence.

        A CUDA checkpoint copies all that the process holds on the GPU into it, and most of that was never
        written to. Nothing here writes there while the process is checkpointed.
        """
        return {"bytes": self._world.drop_zero_pages(self._memory)}

    def _order_weights(self, arguments: Arguments) -> Json:
        self._loaded.engine.order_weights(Path(arguments.text("loader")), arguments.text("gpu"))
        return {}

    def _wake(self, arguments: Arguments) -> Json:
        """Reasons: INVALID_ENTROPY."""
        instance, seed = arguments.text("instance"), entropy.parse(arguments.text("entropy"))
        model = self._loaded
        # Before anything computes.
        self._world.regain_cpu()
        model.scheduler.call(model.engine.wake)
        self._world.reseed(seed)
        self.instance = instance
        return {}

    def _canary(self, arguments: Arguments) -> Json:
        return self._run_canary(self._loaded.engine, self._loaded.scheduler)

    def _run_canary(self, engine: Engine, scheduler: Scheduler) -> Json:
        start = self._clock()
        canary = scheduler.call(engine.canary)
        seconds = round(self._clock() - start, 4)
        return {"tokens": canary.tokens, "logprob": canary.logprob, "seconds": seconds}

    def _draws(self, arguments: Arguments) -> Json:
        return self._world.draws()

    def _status(self, arguments: Arguments) -> Json:
        load: Json = {}
        if self._model is not None:
            scheduler = self._model.scheduler
            load = {
                "capacity": self._capacity(self._model.engine),
                "running": scheduler.running,
                "waiting": scheduler.queued,
                "kv_tokens_used": scheduler.load.kv_tokens,
            }
        return load | {
            "state": self.state.value,
            "instance": self.instance,
            "in_flight": self._gate.inside,
            "queued": load.get("waiting", 0),
            "served": self._gate.served,
            "draining": self.state is State.DRAINED,
        }

    def _capacity(self, engine: Engine) -> Json:
        return asdict(engine.capacity)

    def _stop(self, arguments: Arguments) -> Json:
        self._gate.set_open(False)
        if self._model is not None:
            self._model.server.stop()
            self._model.scheduler.close()
        return {}


def _path(text: str) -> Path | None:
    return Path(text) if text else None


def _weights_place(name: str) -> WeightsPlace:
    try:
        return WeightsPlace(name)
    except ValueError:
        raise InvalidArgument(
            "INVALID_WEIGHTS", f"weights must be detached or included; got {name[:80]!r}", field="weights"
        ) from None
