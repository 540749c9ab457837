"""More models than a GPU has memory for, through controller and snapshotd: who yields, and how fast."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

import dumont
from tests.e2e.stack import Controller
from tests.gpu.gpu_node import SLACK, UNSEEN, free
from tests.helpers.cuda_process import CudaProcess
from tests.node.daemon import Daemon

pytestmark = [pytest.mark.gpu, pytest.mark.node]

MODELS = ("a", "b", "c")
TURNS = 4
# The calls, and the controller's own time.
CALLS = 0.2


@pytest.fixture
def controller(criu: Path, free_port: Callable[[], int], tmp_path: Path) -> Iterator[Controller]:
    running = Controller(f"127.0.0.1:{free_port()}", tmp_path / "controller")
    yield running
    running.close()


@contextmanager
def node(controller: Controller, root: Path, port: int) -> Iterator[None]:
    flags = ("--controller", controller.endpoint, "--heartbeat-seconds", "0.5", "--drain-seconds", "1")
    with (
        Daemon(root, port, *flags, "--stop-instances-on-exit", device="auto"),
        dumont.Client(controller.endpoint) as client,
    ):
        deadline = time.monotonic() + 60
        while not any(known.state == "ready" for known in client.nodes.list()):
            assert time.monotonic() < deadline, "the node does not become ready"
            time.sleep(0.1)
        yield


def held(client: dumont.Client) -> dict[str, int]:
    """GPU memory of each instance that serves, by its deployment."""
    serving = [one for one in client.instances.list() if one.state == "serving"]
    return {one.deployment.rpartition("/")[2]: one.gpu_bytes for one in serving}


def timed(act: Callable[[], object]) -> float:
    began = time.monotonic()
    act()
    return time.monotonic() - began


def test_three_models_of_which_two_fit_are_all_answered_in_turn(
    criu: Path,
    controller: Controller,
    gpu_model: Path,
    free_port: Callable[[], int],
    tmp_path: Path,
    record_property: Callable[[str, object], None],
) -> None:
    with node(controller, tmp_path / "snapshotd", free_port()), dumont.Client(controller.endpoint) as client:
        # Given a model whose size, park and return are known, and room for two of that size
        deployments = {name: client.deploy(str(gpu_model), name=name) for name in MODELS}
        deployments["a"].generate("Hello", max_new_tokens=8)
        deadline = time.monotonic() + 20
        while not (size := held(client).get("a", 0)):
            assert time.monotonic() < deadline, UNSEEN
            time.sleep(0.5)
        (alone,) = client.instances.list()
        park = timed(lambda: client.instances.park(alone.name))
        back = timed(lambda: client.instances.resume(alone.name))
        ballast = (free() - int(1.5 * size) - SLACK) >> 20
        with CudaProcess(mib=max(64, ballast)):
            # The next heartbeats tell the controller of it.
            time.sleep(2.0)
            for name in MODELS:
                deployments[name].generate("Hello", max_new_tokens=8)

            # When they are asked in turn
            wakes = []
            for _ in range(TURNS):
                for name in MODELS:
                    start = deployments[name].generate("Hello", max_new_tokens=8).start
                    assert len(held(client)) <= 2
                    wakes.append(start)
                    record_property(f"wake of {name}", f"{start.tier} {start.seconds:.3f} s {start.phases}")

            # Then each came back from its park, once another one had been parked for it
            for start in wakes:
                assert start.tier == "parked", start
                assert any("parks: it was not used" in reason for reason in start.reasons), start
                assert start.seconds <= back + park + CALLS, start
