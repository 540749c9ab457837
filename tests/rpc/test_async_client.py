"""The asynchronous client against a fake controller: deployments, answers, instances, snapshots."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import pytest

import dumont
from dumont.controller.v1 import deployment_service_pb2 as deployments_pb2
from tests.rpc.fake_controller import FakeController, serving


@pytest.fixture
async def controller() -> FakeController:
    return FakeController()


@pytest.fixture
async def client(controller: FakeController) -> AsyncIterator[dumont.AsyncClient]:
    async with serving(controller) as address, dumont.AsyncClient(address) as client:
        yield client


async def test_deploying_a_new_model_creates_a_deployment(
    client: dumont.AsyncClient, controller: FakeController
) -> None:
    deployment = await client.deploy("org/Model-0.6B", idle_timeout=30, prewarm=True)
    assert deployment.name == "deployments/model-0-6b"
    assert deployment.info.state == "active"
    assert deployment.info.checkpoint == dumont.CheckpointSettings(False, None, "unspecified", "unspecified")
    assert deployment.info.idle_timeout == 30
    assert controller.requests[0].prewarm


async def test_deploying_the_same_again_changes_nothing(
    client: dumont.AsyncClient, controller: FakeController
) -> None:
    first = await client.deploy("org/model", checkpoint={"ttl": 60})
    second = await client.deploy("org/model", checkpoint={"ttl": 60})
    assert second.info == first.info
    assert [type(request).__name__ for request in controller.requests].count("UpdateDeploymentRequest") == 0


async def test_deploying_with_other_settings_updates_those(
    client: dumont.AsyncClient, controller: FakeController
) -> None:
    await client.deploy("org/model", idle_timeout=30)
    deployment = await client.deploy("org/model", checkpoint={"ttl": 60}, park_timeout=5)
    assert deployment.info.checkpoint.ttl == 60
    assert (deployment.info.idle_timeout, deployment.info.park_timeout) == (30, 5)
    assert list(controller.requests[-1].update_mask.paths) == ["checkpoint.ttl", "park_timeout"]


async def test_deploying_again_keeps_the_start_mode_and_whatever_else_is_left_out(
    client: dumont.AsyncClient, controller: FakeController
) -> None:
    await client.deploy("org/model", "cold", idle_timeout=30)
    again = await client.deploy("org/model", park_timeout=5)
    assert (again.info.start_mode, again.info.idle_timeout) == ("cold", 30)
    assert list(controller.requests[-1].update_mask.paths) == ["park_timeout"]
    changed = await client.deploy("org/model", "warm")
    assert (changed.info.start_mode, changed.info.idle_timeout) == ("warm", 30)


async def test_deploying_with_a_priority_and_replicas_sets_them(
    client: dumont.AsyncClient, controller: FakeController
) -> None:
    made = await client.deploy("org/model", priority=5, max_instances=3)
    assert (made.info.priority, made.info.min_instances, made.info.max_instances) == (5, 0, 3)
    changed = await client.deploy("org/model", priority=0, min_instances=1)
    assert (changed.info.priority, changed.info.min_instances, changed.info.max_instances) == (0, 1, 3)
    assert list(controller.requests[-1].update_mask.paths) == ["priority", "min_instances"]


async def test_a_name_taken_by_another_model_is_refused(client: dumont.AsyncClient) -> None:
    await client.deploy("org/model", name="qa")
    with pytest.raises(dumont.AlreadyExists, match="another name") as raised:
        await client.deploy("org/other", name="qa")
    assert (raised.value.reason, raised.value.field) == ("DEPLOYMENT_MODEL_DIFFERS", "model")
    assert (await client.deployments.get("qa")).info.model == "org/model"


async def test_a_list_runs_over_all_its_pages(client: dumont.AsyncClient) -> None:
    for name in ("a", "b", "c", "d", "e"):
        await client.deploy("org/model", name=name)
    listed = [deployment.name for deployment in await client.deployments.list()]
    assert listed == [f"deployments/{name}" for name in "abcde"]


async def test_a_deleted_deployment_is_not_found(client: dumont.AsyncClient) -> None:
    deployment = await client.deploy("org/model", name="qa")
    await deployment.delete()
    with pytest.raises(dumont.NotFound) as raised:
        await deployment.refresh()
    assert (raised.value.reason, raised.value.field) == ("DEPLOYMENT_NOT_FOUND", "name")


async def test_an_answer_says_where_it_came_from(
    client: dumont.AsyncClient, controller: FakeController
) -> None:
    deployment = await client.deploy("org/model")
    answer = await deployment.generate(
        messages=[{"role": "user", "content": "Count"}],
        max_new_tokens=3,
        temperature=0.5,
        seed=7,
        stop="four",
    )
    assert str(answer) == "one two three"
    assert answer.start == dumont.StartInfo(
        tier="local",
        reasons=("no instance", "snapshots/one is local"),
        phases=(dumont.Phase("restore", 0.2),),
        seconds=0.25,
        instance="instances/a",
        node="nodes/one",
    )
    assert answer.usage == dumont.Usage(prompt_tokens=4, output_tokens=3)
    assert answer.finish_reason == "end"
    assert answer.first_token_seconds > 0
    request = controller.requests[-1]
    assert (request.messages[0].content, request.max_new_tokens, request.seed) == ("Count", 3, 7)
    assert (request.temperature, request.HasField("top_p"), list(request.stop)) == (0.5, False, ["four"])


async def test_a_stream_gives_pieces_and_tells_its_start_first(client: dumont.AsyncClient) -> None:
    stream = (await client.deploy("org/model")).stream("Count")
    assert stream.start is None
    assert (await stream.started()).tier == "local"
    assert stream.generation is None
    assert [piece async for piece in stream] == ["one", " two", " three"]
    assert stream.generation is not None
    assert stream.generation.text == "one two three"


async def test_several_answers_are_told_apart(client: dumont.AsyncClient) -> None:
    answer = await (await client.deploy("org/model")).generate("Count", n=2)

    assert [(one.text, one.finish_reason, one.token_ids) for one in answer.answers] == [
        ("a0b0", "length", (0, 0)),
        ("a1b1", "stop", (1, 1)),
    ]
    assert (str(answer), answer.finish_reason) == ("a0b0", "length")
    assert answer.usage == dumont.Usage(prompt_tokens=4, output_tokens=4, cached_prompt_tokens=1)


async def test_pieces_of_several_answers_say_whose_they_are(client: dumont.AsyncClient) -> None:
    deployment = await client.deploy("org/model")
    pieces = [(piece.index, piece.text) async for piece in deployment.stream("Count", n=2).pieces()]
    assert pieces == [(0, "a0"), (1, "a1"), (0, "b0"), (1, "b1")]

    with pytest.raises(dumont.InvalidArgument) as refused:
        [text async for text in deployment.stream("Count", n=2)]
    assert (refused.value.reason, refused.value.field) == ("SEVERAL_ANSWERS", "n")


async def test_tokens_come_with_how_likely_they_were(client: dumont.AsyncClient) -> None:
    (answer,) = (await (await client.deploy("org/model")).generate("Count", logprobs=1)).answers

    assert [token.text for token in answer.logprobs] == ["one", " two", " three"]
    assert answer.logprobs[0] == dumont.TokenLogprob(1, "one", -0.5, (dumont.TopLogprob(2, "other", -0.25),))


async def test_leaving_a_stream_early_cancels_the_call(
    client: dumont.AsyncClient, controller: FakeController
) -> None:
    deployment = await client.deploy("org/model")
    async for piece in deployment.stream("endless"):
        assert piece == "one"
        break
    assert await asyncio.to_thread(controller.cancelled.wait, 10)


async def test_a_timeout_ends_the_answer_on_both_sides(
    client: dumont.AsyncClient, controller: FakeController
) -> None:
    deployment = await client.deploy("org/model")
    with pytest.raises(dumont.DeadlineExceeded):
        await deployment.generate("endless", timeout=0.2)
    assert await asyncio.to_thread(controller.cancelled.wait, 10)


@pytest.mark.parametrize("prompt", ["no start", "cut"])
async def test_an_answer_without_start_or_finish_is_an_error(client: dumont.AsyncClient, prompt: str) -> None:
    deployment = await client.deploy("org/model")
    with pytest.raises(dumont.Internal) as raised:
        await deployment.generate(prompt)
    assert raised.value.reason == "ANSWER_INCOMPLETE"


async def test_a_refused_answer_says_when_to_come_back(client: dumont.AsyncClient) -> None:
    deployment = await client.deploy("org/model")
    with pytest.raises(dumont.ResourceExhausted) as raised:
        await deployment.generate("full")
    assert (raised.value.reason, raised.value.retry_after) == ("QUEUE_FULL", 1)


async def test_one_text_gives_a_list_of_one_vector(client: dumont.AsyncClient) -> None:
    deployment = await client.deploy("org/model")
    assert await deployment.embed("four") == [[4, 0.5]]
    assert await deployment.embed(["a", "bb"]) == [[1, 0.5], [2, 0.5]]


async def test_an_instance_parks_and_resumes_and_stops(client: dumont.AsyncClient) -> None:
    assert (await client.instances.park("a")).state == "parked"
    assert (await client.instances.get("instances/a")).state == "parked"
    assert (await client.instances.resume("a")).state == "serving"
    await client.instances.stop("a")
    assert [instance.name for instance in await client.instances.list()] == ["instances/b", "instances/c"]


async def test_an_instance_migrates_to_a_node_or_a_gpu(client: dumont.AsyncClient) -> None:
    stages: list[str] = []
    moved = await client.instances.migrate("a", gpu="1", progress=stages.append)
    assert (moved.name, moved.gpu) == ("instances/a", "1")
    moved = await client.instances.migrate("a", node="two", cold=True)
    assert (moved.name, moved.node) == ("instances/successor", "nodes/two")
    assert stages[-1] == "moving"
    with pytest.raises(dumont.NotFound):
        await client.instances.migrate("a")
    assert (await client.instances.migrate("b", wait=False)).name == "instances/b"


async def test_instances_are_found_by_their_own_or_their_deployments_name(client: dumont.AsyncClient) -> None:
    async def found(target: str) -> list[str]:
        return [instance.name for instance in await client.instances.find(target)]

    assert await found("a") == await found("instances/a") == ["instances/a"]
    assert await found("qa") == await found("deployments/qa") == ["instances/a", "instances/b", "instances/c"]
    for missing in ("none", "instances/none", "deployments/none"):
        with pytest.raises(dumont.NotFound):
            await client.instances.find(missing)


async def test_a_watch_shows_everything_after_each_change(
    client: dumont.AsyncClient, controller: FakeController
) -> None:
    watch: Any = client.instances.watch()
    assert [instance.name for instance in await anext(watch)] == ["instances/a", "instances/b", "instances/c"]
    controller.changed.set()
    assert [instance.name for instance in await anext(watch)] == ["instances/b", "instances/c"]
    await watch.aclose()


async def test_logs_are_whole_characters(client: dumont.AsyncClient) -> None:
    assert [text async for text in client.instances.logs("a")] == ["loaded ", "€\n", "ready\n"]


async def test_a_snapshot_reports_its_steps(client: dumont.AsyncClient, controller: FakeController) -> None:
    steps: list[str] = []

    def progress(step: dumont.SnapshotProgress) -> None:
        steps.append(step.stage)
        controller.capture_may_end.set()

    snapshot = await client.snapshots.create("qa", progress=progress)
    assert snapshot.name == "snapshots/one"
    assert snapshot.state == "active"
    assert steps[0] == "start"


async def test_a_failed_snapshot_raises_its_error(
    client: dumont.AsyncClient, controller: FakeController
) -> None:
    controller.capture_may_end.set()
    with pytest.raises(dumont.ResourceExhausted) as raised:
        await client.snapshots.create("qa", snapshot_id="refused")
    assert (raised.value.reason, raised.value.metadata) == ("DISK_FULL", {"free": "0"})


async def test_giving_up_on_a_snapshot_cancels_it(
    client: dumont.AsyncClient, controller: FakeController
) -> None:
    reported = asyncio.Event()
    creating = asyncio.create_task(client.snapshots.create("qa", progress=lambda _: reported.set()))
    await reported.wait()
    creating.cancel()
    with pytest.raises(asyncio.CancelledError):
        await creating
    assert await asyncio.to_thread(controller.cancelled.wait, 10)


async def test_a_node_is_drained_and_undrained(client: dumont.AsyncClient) -> None:
    seen: list[tuple[int, int]] = []
    assert await client.nodes.drain("one", progress=lambda *left: seen.append(left)) == ()
    assert seen[-1] == (1, 3)
    assert [node.draining for node in await client.nodes.list()] == [True]
    (left,) = await client.nodes.drain("nodes/one", timeout=1)
    assert (left.instance, left.reason) == ("instances/a", "INSTANCE_BUSY")
    assert await client.nodes.drain("one", wait=False) == ()
    assert not (await client.nodes.undrain("one")).draining


async def test_nodes_are_listed(client: dumont.AsyncClient) -> None:
    assert [(node.name, node.state) for node in await client.nodes.list()] == [("nodes/one", "ready")]


async def test_a_get_is_repeated_while_the_controller_is_unavailable(
    client: dumont.AsyncClient, controller: FakeController
) -> None:
    await client.deploy("org/model", name="qa")
    controller.unavailable = 2
    assert (await client.deployments.get("qa")).name == "deployments/qa"
    assert [type(request).__name__ for request in controller.requests].count("GetDeploymentRequest") == 3


async def test_an_endpoint_nobody_answers_at_is_named_with_the_remedy() -> None:
    async with dumont.AsyncClient("unix:/nonexistent/controller.sock") as client:
        with pytest.raises(dumont.Unavailable, match="dumont up") as raised:
            await client.deploy("org/model")
    assert raised.value.reason == "ENDPOINT_UNREACHABLE"
    assert raised.value.metadata["endpoint"] == "unix:/nonexistent/controller.sock"


async def test_a_start_is_told_step_by_step(client: dumont.AsyncClient, controller: FakeController) -> None:
    deployment = await client.deploy("org/model")
    told: list[dumont.StartProgress] = []
    answer = await deployment.generate("slow", progress=told.append)
    assert answer.text == "one two three"
    assert [step.stage for step in told] == ["waiting", "load", "capture"]
    assert (told[0].node, told[1].node, told[1].running) == ("", "nodes/one", True)
    assert await deployment.embed("one", progress=told.append)


async def test_deploying_may_wait_for_the_start(
    client: dumont.AsyncClient, controller: FakeController
) -> None:
    told: list[str] = []
    deployment = await client.deploy("org/model", wait=True, progress=lambda step: told.append(step.stage))
    assert told == ["waiting", "load", "capture"]
    assert deployment.info.state == "active"
    assert controller.requests[0].prewarm
    # also where the deployment exists
    await client.deploy("org/model", wait=True)
    (update,) = [r for r in controller.requests if type(r).__name__ == "UpdateDeploymentRequest"]
    assert (update.prewarm, list(update.update_mask.paths)) == (True, ["name"])


async def test_a_start_that_failed_fails_the_deploy_that_waited(
    client: dumont.AsyncClient, controller: FakeController
) -> None:
    controller.state_after_start = deployments_pb2.Deployment.STATE_DEGRADED
    with pytest.raises(dumont.FailedPrecondition) as raised:
        await client.deploy("org/model", wait=True)
    assert raised.value.reason == "START_FAILED"
