"""Through both services, on two GPUs: live moves under 32 streams, and two GPUs that end balanced.

``DUMONT_MOVE_MODEL`` names another model than the generated one, which has the shape of Qwen3-0.6B.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import pytest

import dumont
from tests.e2e.stack import Stack
from tests.helpers.models import make_model

pytestmark = [pytest.mark.gpu, pytest.mark.gpus2, pytest.mark.node]

STREAMS = 32
MOVES = 5
TOKENS = 2000
# Seconds between two moves, in which the streams go on.
BETWEEN = 0.5


@dataclass
class Streamed:
    """An answer as its caller got it: its tokens, and the longest wait between two pieces."""

    tokens: tuple[int, ...]
    gap: float


@pytest.fixture(scope="module")
def client(
    criu: Path, free_port: Callable[[], int], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[dumont.Client]:
    with (
        Stack(tmp_path_factory.mktemp("up"), free_port(), free_port(), Path("grpcurl")) as stack,
        dumont.Client(stack.endpoint) as made,
    ):
        yield made


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    named = os.environ.get("DUMONT_MOVE_MODEL")
    return named or str(make_model(tmp_path_factory.mktemp("models") / "large", hidden=1024, layers=28))


def stream(client: dumont.Client, number: int) -> Streamed:
    deployment = client.deployments.get("mover")
    answer = deployment.stream(f"Number {number} is", max_new_tokens=TOKENS, ignore_eos=True, timeout=300)
    tokens: list[int] = []
    last, gap = 0.0, 0.0
    for piece in answer.pieces():
        now = time.monotonic()
        gap = max(gap, now - last) if last else 0.0
        last = now
        tokens += piece.token_ids
    return Streamed(tuple(tokens), gap)


def all_streams(client: dumont.Client, pool: ThreadPoolExecutor) -> list[Streamed]:
    return list(pool.map(lambda number: stream(client, number), range(STREAMS)))


def test_an_instance_with_32_streams_moves_to_the_other_gpu_and_back_five_times(
    client: dumont.Client, model: str, record_property: Callable[[str, object], None]
) -> None:
    # given: what the streams say without a move
    client.deploy(model, name="mover").generate("Number", max_new_tokens=4)
    with ThreadPoolExecutor(STREAMS + 1) as pool:
        still = all_streams(client, pool)

        # when
        (instance,) = client.instances.list("mover")
        running = pool.submit(all_streams, client, ThreadPoolExecutor(STREAMS))
        time.sleep(1.0)
        seconds: list[float] = []
        gpus = [instance.gpu]
        for move in range(MOVES):
            began = time.monotonic()
            moved = client.instances.migrate(instance.name, gpu=str((move + 1) % 2))
            seconds.append(time.monotonic() - began)
            gpus.append(moved.gpu)
            assert (moved.name, moved.pid, moved.state) == (instance.name, instance.pid, "serving")
            time.sleep(BETWEEN)
        under_way = not running.done()
        streams = running.result()

    # then: no failed request, no lost or doubled token, and a gap that the callers saw
    assert under_way, "the streams ended before the moves did; raise TOKENS"
    assert all(one != other for one, other in pairwise(gpus)), gpus
    assert [len(one.tokens) for one in streams] == [TOKENS] * STREAMS
    # The size of a batch changes the last bits of its numbers, and with them a token here and there.
    different = sum(a.tokens != b.tokens for a, b in zip(still, streams, strict=True))
    figures = {
        "move_seconds": [round(one, 3) for one in seconds],
        "longest_gap_seconds": round(max(one.gap for one in streams), 3),
        "longest_gap_without_moves": round(max(one.gap for one in still), 3),
        "different_answers": different,
    }
    for name, value in figures.items():
        record_property(name, value)
    sys.stdout.write(f"{figures}\n")
    assert different <= STREAMS // 8, figures


def test_idle_instances_that_crowd_one_gpu_end_on_both(client: dumont.Client, model: str) -> None:
    # given: five of them on the first GPU
    names = [f"idle-{number}" for number in range(5)]
    client.instances.stop(client.instances.list("mover")[0].name)
    for name in names:
        client.deploy(model, name=name, idle_timeout=600).generate("Hello", max_new_tokens=4)
    for name in names:
        client.instances.migrate(client.instances.list(name)[0].name, gpu="0")

    # then: some of them leave it by themselves
    deadline = time.monotonic() + 120
    while len({client.instances.list(name)[0].gpu for name in names}) == 1:
        assert time.monotonic() < deadline, "all are still on one GPU"
        time.sleep(1)
    assert all(client.deployments.get(name).generate("Hello", max_new_tokens=4) for name in names)
