"""What callers of a model host see, over a real Unix socket, with an engine that does as it is told."""

from __future__ import annotations

import stat
import threading
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from queue import SimpleQueue
from typing import Any

import grpc
import pytest
from google.rpc.status_pb2 import Status

from dumont.errors import DumontError, FailedPrecondition, InvalidArgument, Unavailable
from dumont.inference.v1 import inference_pb2
from dumont.model_host.v1 import model_host_service_pb2 as pb2
from dumont.model_host.v1 import model_host_service_pb2_grpc as pb2_grpc
from dumont.rpc.server import ServerLimits
from dumont.rpc.status import from_rpc_error, from_status
from model_host.engine import (
    Capacity,
    Embedded,
    Finish,
    FinishReason,
    Generation,
    Message,
    Piece,
    TokenLogprob,
    TopLogprob,
    Work,
)
from model_host.gate import Gate
from model_host.process import open_descriptors, wait_for_descriptors
from model_host.scheduler import Scheduler
from model_host.service import ModelHostService, Server
from tests.fakes.step_engine import Hold, Script, StepEngine

MAX_QUEUE = 1
ENDLESS = "wait " + "more " * 50_000


class ScriptedEngine(StepEngine):
    """Says one word of the prompt per step; ``wait`` makes the step after it wait."""

    def __init__(self) -> None:
        super().__init__(sequences=1)
        self.requests: list[Generation] = []
        self.script: list[Piece | Finish] = []
        self.hold = Hold()
        self.works: list[Script] = []

    def generate(self, request: Generation) -> Work:
        self.requests.append(request)
        if request.prompt == "wrong":
            raise InvalidArgument("EMPTY_PROMPT", "wrong", field="prompt")
        # Several threads check requests at a time: the last of the list may be another's.
        work = Script(self.script or self._answer(request.prompt))
        self.works.append(work)
        return work

    def _answer(self, prompt: str) -> list[Any]:
        words = prompt.split()
        items: list[Any] = []
        for number, word in enumerate(words):
            items.append(ZeroDivisionError("secret") if word == "break" else Piece(word, (number,)))
            if word == "wait":
                items.append(self.hold)
        return [*items, Finish(FinishReason.STOP, prompt_tokens=3, output_tokens=len(words))]

    def embed(self, inputs: Sequence[str]) -> Work:
        return Script([Embedded([[float(len(text))]], prompt_tokens=2) for text in inputs])


@pytest.fixture
def engine() -> Iterator[ScriptedEngine]:
    made = ScriptedEngine()
    yield made
    made.hold.go_on()


@pytest.fixture
def gate() -> Gate:
    made = Gate()
    made.set_open(True)
    return made


@pytest.fixture
def scheduler(engine: ScriptedEngine) -> Iterator[Scheduler]:
    made = Scheduler(engine, MAX_QUEUE)
    yield made
    engine.hold.go_on()
    made.close()


@pytest.fixture
def server(engine: ScriptedEngine, scheduler: Scheduler, gate: Gate) -> Iterator[Server]:
    made = Server(ModelHostService(engine, scheduler, gate), MAX_QUEUE)
    yield made
    engine.hold.go_on()
    made.stop()


@pytest.fixture
def stub(server: Server, tmp_path: Path) -> Iterator[pb2_grpc.ModelHostServiceStub]:
    socket = tmp_path / "host.sock"
    server.start(socket)
    with grpc.insecure_channel(f"unix:{socket}") as channel:
        yield pb2_grpc.ModelHostServiceStub(channel)


def failure(call: Callable[[], object]) -> DumontError:
    with pytest.raises(grpc.RpcError) as failed:
        call()
    return from_rpc_error(failed.value)


def test_pieces_and_finish_arrive(stub: pb2_grpc.ModelHostServiceStub) -> None:
    responses = list(stub.Generate(pb2.GenerateRequest(prompt="one two")))

    assert [(response.chunk.text, list(response.chunk.token_ids)) for response in responses[:-1]] == [
        ("one", [0]),
        ("two", [1]),
    ]
    finish = responses[-1].finish
    assert finish.reason == inference_pb2.FINISH_REASON_STOP
    assert (finish.usage.prompt_tokens, finish.usage.output_tokens) == (3, 2)


