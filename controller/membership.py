"""Which controllers share the database, and which of them acts on which deployment, as this one knows it.

Each deployment has a *holder*: the controller whose session acts on it. A session holds what it made or took
over until it ends. What has no deployment, such as the snapshots of one that was deleted, is the oldest
session's.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping

from controller.ports import Members
from dumont.sessions import Sessions


class Membership:
    """The facts of one session.

    Args:
        number: of this controller's session.
    """

    def __init__(self, number: int) -> None:
        self.number = number
        self._members = Members({number: ""}, number)
        self._holders: dict[str, int] = {}
        # Set when this session has ended; the controller must then begin another one.
        self.ended = asyncio.Event()
        # The next session must have a higher number than this.
        self.surpassed = 0
        self._others_end: dict[int, asyncio.Event] = {}

    @property
    def members(self) -> Members:
        """The sessions that live."""
        return self._members

    @property
    def sessions(self) -> Sessions:
        """The same, as nodes are told."""
        return Sessions(self._members.highest, frozenset(self._members.addresses))

    @property
    def oldest(self) -> bool:
        """Whether this session is the oldest one, which does what needs to be done once."""
        return min(self._members.addresses, default=self.number) >= self.number

    def mine(self, deployment: str) -> bool:
        """Whether this controller acts on a deployment, or on what is left of it."""
        holder = self._holders.get(deployment)
        return self.oldest if holder is None else holder == self.number

    def holder(self, deployment: str) -> int | None:
        """The session that acts on a deployment, which may have ended just now; None: there is none."""
        return self._holders.get(deployment)

    def hold(self, deployment: str) -> None:
        """This controller has made a deployment."""
        self._holders[deployment] = self.number

    def let_go(self, deployment: str) -> None:
        """A deployment is gone."""
        self._holders.pop(deployment, None)

    def learn(self, members: Members, holders: Mapping[str, int] | None = None) -> None:
        """Take in what the registry says.

        Args:
            members: the sessions that live.
            holders: of all deployments; None: as before.
        """
        self._members = members
        if holders is not None:
            self._holders = dict(holders)
        for number in [n for n in self._others_end if n not in members.addresses]:
            self._others_end.pop(number).set()

    def end(self, surpassed: int = 0) -> None:
        """This session has ended, or has to because the session of the number ``surpassed`` was before it."""
        self.surpassed = max(self.surpassed, surpassed)
        self.ended.set()

    async def until_ended(self, number: int) -> None:
        """Wait until another session has ended."""
        if number in self._members.addresses:
            await self._others_end.setdefault(number, asyncio.Event()).wait()
