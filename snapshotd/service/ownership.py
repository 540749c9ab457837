"""Whose commands this node takes: those of its fleet's controllers, as long as their sessions live.

Two fleets that both know a node, one of them with a wrong address or a copied database, would each stop what
the other starts. So the node keeps the id of the first one it registered with. The controllers of one fleet
share its id. Each has a session; when that ends, another controller acts in its place. What the first one has
sent before, or sends when it wakes up, must not be carried out any more. Controllers name their fleet in the
user agent of each call, and their session in its metadata; people and tools that do not are not refused.
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import grpc
import structlog

from dumont.errors import FailedPrecondition
from dumont.sessions import SESSION_KEY, SESSIONS_KEY, Sessions
from snapshotd.system.files import sync

log = structlog.get_logger(__name__)

_CALLER = re.compile(r"dumont-controller/([a-z0-9-]{1,63})")


class Ownership:
    """Which fleet a node belongs to, and which of its sessions have ended, kept in two files.

    Args:
        path: of the file that holds the fleet's id. The other one is beside it.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._sessions_path = path.with_name("sessions")
        self.controller = path.read_text().strip() if path.exists() else ""
        stored = self._sessions_path.read_text() if self._sessions_path.exists() else ""
        self.sessions = Sessions.parse(stored) if stored else Sessions()
        # Not kept: what is on its way to this process over a connection does not outlive it.
        self._connections: dict[int, int] = {}
        self._writing = asyncio.Lock()

    def claim(self, controller: str) -> None:
        """Belong to ``controller`` from now on. An empty id, of an older controller, changes nothing."""
        if controller and controller != self.controller:
            if self.controller:
                # The numbers of another fleet's sessions mean something else.
                self._sessions_path.unlink(missing_ok=True)
                self.sessions = Sessions()
                self._connections = {}
            _write(self._path, controller)
            log.info("node_owner_changed", controller=controller, before=self.controller)
            self.controller = controller

    def check(self, controller: str) -> None:
        """Check that commands of ``controller`` are accepted.

        Raises:
            FailedPrecondition: WRONG_CONTROLLER, the node belongs to another one.
        """
        if self.controller and controller != self.controller:
            raise FailedPrecondition(
                "WRONG_CONTROLLER",
                f"this node belongs to controller {self.controller} and takes no commands of {controller}; "
                "to change that, restart its snapshotd with --accept-controller",
                metadata={"controller": self.controller, "caller": controller},
            )

    async def learn(self, sessions: Sessions) -> None:
        """Take in which sessions a controller knows; what is new is on the disk when this returns."""
        async with self._writing:
            known = self.sessions.merge(sessions)
            if known != self.sessions:
                await asyncio.to_thread(_write, self._sessions_path, str(known))
                self.sessions = known
                self._connections = {n: c for n, c in self._connections.items() if not known.ended(n)}

    def check_session(self, session: int, connection: int = 0) -> None:
        """Check that commands of a session are accepted.

        Args:
            session: its number.
            connection: counts its connections to this node: what was sent over an earlier one is late.

        Raises:
            FailedPrecondition: SESSION_ENDED, another controller acts in its place; COMMAND_LATE, its
                controller has given this node up since it sent the command.
        """
        if self.sessions.ended(session):
            raise FailedPrecondition(
                "SESSION_ENDED",
                f"the controller's session {session} has ended, and this node takes no more commands of it; "
                "the controller begins another one by itself",
                metadata={"session": str(session), "highest": str(self.sessions.highest)},
            )
        newest = self._connections.get(session, 0)
        if connection < newest:
            raise FailedPrecondition(
                "COMMAND_LATE",
                f"this command was sent over connection {connection} of session {session}, which has been "
                f"replaced by connection {newest}; list what the node holds and send it again if need be",
                metadata={"session": str(session)},
            )
        self._connections[session] = connection


class OwnershipInterceptor(grpc.aio.ServerInterceptor):
    """Refuses the calls of controllers that the node does not belong to, and those of ended sessions."""

    def __init__(self, ownership: Ownership) -> None:
        self._ownership = ownership

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[grpc.RpcMethodHandler[Any, Any] | None]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> grpc.RpcMethodHandler[Any, Any] | None:
        metadata = {key: str(value) for key, value in handler_call_details.invocation_metadata or ()}
        if caller := _CALLER.search(metadata.get("user-agent", "")):
            self._ownership.check(caller[1])
            if SESSIONS_KEY in metadata:
                await self._ownership.learn(Sessions.parse(metadata[SESSIONS_KEY]))
            if SESSION_KEY in metadata:
                session, _, connection = metadata[SESSION_KEY].partition(".")
                self._ownership.check_session(int(session), int(connection or 0))
        return await continuation(handler_call_details)


def _write(path: Path, text: str) -> None:
    """Replace a file in one step; it is on the disk when this returns."""
    staged = path.with_suffix(".new")
    staged.write_text(text)
    sync(staged)
    staged.replace(path)
    sync(path.parent)