def test_a_request_reaches_the_engine_in_full(
    stub: pb2_grpc.ModelHostServiceStub, engine: ScriptedEngine
) -> None:
    message = inference_pb2.ChatMessage(role="user", content="hi")
    list(
        stub.Generate(
            pb2.GenerateRequest(
                messages=[message],
                max_new_tokens=5,
                temperature=0.5,
                top_p=0.25,
                seed=-3,
                stop=["x"],
                top_k=0,
                min_p=0.125,
                repetition_penalty=1.5,
                presence_penalty=-0.5,
                frequency_penalty=0.25,
                logit_bias={7: -100.0},
                stop_token_ids=[3],
                ignore_eos=True,
                min_new_tokens=2,
                logprobs=0,
                n=4,
            )
        )
    )
    list(stub.Generate(pb2.GenerateRequest(prompt="p")))

    assert engine.requests == [
        Generation(
            messages=(Message("user", "hi"),),
            max_new_tokens=5,
            temperature=0.5,
            top_p=0.25,
            seed=-3,
            stop=("x",),
            top_k=0,
            min_p=0.125,
            repetition_penalty=1.5,
            presence_penalty=-0.5,
            frequency_penalty=0.25,
            logit_bias={7: -100.0},
            stop_token_ids=(3,),
            ignore_eos=True,
            min_new_tokens=2,
            logprobs=0,
            n=4,
        ),
        # What was left out is the model's own affair, but for the temperature.
        Generation(prompt="p", temperature=0.0, top_p=None, top_k=None, min_p=None, logprobs=None, n=1),
    ]


def test_what_the_engine_says_of_a_token_is_told(
    stub: pb2_grpc.ModelHostServiceStub, engine: ScriptedEngine
) -> None:
    likely = TokenLogprob(7, "one", -0.5, (TopLogprob(8, "two", -0.25), TopLogprob(7, "one", -0.5)))
    engine.script = [
        Piece("one", (7,), index=1, logprobs=(likely,)),
        Finish(FinishReason.STOP, prompt_tokens=3, output_tokens=1, index=1, cached_prompt_tokens=2),
    ]

    chunk, finish = stub.Generate(pb2.GenerateRequest(prompt="p"))

    told = chunk.chunk.logprobs[0]
    assert (told.token_id, told.text, told.logprob) == (7, "one", -0.5)
    assert [(top.token_id, top.text, top.logprob) for top in told.top] == [
        (8, "two", -0.25),
        (7, "one", -0.5),
    ]
    assert (chunk.chunk.index, finish.finish.index) == (1, 1)
    assert finish.finish.usage.cached_prompt_tokens == 2


def test_embeddings_keep_the_order_of_their_inputs(stub: pb2_grpc.ModelHostServiceStub) -> None:
    response = stub.Embed(pb2.EmbedRequest(inputs=["a", "bb", "ccc"]))

    assert [list(embedding.values) for embedding in response.embeddings] == [[1.0], [2.0], [3.0]]
    assert response.usage.prompt_tokens == 6


def test_a_wrong_request_names_its_field(stub: pb2_grpc.ModelHostServiceStub) -> None:
    error = failure(lambda: list(stub.Generate(pb2.GenerateRequest(prompt="wrong"))))

    assert isinstance(error, InvalidArgument)
    assert (error.reason, error.field) == ("EMPTY_PROMPT", "prompt")


def test_a_defect_is_told_without_its_details(stub: pb2_grpc.ModelHostServiceStub) -> None:
    error = failure(lambda: list(stub.Generate(pb2.GenerateRequest(prompt="break"))))

    assert (error.code, error.reason) == ("INTERNAL", "COMPUTE_FAILED")
    assert "secret" not in error.message


def test_a_draining_host_sends_callers_away(stub: pb2_grpc.ModelHostServiceStub, gate: Gate) -> None:
    gate.set_open(False)

    error = failure(lambda: stub.Embed(pb2.EmbedRequest(inputs=["a"])))

    assert isinstance(error, Unavailable)
    assert error.reason == "INSTANCE_DRAINING"


def test_a_full_queue_says_when_to_come_back(
    stub: pb2_grpc.ModelHostServiceStub, engine: ScriptedEngine, scheduler: Scheduler
) -> None:
    # given one call that computes and one that waits
    computing = stub.Generate(pb2.GenerateRequest(prompt="wait"))
    assert engine.hold.reached.wait(20)
    scheduler.submit(Script([1]))

    # when a third comes
    error = failure(lambda: list(stub.Generate(pb2.GenerateRequest(prompt="third"))))

    # then it is refused, and the others are answered
    assert (error.code, error.reason) == ("RESOURCE_EXHAUSTED", "QUEUE_FULL")
    assert error.retry_after is not None
    engine.hold.go_on()
    assert next(response.chunk.text for response in computing) == "wait"


def test_a_caller_who_hangs_up_stops_the_computation(
    stub: pb2_grpc.ModelHostServiceStub, engine: ScriptedEngine, gate: Gate
) -> None:
    call = stub.Generate(pb2.GenerateRequest(prompt=ENDLESS))
    assert next(call).chunk.text == "wait"

    call.cancel()

    engine.hold.go_on()
    assert engine.works[0].left.wait(5)
    assert not engine.works[0].finished
    assert gate.wait_empty(5)


