"""``dumont.model_host.v1.ModelHostService`` on a Unix socket.

The synchronous server, not ``grpc.aio``: once stopped it leaves no descriptor behind, and a process with a
descriptor that CRIU does not know cannot be captured.
"""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, Final

import grpc
from google.protobuf.message import DecodeError
from google.rpc.status_pb2 import Status
from grpc_status import rpc_status

from dumont.errors import DumontError, Internal, InvalidArgument, Unavailable
from dumont.inference.v1 import inference_pb2
from dumont.limits import MESSAGE_BYTES
from dumont.model_host.v1 import model_host_service_pb2 as pb2
from dumont.model_host.v1 import model_host_service_pb2_grpc as pb2_grpc
from dumont.rpc.status import to_status
from model_host.engine import Engine, Finish, FinishReason, Generation, Message, Piece, Work
from model_host.exchange import Exchange
from model_host.gate import Gate
from model_host.scheduler import Job, Scheduler

log = logging.getLogger(__name__)

DOMAIN: Final = "model_host.dumont"
UNIX_PATH_LIMIT: Final = 107  # bytes in sockaddr_un, less the final zero
SPARE_THREADS: Final = 8  # answer "full" and "draining" while every other thread waits in the queue
ORDER_BYTES: Final = 1024  # that snapshotd adds to a request: its number and its deadline
OPTIONS: Final = (
    ("grpc.so_reuseport", 0),
    ("grpc.max_concurrent_streams", 1000),
    # For an order that is too large, gRPC would end the stream, and with it the calls of others.
    ("grpc.max_receive_message_length", MESSAGE_BYTES + ORDER_BYTES),
    ("grpc.max_send_message_length", MESSAGE_BYTES),
)
REASONS: Final = {
    FinishReason.END: inference_pb2.FINISH_REASON_END,
    FinishReason.LENGTH: inference_pb2.FINISH_REASON_LENGTH,
    FinishReason.STOP: inference_pb2.FINISH_REASON_STOP,
}


