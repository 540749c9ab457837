"""Dumont's ways to the first token through a snapshotd, measured from the client's request."""

from __future__ import annotations

import statistics
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dumont.benchmarks import results
from dumont.benchmarks.daemon import Answer, Snapshotd
from dumont.benchmarks.machine import Gpus
from dumont.benchmarks.results import Costs, Sample, Spread
from dumont.snapshotd.v1 import instance_service_pb2

SOURCE = "source"


@dataclass
class Product:
    """A model on a snapshotd that runs while this is entered.

    When it is entered, an instance that no prompt has reached is captured ``rounds`` times, as deployments
    are; the last of the snapshots is published to a store on the same disk and is the one that is restored.

    Args:
        model: its directory.
        directory: an empty one, for snapshotd's state and the store.
        address: where snapshotd listens.
        local: whether there is to be a snapshot at all.
        engine, engine_options: what runs the model; empty: the engine that its architecture calls for.

    Raises:
        DumontError: what snapshotd says.
    """

    model: Path
    directory: Path
    address: str
    prompt: str
    max_new_tokens: int
    rounds: int
    local: bool
    gpus: Gpus
    engine: str = ""
    engine_options: Mapping[str, Any] = field(default_factory=dict)
    snapshot: str = ""
    image_bytes: int = 0
    stored_bytes: int = 0
    pauses: list[float] = field(default_factory=list)
    capture_phases: list[dict[str, float]] = field(default_factory=list)
    parks: list[float] = field(default_factory=list)
    gpu_serving: list[int] = field(default_factory=list)
    gpu_parked: list[int] = field(default_factory=list)

    def __enter__(self) -> Product:
        store = self.directory / "store"
        store.mkdir(parents=True)
        with ExitStack() as stack:
            self.daemon = stack.enter_context(
                Snapshotd(self.directory, self.address, "--store-url", f"file://{store}")
            )
            self.gpu_idle = self.gpus.used_bytes()
            if self.local:
                self._capture()
            self._exit = stack.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        self._exit.close()

    def measure(self, number: int) -> dict[str, Sample]:
        """Measure each case once: a cold start, its park and resume, a restore after its source has ended."""
        cold = f"cold-{number}"
        began = time.monotonic()
        instance = self._start(cold)
        samples = {"cold": self._sample(cold, began, instance)}
        self.gpu_serving.append(self.gpus.used_bytes() - self.gpu_idle)

        began = time.monotonic()
        self.daemon.park(cold)
        self.parks.append(time.monotonic() - began)
        self.gpu_parked.append(self.gpus.used_bytes() - self.gpu_idle)
        began = time.monotonic()
        instance = self.daemon.resume(cold)
        samples["parked"] = self._sample(cold, began, instance)
        self.daemon.stop(cold)

        if self.local:
            local = f"local-{number}"
            began = time.monotonic()
            instance = self.daemon.restore(local, self.snapshot)
            samples["local"] = self._sample(local, began, instance)
            self.daemon.stop(local)
        return samples

    def costs(self) -> dict[str, Costs]:
        """What parked and restored instances cost, by case."""
        parked = Costs(
            park=Spread.of(self.parks),
            gpu_bytes_serving=_bytes(self.gpu_serving) if self.gpus else None,
            gpu_bytes_parked=_bytes(self.gpu_parked) if self.gpus else None,
        )
        if not self.local:
            return {"parked": parked}
        local = Costs(
            image_bytes=self.image_bytes,
            stored_bytes=self.stored_bytes,
            source_pause=Spread.of(self.pauses),
            capture_phases=results.medians(self.capture_phases),
        )
        return {"parked": parked, "local": local}

    def _start(self, instance: str) -> instance_service_pb2.Instance:
        return self.daemon.start(instance, self.model, self.engine, self.engine_options)

    def _capture(self) -> None:
        self._start(SOURCE)
        for number in range(1, self.rounds + 1):
            if self.snapshot:
                self.daemon.delete(self.snapshot)
            self.snapshot = f"snapshot-{number}"
            made = self.daemon.capture(SOURCE, self.snapshot)
            self.pauses.append(made.source_pause_duration.ToNanoseconds() / 1e9)
            self.capture_phases.append(dict(_phases(made.phases)))
        self.image_bytes = made.size_bytes
        self.daemon.stop(SOURCE)
        self.daemon.publish(self.snapshot)
        self.stored_bytes = self.daemon.stored(self.snapshot).stored_bytes

    def _sample(self, name: str, began: float, instance: instance_service_pb2.Instance) -> Sample:
        serving = time.monotonic()
        answer: Answer = self.daemon.generate(name, self.prompt, self.max_new_tokens)
        return results.sample(
            answer.first_token_time - began,
            _phases(instance.phases),
            answer.first_token_time - serving,
            answer.tokens,
        )


def _phases(phases: Sequence[instance_service_pb2.Phase]) -> list[tuple[str, float]]:
    return [(phase.name, phase.duration.ToNanoseconds() / 1e9) for phase in phases]


def _bytes(values: Sequence[int]) -> int:
    return max(0, round(statistics.median(values)))
