"""When the exchange sends what the calls of a stream have ready, on a clock that stands still."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from queue import SimpleQueue
from typing import Any

import pytest
from google.rpc.status_pb2 import Status

from dumont.model_host.v1 import model_host_service_pb2 as pb2
from model_host.engine import Reply
from model_host.exchange import MESSAGE_BYTES, Exchange
from model_host.scheduler import SEND_INTERVAL, Job


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


class Passed:
    """Work whose caller is sent what was computed."""

    def receive(self, computed: Sequence[Any]) -> Reply:
        return Reply(computed)


class World:
    """An exchange whose jobs the test computes."""

    def __init__(self) -> None:
        self.clock = Clock()
        self.jobs: list[Job] = []
        self.left = 0
        # Bytes of each item's message.
        self.item_bytes = 1
        self._orders: SimpleQueue[pb2.ExchangeRequest | None] = SimpleQueue()
        self.exchange = Exchange(self._begin, self._encode, lambda error: Status(), self.clock)
        self.exchange.listen(iter(self._orders.get, None))
        self._responses = self.exchange.responses()

    def _begin(
        self, request: bytes, timeout: float, urgent: Callable[[], None]
    ) -> tuple[Job, Callable[[], None]]:
        self.jobs.append(Job(Passed(), None, lambda: None, urgent))
        return self.jobs[-1], self._leave

    def _encode(self, item: int) -> bytes:
        return bytes([item]) * self.item_bytes

    def _leave(self) -> None:
        self.left += 1

    def order(self, call: int, **order: Any) -> None:
        self._orders.put(pb2.ExchangeRequest(call=call, **order))

    def begin(self, *calls: int) -> list[Job]:
        """Begin calls, each with its first item sent."""
        for call in calls:
            count = len(self.jobs)
            self.order(call, generate=b"")
            while len(self.jobs) == count:
                pass
            self.jobs[-1].put(0)
            assert self.next() == {call: [0]}
        return self.jobs[-len(calls) :]

    def receive(self) -> pb2.ExchangeResponse:
        """The next message."""
        return next(self._responses)

    def next(self) -> dict[int, list[int]]:
        """What the next message has to say of each call."""
        return {frame.call: [message[0] for message in frame.messages] for frame in self.receive().frames}

    def close(self) -> None:
        self._orders.put(None)
        self.exchange.close()


@pytest.fixture
def world() -> Iterator[World]:
    made = World()
    yield made
    made.close()


def test_first_tokens_and_ends_are_sent_at_once(world: World) -> None:
    [job] = world.begin(1)

    job.put(1)
    job.end()

    assert world.next() == {1: [1]}


def test_what_is_sent_at_once_takes_nobody_elses_along(world: World) -> None:
    one, other = world.begin(1, 2)
    one.put(1)
    other.put(2)

    other.end()

    assert world.next() == {2: [2]}


def test_later_tokens_of_all_calls_are_sent_together(world: World) -> None:
    one, other = world.begin(1, 2)
    for item in (1, 2, 3):
        one.put(item)
        other.put(item)

    world.clock.now = SEND_INTERVAL

    assert world.next() == {1: [1, 2, 3], 2: [1, 2, 3]}


def test_what_a_slow_reader_left_waiting_is_sent_in_messages_that_grpc_takes(world: World) -> None:
    # given: calls with much more to say than one message may hold
    jobs = world.begin(1, 2)
    world.item_bytes = MESSAGE_BYTES // 10
    for item in range(25):
        for job in jobs:
            job.put(item)
    for job in jobs:
        job.end()

    # when it is read
    said: dict[int, list[int]] = {1: [], 2: []}
    ended: list[int] = []
    while len(ended) < 2:
        message = world.receive()
        assert message.ByteSize() < 1.1 * MESSAGE_BYTES
        for frame in message.frames:
            assert frame.call not in ended
            said[frame.call] += [item[0] for item in frame.messages]
            ended += [frame.call] * frame.last

    # then all of it arrives, in order
    assert said == {1: list(range(25)), 2: list(range(25))}


def test_a_call_is_over_when_its_end_was_taken(world: World) -> None:
    one, other = world.begin(1, 2)
    one.end()
    world.next()
    assert world.left == 0

    other.end()
    world.next()

    assert world.left == 1


def test_a_call_cancelled_before_it_began_or_after_its_end_leaves_nothing(world: World) -> None:
    world.order(1, generate=b"")
    world.order(1, cancel=True)
    while not (world.jobs and world.jobs[0].cancelled):
        pass
    [job] = world.begin(2)
    job.end()
    world.next()
    world.begin(3)

    world.order(2, cancel=True)
    world.begin(4)

    assert not world.exchange._cancelled
