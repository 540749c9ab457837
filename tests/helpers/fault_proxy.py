"""A proxy on loopback that forwards to a server, or does it wrong as it is told."""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import Callable
from types import TracebackType
from typing import Self

BLOCK = 64 << 10
# A connection that is cut gets this much of its answer.
CUT_AFTER = 10_000
SLOW_SECONDS = 0.02
ERROR = b"HTTP/1.1 500 Internal Server Error\r\nContent-Length: 0\r\nConnection: close\r\n\r\n"


class FaultProxy:
    """Runs in a thread of its own while it is entered.

    Attributes:
        asked: called with what a client sends, before it is passed on.
    """

    def __init__(self, target: str) -> None:
        host, _, port = target.removeprefix("http://").rpartition(":")
        self._host, self._target_port = host, int(port)
        self._fault = ""
        self._left = 0
        self._refuses = False
        # How many connections met the fault.
        self.stumbled = 0
        self.asked: Callable[[bytes], None] = lambda data: None
        self._writers: set[asyncio.StreamWriter] = set()

    def __enter__(self) -> Self:
        ready = threading.Event()
        self._thread = threading.Thread(target=lambda: asyncio.run(self._run(ready)), daemon=True)
        self._thread.start()
        assert ready.wait(10)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._loop.call_soon_threadsafe(self._stopped.set)
        self._thread.join(10)

    @property
    def endpoint(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def stumble(self, fault: str, connections: int) -> None:
        """The next connections fail: ``errors`` answers 500, ``cut`` ends amid the answer, ``slow`` drips."""
        self._fault, self._left = fault, connections
        # Those that are open already would not notice.
        self._loop.call_soon_threadsafe(self._close_all)

    def down(self) -> None:
        """Close everything, and every new connection at once."""
        self._refuses = True
        self._loop.call_soon_threadsafe(self._close_all)

    def up(self) -> None:
        self._refuses = False

    async def _run(self, ready: threading.Event) -> None:
        self._loop, self._stopped = asyncio.get_running_loop(), asyncio.Event()
        server = await asyncio.start_server(self._serve, "127.0.0.1", 0)
        self.port = int(server.sockets[0].getsockname()[1])
        ready.set()
        async with server:
            await self._stopped.wait()
            self._close_all()

    def _close_all(self) -> None:
        for writer in list(self._writers):
            writer.close()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        fault = ""
        if self._left:
            self._left -= 1
            self.stumbled += 1
            fault = self._fault
        self._writers.add(writer)
        try:
            with contextlib.suppress(OSError):
                if self._refuses:
                    return
                if fault == "errors":
                    await reader.read(BLOCK)
                    writer.write(ERROR)
                    await writer.drain()
                    return
                await self._forward(reader, writer, fault)
        finally:
            self._writers.discard(writer)
            writer.close()

    def _ask(self, data: bytes) -> None:
        # Connections stay; what is to be called may have been set since.
        self.asked(data)

    async def _forward(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, fault: str) -> None:
        target_reader, target_writer = await asyncio.open_connection(self._host, self._target_port)
        there = asyncio.create_task(_pump(reader, target_writer, self._ask))
        back = asyncio.create_task(_pump(target_reader, writer, fault=fault))
        await asyncio.wait({there, back}, return_when=asyncio.FIRST_COMPLETED)
        there.cancel()
        back.cancel()
        target_writer.close()


async def _pump(
    reader: asyncio.StreamReader,
    writer: asyncio.StreamWriter,
    seen: Callable[[bytes], None] = lambda data: None,
    fault: str = "",
) -> None:
    sent = 0
    with contextlib.suppress(OSError):
        while data := await reader.read(BLOCK):
            if fault == "cut" and sent + len(data) > CUT_AFTER:
                return
            seen(data)
            if fault == "slow":
                await asyncio.sleep(SLOW_SECONDS)
            sent += len(data)
            writer.write(data)
            await writer.drain()
