"""Any order of publishing, deleting, collecting, dying half-way and time, by two nodes of one store.

After every step what is listed can be read whole; and once everybody is done, the grace over and the
garbage collected, exactly what the listed snapshots name is left.
"""

from __future__ import annotations

import asyncio
import tempfile
from collections.abc import Coroutine
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from dumont.errors import AlreadyExists, DumontError, NotFound
from snapshotd.failpoints import Failpoints
from snapshotd.store.layout import chunk_key, manifest_key
from snapshotd.store.model import GcPlan
from tests.unit.snapshotd.store.world import GRACE, MemoryObjects, a_node, a_signer, an_image, noise

T = TypeVar("T")

IDS = st.sampled_from(["s1", "s2", "s3"])
NODES = st.integers(0, 1)
BLOCKS = st.lists(st.integers(0, 4), min_size=1, max_size=3)
POINTS = [
    "upload.chunk", "upload.chunk.after", "upload.manifest", "upload.manifest.after",
    "delete.tombstone", "delete.manifest", "delete.manifest.after",
    "gc.chunk", "gc.chunk.after", "gc.tombstone", "gc.tombstone.after",
]  # fmt: skip


class StoreMachine(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self.loop = asyncio.new_event_loop()
        self.objects = MemoryObjects()
        self.failpoints = Failpoints()
        signers = [a_signer(), a_signer()]
        self.nodes = [
            a_node(self.objects, signer, trusts=tuple(signers), grace=GRACE, workers=2) for signer in signers
        ]
        for node in self.nodes:
            node._failpoints = self.failpoints
        self.plans: list[GcPlan] = []
        self.folder = tempfile.TemporaryDirectory()
        self.images = 0

    def teardown(self) -> None:
        self.die_never()
        self.objects.clock.advance(2 * GRACE)
        self.run(self.collect(0))
        # The second sees what the first one's tombstones still held.
        self.objects.clock.advance(2 * GRACE)
        self.run(self.collect(1))
        listed = self.run(self.nodes[0].list())
        needed = {manifest_key(found.manifest.id) for found in listed}
        needed |= {chunk_key(chunk) for found in listed for chunk in found.chunks()}
        assert self.objects.keys() == needed
        for node in self.nodes:
            node.close()
        self.folder.cleanup()
        self.loop.close()

    def run(self, work: Coroutine[Any, Any, T]) -> T:
        return self.loop.run_until_complete(work)

    def attempt(self, work: Coroutine[Any, Any, object]) -> None:
        """Run; a refusal and a death at a failpoint are both ordinary."""
        try:
            self.run(work)
        except (AlreadyExists, NotFound):
            pass
        except DumontError as error:
            assert error.reason == "FAILPOINT"  # noqa: PT017

    async def collect(self, node: int) -> None:
        await self.nodes[node].execute_gc(await self.nodes[node].plan_gc())

    @rule(node=NODES, snapshot=IDS, blocks=BLOCKS)
    def publish(self, node: int, snapshot: str, blocks: list[int]) -> None:
        self.images += 1
        folder = Path(self.folder.name, str(self.images))
        manifest = an_image(
            folder, snapshot, {f"f-{place}.img": noise(500, block) for place, block in enumerate(blocks)}
        )
        self.attempt(self.nodes[node].publish(manifest, folder))

    @rule(node=NODES, snapshot=IDS)
    def delete(self, node: int, snapshot: str) -> None:
        self.attempt(self.nodes[node].delete(snapshot))

    @rule(node=NODES)
    def plan(self, node: int) -> None:
        self.plans.append(self.run(self.nodes[node].plan_gc()))

    @rule(node=NODES)
    def execute(self, node: int) -> None:
        if self.plans:
            self.attempt(self.nodes[node].execute_gc(self.plans.pop(0)))

    @rule(node=NODES, snapshot=IDS, blocks=BLOCKS, other=NODES)
    def publish_while_another_collects(self, node: int, snapshot: str, blocks: list[int], other: int) -> None:
        async def both() -> None:
            folder = Path(self.folder.name, str(self.images))
            manifest = an_image(
                folder, snapshot, {f"f-{place}.img": noise(500, block) for place, block in enumerate(blocks)}
            )
            await asyncio.gather(
                self.nodes[node].publish(manifest, folder), self.collect(other), return_exceptions=True
            )

        self.images += 1
        self.run(both())

    @rule(hours=st.integers(1, 6))
    def time_passes(self, hours: int) -> None:
        self.objects.clock.advance(timedelta(hours=hours))

    @rule(point=st.sampled_from(POINTS))
    def die_at(self, point: str) -> None:
        self.failpoints.actions = {point: "error"}

    @rule()
    def die_never(self) -> None:
        self.failpoints.actions = {}

    @invariant()
    def every_listed_snapshot_is_whole(self) -> None:
        for found in self.run(self.nodes[0].list()):
            self.run(self.nodes[0].verify(found))


StoreMachine.TestCase.settings = settings(
    max_examples=30,
    stateful_step_count=25,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow],
)
TestStore = StoreMachine.TestCase
