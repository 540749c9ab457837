"""A deployment of an engine that not every node has, and its options."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from google.protobuf.field_mask_pb2 import FieldMask

from controller.model import InstanceState, Report, Tier
from controller.service.deployments import DeploymentService
from dumont.controller.v1 import deployment_service_pb2 as pb
from dumont.errors import FailedPrecondition, InvalidArgument, Unavailable
from dumont.rpc.structs import from_struct, to_struct
from tests.unit.controller.controller_world import World

OPTIONS = {"max_model_len": 4096, "enforce_eager": True}


@pytest.fixture
def service(world: World) -> DeploymentService:
    return DeploymentService(world.controller.core, world.controller.starts)


async def create(service: DeploymentService, options: dict[str, Any], engine: str = "vllm") -> pb.Deployment:
    deployment = pb.Deployment(
        model="org/model",
        engine=engine,
        start_mode=pb.START_MODE_CHECKPOINT,
        engine_options=to_struct(options),
    )
    request = pb.CreateDeploymentRequest(deployment_id="qa", deployment=deployment)
    return await service.CreateDeployment(request, None)


async def test_it_starts_on_the_node_that_has_the_engine(world: World) -> None:
    await world.node("large", memory=1 << 40)
    await world.node("small", engines={"vllm": "0.32.0"})
    await world.deploy(engine="vllm")

    info, _ = await world.ask()

    assert (info.tier, info.node) == (Tier.COLD, "small")


async def test_without_a_node_that_has_the_engine_it_is_refused(world: World) -> None:
    await world.node()
    with pytest.raises(FailedPrecondition, match="dumont engine install vllm") as refusal:
        await world.deploy(engine="vllm")
    assert refusal.value.reason == "ENGINE_NOT_INSTALLED"
    assert (await world.registry.load()).deployments == ()


async def test_while_the_node_that_has_the_engine_is_away_it_is_worth_another_try(world: World) -> None:
    await world.node("other")
    await world.node("its", engines={"vllm": "0.32.0"})
    await world.deploy(engine="vllm")
    world.nodes.cut("its")
    await world.controller.core.fleet.give_up("its")

    with pytest.raises(Unavailable) as refusal:
        await world.ask()

    assert refusal.value.reason == "NO_NODE"
    assert refusal.value.retry_after


async def test_its_options_are_stored_shown_and_sent_to_the_node(
    world: World, service: DeploymentService
) -> None:
    await world.node(engines={"vllm": "0.32.0"})

    made = await create(service, OPTIONS)
    await world.ask()

    assert from_struct(made.engine_options) == OPTIONS
    assert (await world.registry.load()).deployments[0].engine_options == OPTIONS
    (instance,) = world.inventory.instances_of("qa")
    assert instance.report.engine_options == OPTIONS


@pytest.mark.parametrize(
    ("engine", "options", "reason", "field"),
    [
        ("vllm", {"max_model_length": 1}, "UNKNOWN_OPTION", ".max_model_length"),
        ("vllm", {"tensor_parallel_size": 2}, "OPTION_REFUSED", ".tensor_parallel_size"),
        ("vllm", {"max_model_len": -1}, "INVALID_OPTION", ".max_model_len"),
        ("causal_lm", {"max_model_len": 64}, "UNKNOWN_OPTION", ".max_model_len"),
        ("embedding", {"max_model_len": 64}, "ENGINE_WITHOUT_OPTIONS", ""),
    ],
)
async def test_a_wrong_option_is_refused_before_anything_is_stored(
    world: World, service: DeploymentService, engine: str, options: dict[str, Any], reason: str, field: str
) -> None:
    await world.node(engines={"vllm": "0.32.0"})
    with pytest.raises(InvalidArgument) as refusal:
        await create(service, options, engine)
    assert (refusal.value.reason, refusal.value.field) == (reason, f"deployment.engine_options{field}")
    assert (await world.registry.load()).deployments == ()


async def test_its_options_cannot_be_changed_any_more_than_its_model(
    world: World, service: DeploymentService
) -> None:
    await world.node(engines={"vllm": "0.32.0"})
    made = await create(service, OPTIONS)

    same = pb.UpdateDeploymentRequest(deployment=made, update_mask=FieldMask(paths=["*"]))
    assert from_struct((await service.UpdateDeployment(same, None)).engine_options) == OPTIONS
    made.engine_options.update({"max_model_len": 8192})
    other = pb.UpdateDeploymentRequest(deployment=made, update_mask=FieldMask(paths=["engine_options"]))
    with pytest.raises(InvalidArgument) as refusal:
        await service.UpdateDeployment(other, None)
    assert (refusal.value.reason, refusal.value.field) == ("IMMUTABLE_FIELD", "deployment.engine_options")


async def test_a_snapshot_with_other_options_is_not_restored(world: World) -> None:
    await world.node(engines={"vllm": "0.32.0"})
    deployment = await world.deploy(engine="vllm", engine_options=OPTIONS)
    await world.ask()
    (captured,) = world.nodes.world["n1"].snapshots.values()
    (instance,) = world.inventory.instances_of("qa")
    await world.controller.core.deployments.begin_delete("qa")
    world.nodes.lose("n1", instance.id)
    await world.controller.core.deployments.forget("qa")
    # A deployment of the same name, to which the snapshot is given.
    other = await world.deploy(engine="vllm", engine_options={"max_model_len": 64})
    world.inventory.put_captured(replace(world.inventory.captured[captured.id], deployment_uid=other.uid))

    info, _ = await world.ask()

    assert deployment.engine_options != other.engine_options
    assert info.tier is Tier.COLD
    assert f"snapshots/{captured.id} was captured with other engine options" in "; ".join(info.reasons)


async def test_an_instance_with_other_options_is_not_this_deployments(world: World) -> None:
    await world.node(engines={"vllm": "0.32.0"})
    deployment = await world.deploy(engine="vllm", engine_options=OPTIONS)
    report = Report("qa-1", "qa", InstanceState.SERVING, model="org/model", engine="vllm")

    assert deployment.runs(replace(report, engine_options=OPTIONS))
    assert not deployment.runs(report)
    assert not deployment.runs(replace(report, engine="causal_lm"))
    # While it is being started, only its deployment is known.
    assert deployment.runs(Report("qa-1", "qa", InstanceState.STARTING))


async def test_both_calls_are_passed_to_an_engine_that_may_answer_either(world: World) -> None:
    await world.node(engines={"vllm": "0.32.0"})
    await world.deploy(engine="vllm")
    assert (await world.ask())[0].tier is Tier.COLD
