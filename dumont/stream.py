"""An answer as it is written."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator
from typing import Any

import grpc

from dumont import convert
from dumont.connection import Connection
from dumont.controller.v1 import inference_service_pb2
from dumont.errors import Internal, InvalidArgument
from dumont.starting import OnProgress, following
from dumont.types import Answer, Generation, Piece, StartInfo, Usage


class AsyncTextStream:
    """Pieces of text, in order: ``async for text in stream``; ``pieces()`` tells more of each.

    Leaving the loop early cancels the call, and so the computing. Iterate once. ``start`` is known as soon
    as the model is awake, the whole ``generation`` at the end.
    """

    def __init__(
        self,
        connection: Connection,
        request: inference_service_pb2.GenerateRequest,
        timeout: float | None,
        progress: OnProgress | None = None,
    ) -> None:
        self._connection = connection
        self._timeout = timeout
        self._called = time.monotonic()
        self._call: Any = connection.inference.Generate(request, timeout=timeout)
        self._wanted = max(1, request.n)
        self._pieces: dict[int, list[Piece]] = {}
        self._ends: dict[int, tuple[str, Usage]] = {}
        self._progress = following(connection, request.deployment, progress)
        self._first_token_seconds: float | None = None
        self._start: StartInfo | None = None

    async def started(self) -> StartInfo:
        """How the instance was started; waits until it answers.

        Raises:
            DumontError: it could not be started.
        """
        while self._start is None:
            if await self._next() is None:
                raise _incomplete()
        return self._start

    @property
    def start(self) -> StartInfo | None:
        """How the instance was started; None until the first piece or ``started()``."""
        return self._start

    @property
    def generation(self) -> Generation | None:
        """The whole answer; None until the stream has ended."""
        if self._start is None or len(self._ends) < self._wanted:
            return None
        answers = tuple(self._answer(index) for index in sorted(self._ends))
        first = answers[0]
        return Generation(
            text=first.text,
            start=self._start,
            usage=Usage(
                first.usage.prompt_tokens,
                sum(answer.usage.output_tokens for answer in answers),
                first.usage.cached_prompt_tokens,
            ),
            finish_reason=first.finish_reason,
            first_token_seconds=self._first_token_seconds or 0.0,
            answers=answers,
        )

    def _answer(self, index: int) -> Answer:
        pieces = self._pieces.get(index, [])
        finish_reason, usage = self._ends[index]
        return Answer(
            text="".join(piece.text for piece in pieces),
            finish_reason=finish_reason,
            usage=usage,
            token_ids=tuple(token for piece in pieces for token in piece.token_ids),
            logprobs=tuple(token for piece in pieces for token in piece.logprobs),
        )

    async def collect(self) -> Generation:
        """Read the answer to its end."""
        async for _ in self.pieces():
            pass
        generation = self.generation
        if generation is None:
            raise _incomplete()
        return generation

    def cancel(self) -> None:
        """End the call if it still runs."""
        self._call.cancel()
        self._progress.cancel()

    async def pieces(self) -> AsyncIterator[Piece]:
        """Each piece with its tokens, their log-probabilities and the answer it belongs to."""
        try:
            while (piece := await self._next()) is not None:
                if piece.text or piece.token_ids:
                    yield piece
        finally:
            self.cancel()

    async def __aiter__(self) -> AsyncIterator[str]:
        if self._wanted > 1:
            self.cancel()
            raise InvalidArgument(
                "SEVERAL_ANSWERS",
                "the pieces of several answers are interleaved; iterate over pieces(), each with its index, "
                "or call generate()",
                field="n",
            )
        try:
            while (piece := await self._next()) is not None:
                if piece.text:
                    yield piece.text
        finally:
            self.cancel()

    async def _next(self) -> Piece | None:
        """The piece of the next message, empty if it has none; None at the end."""
        try:
            with self._connection.errors(self._timeout):
                response = await self._call.read()
        finally:
            # With the first message the model is awake, or never will be.
            self._progress.cancel()
        if response is grpc.aio.EOF:
            return None
        event = response.WhichOneof("event")
        if event == "start":
            self._start = convert.start_info(response.start)
        elif event == "chunk":
            if self._first_token_seconds is None:
                self._first_token_seconds = time.monotonic() - self._called
            piece = convert.piece(response.chunk)
            self._pieces.setdefault(piece.index, []).append(piece)
            return piece
        elif event == "finish":
            finish = response.finish
            self._ends[finish.index] = (convert.finish_reason(finish), convert.usage(finish.usage))
        return Piece("")


def _incomplete() -> Internal:
    return Internal("ANSWER_INCOMPLETE", "the answer ended without saying how it was started or how it ended")
