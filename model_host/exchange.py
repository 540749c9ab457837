"""Many calls on one stream: what is ready together is sent together.

With a stream for each call, every few tokens of each call cost a message and a thread's turn with the
interpreter; with a hundred calls, the computing thread then waits longer for the interpreter than for the
GPU. Here one thread looks at all calls fifty times a second, and at once when one has its first token or its
end.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Final

from google.rpc.status_pb2 import Status

from dumont.model_host.v1 import model_host_service_pb2 as pb2
from model_host.scheduler import SEND_INTERVAL, Job

# Requests that are checked and tokenised at a time.
CHECKING_THREADS: Final = 4

# Bytes that one message may have. For a message that is too large, gRPC ends the stream and so every call on
# it, and what waits for a slow reader may be much.
MESSAGE_BYTES: Final = 1 << 20
# Items that are joined to a piece at once, each with up to twenty log-probabilities.
JOINED_ITEMS: Final = 256

Frame = pb2.ExchangeResponse.Frame
Begin = Callable[[bytes, float, Callable[[], None]], tuple[Job, Callable[[], None]]]


@dataclass
class _Call:
    """A call that was begun."""

    job: Job
    leave: Callable[[], None]


class Exchange:
    """The calls of one stream.

    Args:
        begin: checks a request (bytes, seconds until its caller gives up, what to call when it has something
            urgent) and hands it to the scheduler; returns the job, and what to call when the call is over.
        encode: an item of a reply as the bytes of a message.
        failure: what the caller is told of an error.
        clock: monotonic seconds.
    """

    def __init__(
        self,
        begin: Begin,
        encode: Callable[[Any], bytes],
        failure: Callable[[BaseException], Status],
        clock: Callable[[], float],
    ) -> None:
        self._begin = begin
        self._encode = encode
        self._failure = failure
        self._clock = clock
        self._changed = threading.Condition()
        self._calls: dict[int, _Call] = {}
        self._refused: list[pb2.ExchangeResponse.Frame] = []
        # Calls with something that must not wait.
        self._urgent: set[int] = set()
        # Calls that are being checked, and those of them that were cancelled meanwhile.
        self._beginning: set[int] = set()
        self._cancelled: set[int] = set()
        self._closed = False

    def listen(self, orders: Iterable[pb2.ExchangeRequest]) -> None:
        """Take orders, on threads of its own, until there are no more."""
        threading.Thread(target=self._listen, args=(orders,), name="orders", daemon=True).start()

    def _listen(self, orders: Iterable[pb2.ExchangeRequest]) -> None:
        with ThreadPoolExecutor(CHECKING_THREADS, thread_name_prefix="check") as pool:
            try:
                for order in orders:
                    if order.WhichOneof("order") == "cancel":
                        self._cancel(order.call)
                    else:
                        with self._changed:
                            self._beginning.add(order.call)
                        pool.submit(self._take, order)
            except Exception:
                # The stream broke: gRPC reports that itself, and nobody is left to be told.
                pass
        self.close()

    def _take(self, order: pb2.ExchangeRequest) -> None:
        number = order.call
        try:
            job, leave = self._begin(order.generate, order.timeout, lambda: self._stir(number))
        except BaseException as error:
            with self._changed:
                self._beginning.discard(number)
                self._cancelled.discard(number)
                self._refused.append(
                    Frame(call=number, last=True, status=self._failure(error).SerializeToString())
                )
                self._changed.notify()
            return
        with self._changed:
            self._calls[number] = _Call(job, leave)
            # It may have had something urgent before it was among the calls.
            self._urgent.add(number)
            unwanted = self._closed or number in self._cancelled
            self._beginning.discard(number)
            self._cancelled.discard(number)
            self._changed.notify()
        if unwanted:
            job.cancel()
            if self._closed:
                self._forget(number)

    def _cancel(self, number: int) -> None:
        with self._changed:
            call = self._calls.get(number)
            if number in self._beginning:
                self._cancelled.add(number)
        if call is not None:
            call.job.cancel()

    def _stir(self, number: int) -> None:
        with self._changed:
            self._urgent.add(number)
            self._changed.notify()

    def close(self) -> None:
        """End all calls; for when nobody listens any more."""
        with self._changed:
            self._closed = True
            calls = list(self._calls)
            self._changed.notify()
        for number in calls:
            if (call := self._calls.get(number)) is not None:
                call.job.cancel()
                self._forget(number)

    def _forget(self, number: int) -> None:
        with self._changed:
            call = self._calls.pop(number, None)
        if call is not None:
            call.leave()

    def responses(self) -> Iterator[pb2.ExchangeResponse]:
        """What is ready, whenever something is, until the stream is closed."""
        sent = self._clock()
        while True:
            with self._changed:
                # Without calls there is nothing to look at until something happens.
                pause = max(sent + SEND_INTERVAL - self._clock(), 0) if self._calls else None
                self._changed.wait_for(lambda: self._urgent or self._refused or self._closed, pause)
                if self._closed:
                    return
                frames, self._refused = self._refused, []
                urgent, self._urgent = self._urgent, set()
                calls = list(self._calls.items())
            now = self._clock()
            if now - sent >= SEND_INTERVAL:
                sent = now
            else:
                calls = [(number, call) for number, call in calls if number in urgent]
            frames += [frame for number, call in calls if (frame := self._frame(number, call)) is not None]
            for packed in _packed(frames):
                yield pb2.ExchangeResponse(frames=packed)
                # gRPC asks for more once it has taken these. Only now are the calls over that they end.
                for frame in packed:
                    if frame.last:
                        self._forget(frame.call)

    def _frame(self, number: int, call: _Call) -> pb2.ExchangeResponse.Frame | None:
        computed, ended, failure = call.job.take()
        if not computed and not ended:
            return None
        frame = Frame(call=number)
        try:
            for start in range(0, len(computed), JOINED_ITEMS):
                reply = call.job.work.receive(computed[start : start + JOINED_ITEMS])
                frame.messages.extend(map(self._encode, reply.items))
                if reply.ended:
                    if not ended:
                        call.job.cancel()
                        ended, failure = True, None
                    break
            if ended and failure is not None:
                raise failure
        except BaseException as error:
            call.job.cancel()
            ended = True
            frame.status = self._failure(error).SerializeToString()
        if ended:
            frame.last = True
        return frame if frame.messages or frame.last else None


def _packed(frames: Iterable[pb2.ExchangeResponse.Frame]) -> Iterator[list[pb2.ExchangeResponse.Frame]]:
    """The frames of each message to be sent."""
    packed: list[pb2.ExchangeResponse.Frame] = []
    size = 0
    for frame in frames:
        for part in _parts(frame):
            if packed and size + part.ByteSize() > MESSAGE_BYTES:
                yield packed
                packed, size = [], 0
            packed.append(part)
            size += part.ByteSize()
    if packed:
        yield packed


def _parts(frame: pb2.ExchangeResponse.Frame) -> Iterator[pb2.ExchangeResponse.Frame]:
    """Frames that say together what ``frame`` says; the last one says that the call has ended."""
    if frame.ByteSize() <= MESSAGE_BYTES:
        yield frame
        return
    part = Frame(call=frame.call)
    for message in frame.messages:
        if part.messages and part.ByteSize() + len(message) > MESSAGE_BYTES:
            yield part
            part = Frame(call=frame.call)
        part.messages.append(message)
    part.last, part.status = frame.last, frame.status
    yield part
