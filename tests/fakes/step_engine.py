"""An engine whose steps do what a test wrote down for them."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from model_host.engine import Canary, Capacity, Generation, Load, Output, Reply, Work


class Hold:
    """A place in a script where the step waits until the test lets it go on."""

    def __init__(self) -> None:
        self.reached, self._go_on = threading.Event(), threading.Event()

    def wait(self) -> None:
        self.reached.set()
        assert self._go_on.wait(10), "nobody let the step go on"

    def go_on(self) -> None:
        self._go_on.set()


@dataclass(eq=False)
class Script:
    """Work that gets one of ``items`` with each step; what it gets is what its caller is sent.

    Args:
        items: an exception ends the work; a ``Hold`` delays the step in which the item after it is computed.
    """

    items: Sequence[Any]
    computed: int = 0
    admitted: threading.Event = field(default_factory=threading.Event)
    # Set when the engine holds nothing for this work any more.
    left: threading.Event = field(default_factory=threading.Event)

    def receive(self, computed: Sequence[Any]) -> Reply:
        return Reply(computed)

    @property
    def finished(self) -> bool:
        return self.computed == len(self.items)


class StepEngine:
    """An ``Engine`` for ``Script``s. Writes down what was admitted, dropped, and computed together.

    Args:
        sequences: how many works it has room for.
    """

    name, device, context_length = "scripted", "cpu", 8

    def __init__(self, sequences: int = 64) -> None:
        self.capacity = Capacity(sequences)
        self.admitted: list[Work] = []
        self.dropped: list[Work] = []
        self.steps: list[list[Work]] = []
        # Raised by the next step that ends.
        self.broken: Exception | None = None
        # Raised when this work is to be admitted.
        self.refused: dict[Work, Exception] = {}
        self._running: list[Script] = []

    @property
    def load(self) -> Load:
        return Load(len(self._running))

    def generate(self, request: Generation) -> Work:
        return Script([])

    def embed(self, inputs: Sequence[str]) -> Work:
        return Script([])

    def admit(self, work: Work) -> bool:
        assert isinstance(work, Script)
        if work in self.refused:
            raise self.refused[work]
        if len(self._running) == self.capacity.sequences:
            return False
        self._running.append(work)
        self.admitted.append(work)
        work.admitted.set()
        return True

    def drop(self, work: Work) -> None:
        assert isinstance(work, Script)
        if work in self._running:
            self._running.remove(work)
            self.dropped.append(work)
            work.left.set()

    def step(self) -> Sequence[Output]:
        self.steps.append(list(self._running))
        outputs = []
        for work in list(self._running):
            while isinstance(item := work.items[work.computed], Hold):
                item.wait()
                work.computed += 1
            work.computed += 1
            last = work.finished or isinstance(item, BaseException)
            if last:
                self._running.remove(work)
                work.left.set()
            outputs.append(Output(work, item, last))
        if self.broken is not None:
            failure, self.broken = self.broken, None
            raise failure
        return outputs

    def warm_up(self) -> None: ...

    def canary(self) -> Canary:
        return Canary([], 0.0)

    def quiesce(self) -> None: ...

    def pause(self) -> None: ...

    def resume(self) -> None: ...

    def order_weights(self, loader: Path, gpu: str) -> None: ...

    def wake(self) -> None: ...

    def versions(self) -> dict[str, str]:
        return {}
