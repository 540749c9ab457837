"""Many callers of one model at once: each is answered as if alone, whatever becomes of the process."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path

import grpc
import pytest
import pytest_asyncio

from snapshotd.model import Snapshot, State
from tests.node.crowd import MARKER, all_at_once, ask, check_same, requests
from tests.node.markers import readable
from tests.node.node_under_test import NodeUnderTest, refused

pytestmark = [pytest.mark.node, pytest.mark.asyncio(loop_scope="module")]


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def node(
    criu: Path, small_model: Path, tmp_path_factory: pytest.TempPathFactory
) -> AsyncIterator[NodeUnderTest]:
    under_test = NodeUnderTest(tmp_path_factory.mktemp("node"), small_model)
    yield under_test
    await under_test.close()


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def snapshot(node: NodeUnderTest) -> Snapshot:
    """A snapshot of an instance that is gone."""
    await node.start("source")
    captured = await node.instances.capture("source", "first")
    await node.instances.stop("source")
    return captured


async def test_many_at_once_are_answered_as_each_alone_through_every_sleep(
    node: NodeUnderTest, snapshot: Snapshot
) -> None:
    # given what each is answered alone
    await node.restore("busy", snapshot)
    asked = requests()
    alone = [await ask(node, "busy", logprobs=20, **fields) for fields in asked]
    assert all(answer.status is None for answer in alone)
    assert max(len(fields["prompt"]) for fields in asked) > 3000

    # when all ask at once and the instance is parked and resumed in the middle of it, three times
    for _ in range(3):
        busy = asyncio.ensure_future(all_at_once(node, "busy", asked))
        await asyncio.sleep(0.3)
        await node.instances.park("busy")
        await node.instances.resume("busy")
        assert node.instances.get("busy").state is State.SERVING
        check_same(alone, await busy)

    # and when another that has served nobody is captured meanwhile, and comes back beside it
    await node.restore("pristine", snapshot)
    busy = asyncio.ensure_future(all_at_once(node, "busy", asked))
    captured = await node.instances.capture("pristine", "in-the-middle")
    check_same(alone, await busy)
    await node.instances.stop("pristine")
    await node.restore("twin", captured)
    both = await asyncio.gather(all_at_once(node, "busy", asked), all_at_once(node, "twin", asked))
    for answers in both:
        check_same(alone, answers)

    # then whoever has served is captured by nobody, and nothing of a prompt is in any snapshot
    assert (await refused(node.instances.capture("busy", "secret"))).reason == "INSTANCE_SERVED"
    assert not readable(node.state_dir / "snapshots", MARKER.encode())
    await node.stop_all()


async def test_requests_that_fail_end_alone(node: NodeUnderTest, snapshot: Snapshot) -> None:
    await node.restore("among-failures", snapshot)
    asked = requests(count=12, longest=200)
    alone = [await ask(node, "among-failures", logprobs=20, **fields) for fields in asked]

    good = asyncio.gather(*(ask(node, "among-failures", **fields) for fields in asked))
    bad = await asyncio.gather(
        ask(node, "among-failures", prompt="y" * 5000),
        ask(node, "among-failures", prompt="y" * 3_000_000),
        ask(node, "among-failures", prompt="y", stop_token_ids=[10**6]),
        ask(node, "among-failures", prompt="y", max_new_tokens=4000, timeout=0.05),
        ask(node, "among-failures", prompt=""),
    )

    assert [answer.status for answer in bad] == [
        grpc.StatusCode.INVALID_ARGUMENT,
        grpc.StatusCode.INVALID_ARGUMENT,
        grpc.StatusCode.INVALID_ARGUMENT,
        grpc.StatusCode.DEADLINE_EXCEEDED,
        grpc.StatusCode.INVALID_ARGUMENT,
    ]
    check_same(alone, await good)
    await node.stop_all()