class ModelHostService(pb2_grpc.ModelHostServiceServicer):
    """Parses, computes through the scheduler, converts.

    Args:
        clock: monotonic seconds, the scheduler's.
    """

    def __init__(
        self, engine: Engine, scheduler: Scheduler, gate: Gate, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._engine = engine
        self._scheduler = scheduler
        self._gate = gate
        self._clock = clock

    def Generate(
        self, request: pb2.GenerateRequest, context: grpc.ServicerContext
    ) -> Iterator[pb2.GenerateResponse]:
        with _errors(context), self._gate.enter():
            yield from map(_response, self._compute(self._engine.generate(_generation(request)), context))

    def Embed(self, request: pb2.EmbedRequest, context: grpc.ServicerContext) -> pb2.EmbedResponse:
        with _errors(context), self._gate.enter():
            response = pb2.EmbedResponse()
            for batch in self._compute(self._engine.embed(request.inputs), context):
                response.usage.prompt_tokens += batch.prompt_tokens
                for values in batch.embeddings:
                    response.embeddings.add(values=values)
            return response

    def Exchange(
        self, request_iterator: Iterator[pb2.ExchangeRequest], context: grpc.ServicerContext
    ) -> Iterator[pb2.ExchangeResponse]:
        exchange = Exchange(
            self._begin, lambda item: _response(item).SerializeToString(), _failure, self._clock
        )
        exchange.listen(request_iterator)
        if not context.add_callback(exchange.close):
            exchange.close()
        return exchange.responses()

    def _begin(
        self, request: bytes, timeout: float, urgent: Callable[[], None]
    ) -> tuple[Job, Callable[[], None]]:
        """Check a call that came by ``Exchange`` and submit it; the job, and what to call when it is over."""
        try:
            parsed = pb2.GenerateRequest.FromString(request)
        except DecodeError as error:
            raise InvalidArgument(
                "MALFORMED_REQUEST", "the request is not a valid protobuf message"
            ) from error
        deadline = self._clock() + timeout if timeout else None
        place = ExitStack()
        place.enter_context(self._gate.enter())
        try:
            job = self._scheduler.submit(self._engine.generate(_generation(parsed)), deadline, urgent)
        except BaseException:
            place.close()
            raise
        return job, place.close

    def _compute(self, work: Work, context: grpc.ServicerContext) -> Iterator[Any]:
        remaining = context.time_remaining()
        deadline = None if remaining is None else self._clock() + remaining
        job = self._scheduler.submit(work, deadline)
        # Called when the call ends in whatever way; false when it already has.
        if not context.add_callback(job.cancel):
            job.cancel()
        return iter(job)


class Server:
    """Opens and closes the socket. Between the two nothing of gRPC is left in the process but its code.

    Args:
        servicer: answers the calls.
        max_calls: calls that are computed or wait to be.
    """

    def __init__(self, servicer: ModelHostService, max_calls: int) -> None:
        self._servicer = servicer
        self._workers = max_calls + SPARE_THREADS
        self._running: tuple[grpc.Server, ThreadPoolExecutor, Path] | None = None

    def start(self, socket: Path) -> None:
        """Serve on ``socket``, readable by this user only.

        Raises:
            InvalidArgument: SOCKET_PATH_TOO_LONG.
            Unavailable: SERVE_FAILED, the socket cannot be made.
        """
        if len(os.fsencode(socket)) > UNIX_PATH_LIMIT:
            raise InvalidArgument(
                "SOCKET_PATH_TOO_LONG",
                f"a socket's path takes at most {UNIX_PATH_LIMIT} bytes: {socket}",
                field="socket",
            )
        pool = ThreadPoolExecutor(self._workers, thread_name_prefix="call")
        server = grpc.server(pool, options=OPTIONS, maximum_concurrent_rpcs=2 * self._workers)
        pb2_grpc.add_ModelHostServiceServicer_to_server(self._servicer, server)
        umask = os.umask(0o177)
        try:
            server.add_insecure_port(f"unix:{socket}")
            server.start()
        except RuntimeError as error:
            server.stop(0).wait()
            pool.shutdown()
            raise Unavailable("SERVE_FAILED", f"{socket} cannot be served on: {error}") from error
        finally:
            os.umask(umask)
        self._running = (server, pool, socket)

    def stop(self) -> Path | None:
        """End every call, close the socket and remove it; the path it had, if there was one."""
        if self._running is None:
            return None
        (server, pool, socket), self._running = self._running, None
        server.stop(0).wait()
        pool.shutdown()
        socket.unlink(missing_ok=True)
        return socket


@contextmanager
def _errors(context: grpc.ServicerContext) -> Iterator[None]:
    """End the call with the status of what was raised; a defect is told in the log only."""
    try:
        yield
    except GeneratorExit:
        raise
    except Exception as error:
        context.abort_with_status(rpc_status.to_status(_failure(error)))


def _failure(error: BaseException) -> Status:
    """What a caller is told of an error; a defect is told in the log only."""
    if not isinstance(error, DumontError):
        log.error("a call failed", exc_info=error)
        error = Internal("INTERNAL", "The model host failed on this call; see its log.")
    return to_status(error, DOMAIN)


def _generation(request: pb2.GenerateRequest) -> Generation:
    def given(field: str) -> Any:
        return getattr(request, field) if request.HasField(field) else None  # type: ignore[arg-type]

    return Generation(
        prompt=request.prompt,
        messages=tuple(Message(message.role, message.content) for message in request.messages),
        max_new_tokens=request.max_new_tokens,
        temperature=request.temperature,  # absent is 0, greedy
        top_p=given("top_p"),
        seed=given("seed"),
        stop=tuple(request.stop),
        top_k=given("top_k"),
        min_p=given("min_p"),
        repetition_penalty=given("repetition_penalty"),
        presence_penalty=request.presence_penalty,
        frequency_penalty=request.frequency_penalty,
        logit_bias=dict(request.logit_bias),
        stop_token_ids=tuple(request.stop_token_ids),
        ignore_eos=request.ignore_eos,
        min_new_tokens=request.min_new_tokens,
        logprobs=given("logprobs"),
        n=request.n or 1,
    )


def _response(item: Piece | Finish) -> pb2.GenerateResponse:
    if isinstance(item, Finish):
        return pb2.GenerateResponse(finish=_finish(item))
    return pb2.GenerateResponse(chunk=_chunk(item))


def _chunk(piece: Piece) -> inference_pb2.TextChunk:
    chunk = inference_pb2.TextChunk(text=piece.text, token_ids=piece.token_ids, index=piece.index)
    for token in piece.logprobs:
        told = chunk.logprobs.add(token_id=token.token_id, text=token.text, logprob=token.logprob)
        for top in token.top:
            told.top.add(token_id=top.token_id, text=top.text, logprob=top.logprob)
    return chunk


def _finish(finish: Finish) -> inference_pb2.Finish:
    return inference_pb2.Finish(
        reason=REASONS[finish.reason],
        usage=inference_pb2.Usage(
            prompt_tokens=finish.prompt_tokens,
            output_tokens=finish.output_tokens,
            cached_prompt_tokens=finish.cached_prompt_tokens,
        ),
        index=finish.index,
    )
