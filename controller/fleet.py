"""The nodes. Each is followed: connect to it, list what it holds, watch what changes."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable
from contextlib import aclosing
from dataclasses import replace
from typing import Any

import structlog

from controller.inventory import Inventory
from controller.model import InstanceState, Node, NodeState, Report
from controller.ports import NODE_UNAVAILABLE, Clock, Nodes, Registry, Removed, Synchronized
from controller.tasks import Tasks
from dumont.errors import DumontError, FailedPrecondition, NotFound, Unavailable

log = structlog.get_logger()

RETRY_FIRST = 0.2
RETRY_LIMIT = 5.0
# Seconds until a node whose object store is silent is asked again.
LIST_AGAIN_FIRST = 2.0
LIST_AGAIN_LIMIT = 60.0
# Facts that are not worth a write to the database when only they have changed.
VOLATILE = ("state", "since", "heartbeat_at", "heartbeat_time", "memory_available_bytes", "gpus")


class Fleet:
    """Keeps the inventory in step with the nodes; a task of its own follows each node that may be alive."""

    def __init__(
        self,
        nodes: Nodes,
        registry: Registry,
        inventory: Inventory,
        clock: Clock,
        tasks: Tasks,
        controller: str,
    ) -> None:
        self.controller = controller
        self._nodes = nodes
        self._registry = registry
        self._inventory = inventory
        self._clock = clock
        self._tasks = tasks
        self._followers: dict[str, asyncio.Task[None]] = {}
        self._listing: dict[str, asyncio.Task[None]] = {}

    def load(self, nodes: Iterable[Node]) -> None:
        """At start-up: take in the nodes that the registry holds, and begin to follow them."""
        for node in nodes:
            now = self._clock.moment().monotonic
            self._inventory.put_node(replace(node, state=NodeState.CONNECTING, since=now, heartbeat_at=now))
            self._follow(node.id)

    def take_in(self, nodes: Iterable[Node]) -> None:
        """Take in what other controllers have stored of nodes: new ones, and whether they are drained."""
        for node in nodes:
            known = self._inventory.nodes.get(node.id)
            if known is None:
                self.load([node])
            elif known.draining is not node.draining:
                self._inventory.put_node(replace(known, draining=node.draining))

    async def register(self, node: Node, owner: str = "") -> Node:
        """Register a snapshotd that has started or was not known: store it, and list what it holds.

        Args:
            node: what it reports of itself.
            owner: the id of the controller that it belongs to; empty: none.

        Raises:
            FailedPrecondition: WRONG_CONTROLLER, the node belongs to another controller.
        """
        if owner and owner != self.controller:
            log.warning("node_refused", node=node.id, controller=owner)
            raise FailedPrecondition(
                "WRONG_CONTROLLER",
                f"nodes/{node.id} belongs to controller {owner}, and this is {self.controller}; check where "
                "the node registers, restart its snapshotd with --accept-controller or, if this controller "
                f"replaces a lost one, start it on an empty state directory with --controller-id {owner}",
                metadata={"node": f"nodes/{node.id}", "controller": self.controller, "owner": owner},
            )
        now = self._clock.moment()
        known = self._inventory.nodes.get(node.id)
        node = replace(
            node,
            state=NodeState.CONNECTING,
            draining=known is not None and known.draining,
            heartbeat_time=now.wall,
            heartbeat_at=now.monotonic,
            since=now.monotonic,
        )
        if not _same(self._inventory.nodes.get(node.id), node):
            await self._registry.save_node(node)
        self._inventory.put_node(node)
        self._follow(node.id)
        log.info("node_registered", node=node.id, endpoint=node.endpoint)
        return self._inventory.node(node.id)

    def heartbeat(self, identifier: str, memory_available_bytes: int, **facts: Any) -> None:
        """Note that a node is alive.

        Args:
            identifier: the node's id.
            memory_available_bytes: as it is now; 0: as it was.
            facts: other fields of the node that have changed.

        Raises:
            NotFound: NODE_UNKNOWN, the node has to register again.
        """
        known = self._inventory.nodes.get(identifier)
        if known is None:
            raise NotFound(
                "NODE_UNKNOWN",
                f"nodes/{identifier} is not registered with this controller; register it again",
                metadata={"node": f"nodes/{identifier}"},
            )
        now = self._clock.moment()
        memory = memory_available_bytes or known.memory_available_bytes
        self._inventory.put_node(
            replace(
                known,
                heartbeat_time=now.wall,
                heartbeat_at=now.monotonic,
                memory_available_bytes=memory,
                **facts,
            )
        )
        # It stays unreachable until it has listed what it holds, so that no request waits for it.
        if known.state is NodeState.UNREACHABLE and identifier not in self._followers:
            self._follow(identifier)

    async def set_draining(self, identifier: str, draining: bool) -> Node:
        """Let nothing more be started on a node, or let starts be made there again; stored at once.

        Raises:
            NotFound: the controller knows no such node.
        """
        await self._registry.save_node(replace(self._inventory.node(identifier), draining=draining))
        node = replace(self._inventory.node(identifier), draining=draining)
        self._inventory.put_node(node)
        log.info("node_draining" if draining else "node_undrained", node=identifier)
        return node

    def check_reachable(self, identifier: str) -> None:
        """Raise unless commands can be sent to a node.

        Raises:
            NotFound: the controller knows no such node.
            Unavailable: NODE_UNAVAILABLE.
        """
        state = self._inventory.node(identifier).state
        if state is not NodeState.READY:
            raise Unavailable(
                NODE_UNAVAILABLE,
                f"nodes/{identifier} is {state.name.lower()}; try again later",
                metadata={"node": f"nodes/{identifier}"},
                retry_after=1.0,
            )

    def recheck(self, identifier: str) -> None:
        """A call to a node got no answer: list again what it holds before anything else is sent."""
        if self._inventory.nodes[identifier].state is NodeState.READY:
            self._inventory.set_node_state(identifier, NodeState.CONNECTING)
            self._follow(identifier)

    def ask_again(self, identifier: str) -> None:
        """List once more what a node holds, as after another controller has acted on it."""
        if self._inventory.nodes[identifier].state is not NodeState.UNREACHABLE:
            self._inventory.set_node_state(identifier, NodeState.CONNECTING)
            self._follow(identifier)

    def look_at_snapshots(self, identifiers: Iterable[str]) -> None:
        """List the snapshots of these nodes again, in the background, as far as they answer."""
        for node in identifiers:
            if node in self._inventory.nodes and self._inventory.nodes[node].state is NodeState.READY:
                self._tasks.spawn(self.refresh_snapshots(node), f"list snapshots of {node}")

    async def give_up(self, identifier: str) -> None:
        """Send nothing more to a silent node until its next heartbeat."""
        self._inventory.set_node_state(identifier, NodeState.UNREACHABLE)
        if (follower := self._followers.pop(identifier, None)) is not None:
            follower.cancel()
        await self._nodes.disconnect(identifier)
        log.warning("node_unreachable", node=identifier)

    async def refresh_snapshots(self, identifier: str) -> None:
        """List again which snapshots a node holds, for instance after one was quarantined."""
        listed = await self._nodes.list_snapshots(identifier)
        self._inventory.learn_snapshots(identifier, listed)
        if listed.store_silence:
            self._ask_again(identifier, listed.store_silence)

    def _ask_again(self, identifier: str, silence: str) -> None:
        """The node could not list its object store: until it can, those known as published stay so."""
        log.warning("object_store_silent", node=identifier, why=silence)
        if identifier not in self._listing:
            self._listing[identifier] = self._tasks.spawn(
                self._list_again(identifier), f"list snapshots of {identifier} again"
            )

    async def _list_again(self, identifier: str) -> None:
        delay = LIST_AGAIN_FIRST
        try:
            while True:
                await self._clock.sleep(delay)
                delay = min(LIST_AGAIN_LIMIT, delay * 2)
                if self._inventory.nodes[identifier].state is not NodeState.READY:
                    # It is asked when it is ready again.
                    return
                listed = await self._nodes.list_snapshots(identifier)
                self._inventory.learn_snapshots(identifier, listed)
                if not listed.store_silence:
                    return
        finally:
            del self._listing[identifier]

    def _follow(self, identifier: str) -> None:
        if (follower := self._followers.pop(identifier, None)) is not None:
            follower.cancel()
        self._followers[identifier] = self._tasks.spawn(
            self._keep_following(identifier), f"follow {identifier}"
        )

    async def _keep_following(self, identifier: str) -> None:
        delay = RETRY_FIRST
        while True:
            try:
                await self._synchronize(identifier)
            except DumontError as error:
                log.info("node_watch_ended", node=identifier, reason=error.reason, error=error.message)
            except Exception:
                log.exception("node_watch_failed", node=identifier)
            state = self._inventory.nodes[identifier].state
            if state is NodeState.UNREACHABLE:
                # The next heartbeat tries again.
                if self._followers.get(identifier) is asyncio.current_task():
                    del self._followers[identifier]
                return
            if state is NodeState.READY:
                self._inventory.set_node_state(identifier, NodeState.CONNECTING)
                delay = RETRY_FIRST
            await self._clock.sleep(delay)
            delay = min(RETRY_LIMIT, delay * 2)

    async def _synchronize(self, identifier: str) -> None:
        await self._nodes.connect(identifier, self._inventory.nodes[identifier].endpoint)
        reports: list[Report] = []
        synchronized = False
        async with aclosing(self._nodes.watch(identifier)) as changes:
            async for change in changes:
                if isinstance(change, Synchronized):
                    listed = await self._nodes.list_snapshots(identifier)
                    self._inventory.learn(identifier, reports, listed)
                    if listed.store_silence:
                        self._ask_again(identifier, listed.store_silence)
                    synchronized = True
                    log.info("node_ready", node=identifier, instances=len(reports))
                    if orphans := sum(copy.orphan for copy in self._inventory.held_on(identifier)):
                        remedy = "see dumont snapshot ls --orphans; adopt or delete them"
                        log.warning("orphans_kept", node=identifier, snapshots=orphans, remedy=remedy)
                elif isinstance(change, Removed):
                    self._inventory.removed(change.instance)
                elif synchronized:
                    captured = self._ends_an_unknown_capture(change)
                    self._inventory.report(identifier, change)
                    if captured:
                        await self.refresh_snapshots(identifier)
                else:
                    reports.append(change)

    def _ends_an_unknown_capture(self, report: Report) -> bool:
        """Whether a capture ends that nobody here waits for, such as one that outlived its controller."""
        known = self._inventory.instances.get(report.id)
        return (
            known is not None
            and not known.busy
            and known.state is InstanceState.CAPTURING
            and report.state is not InstanceState.CAPTURING
        )


def _same(known: Node | None, node: Node) -> bool:
    """Whether two reports of a node differ only in what changes all the time."""
    if known is None:
        return False
    return node == replace(
        known,
        **{name: getattr(node, name) for name in VOLATILE},
    )
