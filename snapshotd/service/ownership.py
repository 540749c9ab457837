"""The controller that this node belongs to. Commands of any other controller are refused.

Two controllers that both know a node, one of them with a wrong address or a copied database, would each stop
what the other starts. So the node keeps the id of the first one it registered with. Controllers name
themselves in the user agent of each call; people and tools that do not are not refused.
"""

from __future__ import annotations

import re
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import grpc
import structlog

from dumont.errors import FailedPrecondition
from snapshotd.system.files import sync

log = structlog.get_logger(__name__)

_CALLER = re.compile(r"dumont-controller/([a-z0-9-]{1,63})")


class Ownership:
    """Which controller a node belongs to, kept in a file.

    Args:
        path: of the file, which holds the controller's id.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self.controller = path.read_text().strip() if path.exists() else ""

    def claim(self, controller: str) -> None:
        """Belong to ``controller`` from now on. An empty id, of an older controller, changes nothing."""
        if controller and controller != self.controller:
            staged = self._path.with_suffix(".new")
            staged.write_text(controller)
            sync(staged)
            staged.replace(self._path)
            sync(self._path.parent)
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


class OwnershipInterceptor(grpc.aio.ServerInterceptor):
    """Refuses the calls of controllers that the node does not belong to."""

    def __init__(self, ownership: Ownership) -> None:
        self._ownership = ownership

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[grpc.RpcMethodHandler[Any, Any] | None]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> grpc.RpcMethodHandler[Any, Any] | None:
        for key, value in handler_call_details.invocation_metadata or ():
            if key == "user-agent" and (caller := _CALLER.search(str(value))):
                self._ownership.check(caller[1])
        return await continuation(handler_call_details)