def test_a_deadline_stops_the_computation(
    stub: pb2_grpc.ModelHostServiceStub, engine: ScriptedEngine, gate: Gate
) -> None:
    error = failure(lambda: list(stub.Generate(pb2.GenerateRequest(prompt=ENDLESS), timeout=1.5)))

    engine.hold.go_on()

    assert error.code == "DEADLINE_EXCEEDED"
    assert engine.works[0].left.wait(5)
    assert not engine.works[0].finished
    assert gate.wait_empty(5)


def test_the_socket_is_for_this_user_only(stub: pb2_grpc.ModelHostServiceStub, tmp_path: Path) -> None:
    stub.Embed(pb2.EmbedRequest(inputs=["a"]))

    assert stat.S_IMODE((tmp_path / "host.sock").stat().st_mode) == 0o600


def test_a_stopped_server_leaves_nothing_open_and_can_start_again(server: Server, tmp_path: Path) -> None:
    # given a server that has answered
    socket = tmp_path / "host.sock"
    before = frozenset(open_descriptors())
    for _ in range(2):
        server.start(socket)
        with grpc.insecure_channel(f"unix:{socket}") as channel:
            pb2_grpc.ModelHostServiceStub(channel).Embed(pb2.EmbedRequest(inputs=["a"]))

        # when it stops
        assert server.stop() == socket

        # then neither its socket nor a descriptor remains
        assert not socket.exists()
        assert wait_for_descriptors(lambda number, leads_to: number in before) == {}
    assert server.stop() is None


def test_a_socket_that_cannot_be_made_is_refused(server: Server, tmp_path: Path) -> None:
    with pytest.raises(InvalidArgument) as too_long:
        server.start(tmp_path / ("x" * 120))
    with pytest.raises(Unavailable) as nowhere:
        server.start(tmp_path / "nowhere" / "host.sock")

    assert too_long.value.reason == "SOCKET_PATH_TOO_LONG"
    assert nowhere.value.reason == "SERVE_FAILED"
    assert server.stop() is None


