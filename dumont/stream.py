"""An answer as it is written."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator
from typing import Any

import grpc

from dumont import convert
from dumont.connection import Connection
from dumont.controller.v1 import inference_service_pb2
from dumont.errors import Internal
from dumont.types import Generation, StartInfo, Usage


class AsyncTextStream:
    """Pieces of text, in order: ``async for piece in stream``.

    Leaving the loop early cancels the call, and so the computing. Iterate once. ``start`` is known as soon
    as the model is awake, the whole ``generation`` at the end.
    """

    def __init__(
        self,
        connection: Connection,
        request: inference_service_pb2.GenerateRequest,
        timeout: float | None,
    ) -> None:
        self._connection = connection
        self._called = time.monotonic()
        self._call: Any = connection.inference.Generate(request, timeout=timeout)
        self._pieces: list[str] = []
        self._first_token_seconds: float | None = None
        self._start: StartInfo | None = None
        self._usage: Usage | None = None
        self._finish_reason = ""

    async def started(self) -> StartInfo:
        """Where the answer comes from; waits until the model is awake.

        Raises:
            DumontError: it could not be started.
        """
        while self._start is None:
            if await self._next() is None:
                raise _incomplete()
        return self._start

    @property
    def start(self) -> StartInfo | None:
        """Where the answer comes from; None until the first piece or ``started()``."""
        return self._start

    @property
    def generation(self) -> Generation | None:
        """The whole answer; None until the stream has ended."""
        if self._start is None or self._usage is None:
            return None
        return Generation(
            text="".join(self._pieces),
            start=self._start,
            usage=self._usage,
            finish_reason=self._finish_reason,
            first_token_seconds=self._first_token_seconds or 0.0,
        )

    async def collect(self) -> Generation:
        """Read to the end."""
        async for _ in self:
            pass
        generation = self.generation
        if generation is None:
            raise _incomplete()
        return generation

    def cancel(self) -> None:
        """End the call, if it still runs."""
        self._call.cancel()

    async def __aiter__(self) -> AsyncIterator[str]:
        try:
            while (piece := await self._next()) is not None:
                if piece:
                    yield piece
        finally:
            self.cancel()

    async def _next(self) -> str | None:
        """The text of the next message, empty where it has none; None at the end."""
        with self._connection.errors():
            response = await self._call.read()
        if response is grpc.aio.EOF:
            return None
        event = response.WhichOneof("event")
        if event == "start":
            self._start = convert.start_info(response.start)
        elif event == "chunk":
            if self._first_token_seconds is None:
                self._first_token_seconds = time.monotonic() - self._called
            self._pieces.append(response.chunk.text)
            text: str = response.chunk.text
            return text
        elif event == "finish":
            self._usage = convert.usage(response.finish.usage)
            self._finish_reason = convert.finish_reason(response.finish)
        return ""


def _incomplete() -> Internal:
    return Internal("ANSWER_INCOMPLETE", "the answer ended without saying how it was started or how it ended")
