"""How controllers that share a database take each other's place.

Each keeps renewing its session. One that has not for ``seconds`` is ended by another one. That one becomes
the holder of its deployments, reads what the database says of them, and asks every node again what it
holds. Nodes learn with that question that the session has ended: nothing that it sent is carried out after
the answer. Nothing here depends on a clock of this machine. A controller that was stopped for a while goes
on as before if nobody has ended its session; otherwise it learns that from the database or from a node.
"""

from __future__ import annotations

import asyncio

import structlog

from controller.core import Core
from controller.ports import Stored
from dumont.errors import DumontError

log = structlog.get_logger()

SESSION_ENDED = "SESSION_ENDED"


class Succession:
    """Keeps this controller's session, and takes over from those that end.

    Args:
        core: the ports and the facts.
        seconds: without a renewal, a session may be ended after so long.
    """

    def __init__(self, core: Core, seconds: float) -> None:
        self._core = core
        self._seconds = seconds
        self._renewed_at = core.now()
        # The refreshes that were begun, and the number of the last one that did not fail.
        self._begun = 0
        self._refreshed = 0
        self._refreshing = asyncio.Lock()

    async def run(self) -> None:
        """Renew the session and look after the others until it ends."""
        while not self._core.membership.ended.is_set():
            await self._core.clock.sleep(self._seconds / 3)
            try:
                await self.step()
            except DumontError as error:
                log.warning("session_not_renewed", reason=error.reason, error=error.message)
                if error.reason == SESSION_ENDED:
                    self._core.membership.end()
            except Exception:
                log.exception("succession_failed")

    async def step(self) -> None:
        """Renew the session, end those whose time is up, and take over what they held.

        Raises:
            Aborted: SESSION_ENDED, this controller's own.
            Unavailable: the database does not answer.
        """
        now = self._core.now()
        await self._core.registry.renew(self._seconds)
        in_time = now - self._renewed_at < self._seconds
        self._renewed_at = now
        if in_time:
            # Otherwise nobody could renew for a while, as when the database was away: they get their chance.
            await self._core.registry.end_expired()
        await self.refresh()

    async def refresh(self) -> None:
        """Read what the other controllers have changed. Those who call while it runs share the next one.

        Raises:
            Aborted: SESSION_ENDED.
            Unavailable: the database does not answer.
        """
        wanted = self._begun + 1
        async with self._refreshing:
            if self._refreshed >= wanted:
                return
            self._begun += 1
            number = self._begun
            registry, membership = self._core.registry, self._core.membership
            # A claim counts as a change, so one whose outcome was not learned is found by the next refresh.
            await registry.claim()
            members = await registry.members()
            if members.revision != membership.members.revision:
                await self._load()
            elif set(members.addresses) != set(membership.members.addresses):
                if min(members.addresses, default=membership.number) >= membership.number:
                    # What has no deployment is this controller's now, and it may not know all of that.
                    await self._load()
                else:
                    membership.learn(members)
            self._refreshed = number

    async def _load(self) -> None:
        before = self._held()
        stored = await self._core.registry.load()
        number = self._core.membership.number
        holds = {deployment for deployment, holder in stored.holders.items() if holder == number}
        # One that was mine before the database was read, and is not any more, has been deleted since.
        self._take_in(stored, frozenset(holds - before - self._held()))

    def _held(self) -> set[str]:
        """The deployments that this controller knows as its own."""
        return {d for d in self._core.deployments.by_id if self._core.membership.mine(d)}

    def _take_in(self, stored: Stored, claimed: frozenset[str]) -> None:
        """What this controller held before is newer in memory; everything else is as stored."""
        core, membership = self._core, self._core.membership
        mine = self._held()
        left_to_me = membership.oldest
        ended = set(membership.members.addresses) - set(stored.members.addresses)
        holders = {
            deployment: holder
            for deployment, holder in stored.holders.items()
            # One of mine that I no longer know has been deleted since it was read.
            if holder != membership.number or deployment in claimed
        }
        membership.learn(stored.members, holders | dict.fromkeys(mine, membership.number))
        inherits = left_to_me != membership.oldest

        def changes_here(deployment: str) -> bool:
            """Whether its records were another controller's until now."""
            if deployment in holders:
                return True
            return deployment not in mine and (not left_to_me or deployment not in stored.holders)

        core.deployments.take_in(
            tuple(d for d in stored.deployments if d.id in holders), mine, stored.last_use or {}
        )
        changed_on: set[str] = set()
        recorded = {captured.id for captured in stored.captured}
        for captured in list(core.inventory.captured.values()):
            if captured.id not in recorded and changes_here(captured.deployment):
                core.inventory.drop_captured(captured.id)
                changed_on.add(captured.node)
        for captured in stored.captured:
            if changes_here(captured.deployment) and core.inventory.captured.get(captured.id) != captured:
                core.inventory.put_captured(captured)
                changed_on.add(captured.node)
        for intent in stored.intents:
            left = membership.oldest and intent.deployment not in stored.holders
            if intent.deployment in claimed or (left and intent.deployment not in mine):
                core.inventory.put_intent(intent)
        core.fleet.take_in(stored.nodes)
        if claimed or (inherits and ended):
            log.warning("taken_over", deployments=len(claimed), ended_sessions=sorted(ended))
            for node in list(core.inventory.nodes):
                core.fleet.ask_again(node)
        elif changed_on:
            # Another controller has made or deleted snapshots; nodes do not report that by themselves.
            core.fleet.look_at_snapshots(changed_on)
        for deployment in (*claimed, *(mine if inherits else ())):
            core.inventory.touch(f"deployments/{deployment}")