def test_what_an_engine_cannot_do_is_a_precondition(
    stub: pb2_grpc.ModelHostServiceStub, engine: ScriptedEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(inputs: Sequence[str]) -> Work:
        raise FailedPrecondition("ENGINE_CANNOT_EMBED", "no")

    monkeypatch.setattr(engine, "embed", refuse)

    assert failure(lambda: stub.Embed(pb2.EmbedRequest(inputs=["a"]))).reason == "ENGINE_CANNOT_EMBED"


# Many calls on one stream


class Stream:
    """A stream of ``Exchange``, and what was received on it."""

    def __init__(self, stub: pb2_grpc.ModelHostServiceStub) -> None:
        self._orders: SimpleQueue[pb2.ExchangeRequest | None] = SimpleQueue()
        self.call: Any = stub.Exchange(iter(self._orders.get, None))
        self.said: dict[int, list[str]] = defaultdict(list)
        self.finished: set[int] = set()
        self.failures: dict[int, DumontError] = {}

    def generate(self, call: int, prompt: str, timeout: float = 0) -> None:
        request = pb2.GenerateRequest(prompt=prompt).SerializeToString()
        self.order(pb2.ExchangeRequest(call=call, generate=request, timeout=timeout))

    def order(self, order: pb2.ExchangeRequest) -> None:
        self._orders.put(order)

    def receive(self, *calls: int) -> None:
        """Read until these calls are over."""
        while not self.finished.issuperset(calls):
            self.receive_some()

    def receive_some(self) -> None:
        """Read one message."""
        for frame in next(self.call).frames:
            assert frame.call not in self.finished
            self._take(frame)

    def _take(self, frame: Any) -> None:
        for message in map(pb2.GenerateResponse.FromString, frame.messages):
            if message.HasField("chunk"):
                self.said[frame.call].append(message.chunk.text)
        if frame.last:
            self.finished.add(frame.call)
        if frame.status:
            self.failures[frame.call] = from_status(Status.FromString(frame.status))

    def close(self) -> None:
        self._orders.put(None)
        self.call.cancel()


@pytest.fixture
def stream(stub: pb2_grpc.ModelHostServiceStub, engine: ScriptedEngine) -> Iterator[Stream]:
    engine.capacity = Capacity(sequences=2)
    made = Stream(stub)
    yield made
    made.close()


def test_calls_on_one_stream_are_answered_each_in_its_order(stream: Stream, gate: Gate) -> None:
    stream.generate(1, "one two")
    stream.generate(2, "three four five")

    stream.receive(1, 2)

    assert stream.said == {1: ["one", "two"], 2: ["three", "four", "five"]}
    assert stream.failures == {}
    assert gate.wait_empty(5)


def test_a_call_that_is_refused_says_why_and_others_go_on(stream: Stream, gate: Gate) -> None:
    stream.generate(1, "wrong")
    stream.order(pb2.ExchangeRequest(call=2, generate=b"\xff\xff"))
    stream.generate(3, "break")
    stream.receive(1, 2, 3)
    stream.generate(4, "one two")
    stream.receive(4)

    reasons = {call: failure.reason for call, failure in stream.failures.items()}
    assert reasons == {1: "EMPTY_PROMPT", 2: "MALFORMED_REQUEST", 3: "COMPUTE_FAILED"}
    assert "secret" not in stream.failures[3].message
    assert stream.said == {4: ["one", "two"]}
    assert gate.wait_empty(5)


def test_the_largest_request_that_a_node_takes_ends_nobody_elses_call(stream: Stream) -> None:
    # given: a call, and a request of the size at which the node itself refuses
    stream.generate(1, "one two")
    request = pb2.GenerateRequest(prompt="wrong")
    request.stop.append("x" * (ServerLimits().max_message_bytes - request.ByteSize() - 5))
    assert request.ByteSize() == ServerLimits().max_message_bytes

    stream.order(pb2.ExchangeRequest(call=2**62, generate=request.SerializeToString(), timeout=1e9))
    stream.receive(1, 2**62)

    # then only the request is refused
    assert (stream.said, set(stream.failures)) == ({1: ["one", "two"]}, {2**62})


def test_what_does_not_fit_in_the_queue_is_refused_alone(stream: Stream, engine: ScriptedEngine) -> None:
    engine.capacity = Capacity(sequences=1)
    stream.generate(1, "wait more")
    assert engine.hold.reached.wait(20)
    stream.generate(2, "waits")
    stream.generate(3, "too many")

    while not stream.finished:
        stream.receive_some()
    engine.hold.go_on()
    stream.receive(1, 2, 3)

    [(refused, failure)] = stream.failures.items()
    assert (failure.reason, failure.retry_after is not None) == ("QUEUE_FULL", True)
    assert set(stream.said) == {1, 2, 3} - {refused}


def test_a_cancelled_call_stops_and_others_go_on(stream: Stream, engine: ScriptedEngine) -> None:
    stream.generate(1, ENDLESS)
    assert engine.hold.reached.wait(20)
    stream.generate(2, "one two")

    stream.order(pb2.ExchangeRequest(call=1, cancel=True))
    engine.hold.go_on()
    stream.receive(1, 2)

    assert stream.failures[1].code == "CANCELLED"
    assert engine.works[0].left.wait(5)
    assert not engine.works[0].finished
    assert stream.said[2] == ["one", "two"]


def test_a_call_on_a_stream_has_its_own_deadline(stream: Stream, engine: ScriptedEngine) -> None:
    stream.generate(1, ENDLESS, timeout=0.4)
    threading.Timer(0.5, engine.hold.go_on).start()

    stream.receive(1)

    assert stream.failures[1].code == "DEADLINE_EXCEEDED"
    assert not engine.works[0].finished


def test_a_stream_that_breaks_ends_its_calls(
    stream: Stream, engine: ScriptedEngine, scheduler: Scheduler, gate: Gate
) -> None:
    stream.generate(1, ENDLESS)
    stream.generate(2, ENDLESS)
    assert engine.hold.reached.wait(20)

    stream.call.cancel()
    engine.hold.go_on()

    assert gate.wait_empty(5)
    assert engine.works[0].left.wait(5)
    for _ in range(2):  # what was cancelled is looked at between two steps
        scheduler.call(lambda: None)
    assert (scheduler.running, scheduler.queued) == (0, 0)
    assert not any(work.finished for work in engine.works)


def test_a_draining_host_refuses_calls_on_a_stream(stream: Stream, gate: Gate) -> None:
    gate.set_open(False)

    stream.generate(1, "one")
    stream.receive(1)

    assert stream.failures[1].reason == "INSTANCE_DRAINING"


def test_a_caller_who_never_reads_holds_up_nobody(
    stream: Stream, stub: pb2_grpc.ModelHostServiceStub, engine: ScriptedEngine, gate: Gate
) -> None:
    # given more than a connection takes, on a stream that nobody reads
    stream.generate(1, "wait " + "more " * 20_000)
    assert engine.hold.reached.wait(20)
    engine.hold.go_on()

    # when another calls, then it is answered,
    answers = list(stub.Generate(pb2.GenerateRequest(prompt="one two")))
    assert [answer.chunk.text for answer in answers[:-1]] == ["one", "two"]

    # and the first is computed to its end and holds no room
    assert engine.works[0].left.wait(10)
    assert engine.works[0].finished
    stream.close()
    assert gate.wait_empty(5)
