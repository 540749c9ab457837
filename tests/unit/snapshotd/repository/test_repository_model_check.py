"""Any order of publishing, deleting, collecting, dying half-way and time, by two nodes of one store.

After every step what is listed can be read whole; and once everybody is done, the grace over and the
garbage collected, exactly what the listed snapshots name is left.
"""

from __future__ import annotations

import asyncio
import random
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
from snapshotd.repository.chunking import SMALL
from snapshotd.repository.model import PrunePlan
from snapshotd.repository.object_keys import chunk_key, manifest_key
from tests.unit.snapshotd.repository.world import GRACE, MemoryObjects, a_node, a_signer, an_image, noise

T = TypeVar("T")

IDS = st.sampled_from(["s1", "s2", "s3"])
NODES = st.integers(0, 1)
BLOCKS = st.lists(st.integers(0, 4), min_size=1, max_size=3)
POINTS = [
    "upload.chunk", "upload.chunk.after", "upload.manifest", "upload.manifest.after",
    "delete.tombstone", "delete.manifest", "delete.manifest.after",
    "prune.chunk", "prune.chunk.after", "prune.tombstone", "prune.tombstone.after",
]  # fmt: skip


class DieOnce(Failpoints):
    """Dies at the named point once, as a process does; the next one lives."""

    def hit(self, name: str) -> None:
        try:
            super().hit(name)
        except DumontError:
            self.actions.clear()
            raise


class SlowObjects(MemoryObjects):
    """Between any two requests others may run, and time may pass."""

    def __init__(self) -> None:
        super().__init__()
        self.random = random.Random(0)
        self.haste = 1.0

    async def _called(self, method: str, key: str) -> None:
        await super()._called(method, key)
        for _ in range(self.random.choice((0, 0, 1, 3, 9))):
            await asyncio.sleep(0)
        if self.random.random() > self.haste:
            # An upload of some requests stays within half the grace, or it looks again.
            self.clock.advance(timedelta(minutes=20))


class StoreMachine(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self.loop = asyncio.new_event_loop()
        self.objects = SlowObjects()
        self.failpoints = DieOnce()
        signers = [a_signer(), a_signer()]
        self.nodes = [
            a_node(self.objects, signer, trusts=tuple(signers), workers=2, failpoints=self.failpoints)
            for signer in signers
        ]
        self.plans: list[PrunePlan] = []
        self.folder = tempfile.TemporaryDirectory()
        self.images = 0

    def teardown(self) -> None:
        self.failpoints.actions.clear()
        for node in (0, 1):
            # The second time what the first one's tombstones still held is garbage too.
            self.objects.clock.advance(2 * GRACE)
            self.run(self.collect(node))
        listed = self.run(self.nodes[0].list())
        needed = {manifest_key(found.manifest.id) for found in listed}
        needed |= {chunk_key(chunk) for found in listed for chunk in found.chunks()}
        assert self.objects.keys() == needed
        for opened in self.nodes:
            opened.close()
        self.folder.cleanup()
        self.loop.close()

    def run(self, work: Coroutine[Any, Any, T]) -> T:
        return self.loop.run_until_complete(work)

    async def attempt(self, work: Coroutine[Any, Any, object]) -> None:
        """Do it; a refusal and a death at a failpoint are both ordinary."""
        try:
            await work
        except (AlreadyExists, NotFound):
            pass
        except DumontError as error:
            if error.reason != "FAILPOINT":
                raise

    async def collect(self, node: int) -> None:
        await self.nodes[node].prune(await self.nodes[node].plan_prune())

    async def publish(self, node: int, snapshot: str, blocks: list[int]) -> None:
        self.images += 1
        folder = Path(self.folder.name, str(self.images))
        content = {f"f-{place}.img": noise(SMALL, block) for place, block in enumerate(blocks)}
        await self.attempt(self.nodes[node].publish(an_image(folder, snapshot, content), folder))

    async def delete(self, node: int, snapshot: str) -> None:
        await self.attempt(self.nodes[node].delete(snapshot))

    @rule(node=NODES, snapshot=IDS, blocks=BLOCKS)
    def one_publishes(self, node: int, snapshot: str, blocks: list[int]) -> None:
        self.run(self.publish(node, snapshot, blocks))

    @rule(node=NODES, snapshot=IDS)
    def one_deletes(self, node: int, snapshot: str) -> None:
        self.run(self.delete(node, snapshot))

    @rule(node=NODES)
    def one_plans(self, node: int) -> None:
        self.plans.append(self.run(self.nodes[node].plan_prune()))

    @rule(node=NODES)
    def one_executes_an_old_plan(self, node: int) -> None:
        if self.plans:
            self.run(self.attempt(self.nodes[node].prune(self.plans.pop(0))))

    @rule(
        publisher=NODES, snapshot=IDS, blocks=BLOCKS, deleted=IDS, collector=NODES, seed=st.integers(0, 9999)
    )
    def all_at_once(
        self, publisher: int, snapshot: str, blocks: list[int], deleted: str, collector: int, seed: int
    ) -> None:
        async def together() -> None:
            work = [
                self.publish(publisher, snapshot, blocks),
                self.attempt(self.collect(collector)),
                self.attempt(self.collect(1 - collector)),
            ]
            if deleted != snapshot:
                work.append(self.delete(1 - publisher, deleted))
            await asyncio.gather(*work)

        self.objects.random, self.objects.haste = random.Random(seed), 0.9
        try:
            self.run(together())
        finally:
            self.objects.haste = 1.0

    @rule(hours=st.integers(1, 6))
    def time_passes(self, hours: int) -> None:
        self.objects.clock.advance(timedelta(hours=hours))

    @rule(point=st.sampled_from(POINTS))
    def the_next_dies_at(self, point: str) -> None:
        self.failpoints.actions = {point: "error"}

    @invariant()
    def every_listed_snapshot_is_whole(self) -> None:
        for found in self.run(self.nodes[0].list()):
            self.run(self.nodes[0].verify(found))


StoreMachine.TestCase.settings = settings(
    max_examples=40,
    stateful_step_count=30,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow],
)
TestStore = StoreMachine.TestCase
