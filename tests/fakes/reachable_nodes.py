"""Nodes in memory as one of several controllers reaches them: fenced, and no longer while it is stopped."""

from __future__ import annotations

import asyncio
from collections import defaultdict
from collections.abc import AsyncGenerator, Callable
from typing import Any

from controller.membership import Membership
from controller.ports import Change
from dumont.errors import Aborted, Unavailable
from dumont.sessions import Sessions
from tests.fakes.memory_nodes import MemoryNodes

# What does not go to a node, or not as a command.
UNFENCED = frozenset({"connect", "disconnect", "watch", "generate", "embed", "close"})


class Fences:
    """What every node knows of the sessions, as snapshotd's ``Ownership`` does."""

    def __init__(self) -> None:
        self.known: defaultdict[str, Sessions] = defaultdict(Sessions)
        # How many commands were refused because their session had ended.
        self.refused = 0

    def check(self, node: str, membership: Membership, told: Sessions) -> None:
        self.known[node] = self.known[node].merge(told)
        if self.known[node].ended(membership.number):
            self.refused += 1
            membership.end(self.known[node].highest)
            raise Aborted("SESSION_ENDED", f"session {membership.number} has ended", retry_after=1.0)


class ReachableNodes:
    """The ``Nodes`` port of one controller over nodes that it shares with others.

    ``carried_out`` is told of every command that a node takes: method, node, and the other arguments.
    ``freeze`` holds whatever the controller sends or is told, as SIGSTOP would; ``thaw`` lets it go on, late.
    """

    def __init__(
        self,
        nodes: MemoryNodes,
        fences: Fences,
        membership: Membership,
        carried_out: Callable[[str, str, tuple[Any, ...]], None] = lambda *_: None,
    ) -> None:
        self._carried_out = carried_out
        self._nodes = nodes
        self._fences = fences
        self._membership = membership
        self._running = asyncio.Event()
        self._running.set()
        self._connected: set[str] = set()
        self._dead = False
        self._cut: dict[str, list[Callable[[], None]]] = defaultdict(list)

    @property
    def dead(self) -> bool:
        """Whether ``kill`` was called."""
        return self._dead

    @property
    def running(self) -> asyncio.Event:
        """Set while the controller is not stopped."""
        return self._running

    def kill(self) -> None:
        """Nothing that the controller still does as it ends has any effect."""
        self._dead = True
        self._running.set()

    def freeze(self) -> None:
        self._running.clear()

    def thaw(self) -> None:
        self._running.set()

    async def connect(self, node: str, endpoint: str) -> None:
        await self._running.wait()
        self._connected.add(node)

    async def disconnect(self, node: str) -> None:
        self._connected.discard(node)
        for fail in self._cut.pop(node, []):
            fail()

    async def watch(self, node: str) -> AsyncGenerator[Change]:
        told = self._membership.sessions
        await self._running.wait()
        self._reach(node)
        self._fences.check(node, self._membership, told)
        changes = self._nodes.watch(node)
        try:
            async for change in changes:
                await self._running.wait()
                self._reach(node)
                yield change
        finally:
            await changes.aclose()

    def generate(self, node: str, request: bytes, timeout: float | None) -> Any:
        self._reach(node)
        return _StoppableFrames(self._nodes.generate(node, request, timeout), self._running)

    async def embed(self, node: str, request: bytes, timeout: float | None) -> bytes:
        await self._running.wait()
        self._reach(node)
        return await self._nodes.embed(node, request, timeout)

    async def close(self) -> None:
        return None

    def __getattr__(self, name: str) -> Any:
        method = getattr(self._nodes, name)

        async def command(node: str, *arguments: Any, **named: Any) -> Any:
            # Sent now, and carried out when it arrives: after a while if the controller is stopped meanwhile.
            told = self._membership.sessions
            await asyncio.sleep(0)
            await self._running.wait()
            self._reach(node)
            self._fences.check(node, self._membership, told)
            self._carried_out(name, node, arguments)
            answer = await method(node, *arguments, **named)
            await self._running.wait()
            self._reach(node)
            return answer

        return command

    def _reach(self, node: str) -> None:
        if node not in self._connected or self._dead:
            raise Unavailable("NODE_UNAVAILABLE", f"nodes/{node} does not answer", retry_after=1.0)


class _StoppableFrames:
    """An answer that comes to a stop with the controller."""

    def __init__(self, frames: Any, running: asyncio.Event) -> None:
        self._frames = frames
        self._running = running

    async def read(self) -> bytes | None:
        await self._running.wait()
        frame: bytes | None = await self._frames.read()
        await self._running.wait()
        return frame

    def cancel(self) -> None:
        self._frames.cancel()
