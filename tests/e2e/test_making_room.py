"""More real models than a node has memory for: all are answered, and a higher priority comes first."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

import dumont
from tests.e2e.stack import Controller
from tests.node.daemon import Daemon

pytestmark = pytest.mark.node

PROMPT = "The capital of France is"
MODELS = ("a", "b", "c")


@contextmanager
def node(controller: Controller, root: Path, port: int, *flags: str) -> Iterator[None]:
    """A snapshotd that the controller can use; its instances end with it, its snapshots stay."""
    flags = ("--controller", controller.endpoint, "--heartbeat-seconds", "0.5", *flags)
    with Daemon(root, port, *flags, "--drain-seconds", "1", "--stop-instances-on-exit"):
        with dumont.Client(controller.endpoint) as client:
            deadline = time.monotonic() + 30
            while not any(known.state == "ready" for known in client.nodes.list()):
                assert time.monotonic() < deadline, "the node does not become ready"
                time.sleep(0.1)
        yield


def taken(client: dumont.Client) -> dict[str, int]:
    """Bytes of memory that each living instance takes, by its deployment."""
    alive = [one for one in client.instances.list() if one.state in ("serving", "parked")]
    return {one.deployment.rpartition("/")[2]: one.ram_bytes for one in alive}


def test_three_models_of_which_two_fit_are_all_answered_in_turn(
    criu: Path, controller: Controller, instruct_model: Path, free_port: Callable[[], int], tmp_path: Path
) -> None:
    port, root = free_port(), tmp_path / "snapshotd"
    with dumont.Client(controller.endpoint) as client:
        # Given three models with snapshots, and what an instance takes that was restored from one
        deployments = {}
        with node(controller, root, port):
            for model in MODELS:
                deployments[model] = client.deploy(str(instruct_model), name=model)
                deployments[model].generate(PROMPT, max_new_tokens=8)
            for one in client.instances.list():
                client.instances.stop(one.name)
            for model in MODELS:
                deployments[model].generate(PROMPT, max_new_tokens=8)
            size = max(taken(client).values())
        budget = int(2.5 * size)

        # When the node has memory for two of them, and they are asked in turn
        with node(controller, root, port, "--instance-memory-bytes", str(budget)):
            restores, wakes = [], []
            for _ in range(4):
                for model in MODELS:
                    answer = deployments[model].generate(PROMPT, max_new_tokens=8)
                    assert "Paris" in answer.text
                    phases = {phase.name: phase.seconds for phase in answer.start.phases}
                    made = phases.get("make_room")
                    assert sum(taken(client).values()) <= budget
                    if made is None:
                        restores.append(answer.start.seconds)
                        continue
                    assert any("ends: it was not used" in reason for reason in answer.start.reasons)
                    wakes.append((answer.start.seconds, made))

        # Then a wake takes a restore, and the time in which another one ends for it. The one that would be
        # back soonest yields, which is not always the one that is asked next.
        assert len(wakes) >= 4
        for seconds, made in wakes:
            assert made < seconds
        least = min(seconds - made for seconds, made in wakes)
        assert least <= max(restores)


def test_a_busy_model_makes_room_for_a_higher_priority_and_its_caller_is_told(
    criu: Path, controller: Controller, instruct_model: Path, free_port: Callable[[], int], tmp_path: Path
) -> None:
    port, root = free_port(), tmp_path / "snapshotd"
    with dumont.Client(controller.endpoint) as client:
        with node(controller, root, port):
            low = client.deploy(str(instruct_model), name="low")
            high = client.deploy(str(instruct_model), name="high", priority=5)
            for one in (low, high):
                one.generate(PROMPT, max_new_tokens=8)
            size = min(taken(client).values())
        with node(controller, root, port, "--instance-memory-bytes", str(int(1.5 * size))):
            ended: list[dumont.DumontError] = []
            began = threading.Event()

            def read_on() -> None:
                options: dict[str, Any] = {"max_new_tokens": 4000, "ignore_eos": True}
                try:
                    for _ in low.stream(PROMPT, **options):
                        began.set()
                except dumont.DumontError as error:
                    ended.append(error)

            reading = threading.Thread(target=read_on)
            reading.start()
            assert began.wait(60)

            answer = high.generate(PROMPT, max_new_tokens=8)

            reading.join(60)
            assert "Paris" in answer.text
            assert any("its priority is 0, below 5" in reason for reason in answer.start.reasons)
            (error,) = ended
            assert isinstance(error, dumont.Unavailable)
            assert error.reason == "PREEMPTED"
            assert error.retry_after
            # It wakes when somebody asks for it and the other one is idle.
            assert "Paris" in low.generate(PROMPT, max_new_tokens=8).text
