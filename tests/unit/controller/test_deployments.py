"""Deployments: checked first, stored second, known third. Bad input changes nothing."""

from __future__ import annotations

import uuid
from typing import Any

import pytest
from google.protobuf.duration_pb2 import Duration
from google.protobuf.field_mask_pb2 import FieldMask

from controller import convert
from controller.model import DeploymentState, StartMode
from controller.service.deployments import DeploymentService
from dumont.controller.v1 import deployment_service_pb2 as pb
from dumont.errors import (
    Aborted,
    AlreadyExists,
    DumontError,
    FailedPrecondition,
    InvalidArgument,
    NotFound,
    Unavailable,
)
from tests.unit.controller.controller_world import World

CHECKPOINT = pb.START_MODE_CHECKPOINT


@pytest.fixture
async def service(world: World) -> DeploymentService:
    await world.node()
    parts = world.controller
    return DeploymentService(parts.core, parts.starts)


def request(identifier: str = "qa", **fields: Any) -> pb.CreateDeploymentRequest:
    known: dict[str, Any] = {"model": "org/model", "start_mode": CHECKPOINT}
    deployment = pb.Deployment(**(known | fields))
    return pb.CreateDeploymentRequest(deployment_id=identifier, deployment=deployment)


async def create(service: DeploymentService, identifier: str = "qa", **fields: Any) -> pb.Deployment:
    return await service.CreateDeployment(request(identifier, **fields), None)


def checkpoint(**fields: Any) -> pb.CheckpointSettings:
    return pb.CheckpointSettings(**fields)


async def test_a_created_deployment_is_complete_and_stored(world: World, service: DeploymentService) -> None:
    made = await create(service, checkpoint=checkpoint(ttl=Duration(seconds=3600)))

    assert made.name == "deployments/qa"
    assert uuid.UUID(made.uid)
    assert made.engine == "causal_lm"
    assert made.checkpoint.enabled
    assert made.checkpoint.ttl.seconds == 3600
    assert (made.idle_timeout.seconds, made.park_timeout.seconds) == (300, 600)
    assert made.state == pb.Deployment.STATE_ACTIVE
    assert made.etag
    assert (await world.registry.load()).deployments[0].id == "qa"
    assert await service.GetDeployment(pb.GetDeploymentRequest(name="deployments/qa"), None) == made


@pytest.mark.parametrize(
    ("identifier", "fields", "kind", "reason", "field"),
    [
        ("Bad_Id", {}, InvalidArgument, "INVALID_ID", "deployment_id"),
        ("", {}, InvalidArgument, "INVALID_ID", "deployment_id"),
        ("qa", {"model": " "}, InvalidArgument, "MODEL_REQUIRED", "deployment.model"),
        ("qa", {"model": "a\nb"}, InvalidArgument, "INVALID_TEXT", "deployment.model"),
        ("qa", {"model": "x" * 2000}, InvalidArgument, "INVALID_TEXT", "deployment.model"),
        ("qa", {"engine": "\0"}, InvalidArgument, "INVALID_TEXT", "deployment.engine"),
        ("qa", {"start_mode": 0}, InvalidArgument, "START_MODE_REQUIRED", "deployment.start_mode"),
        ("qa", {"start_mode": 77}, InvalidArgument, "START_MODE_REQUIRED", "deployment.start_mode"),
        (
            "qa",
            {"checkpoint": checkpoint(enabled=False)},
            InvalidArgument,
            "CHECKPOINT_DISABLED",
            "deployment.checkpoint.enabled",
        ),
        (
            "qa",
            {"checkpoint": checkpoint(ttl=Duration(seconds=-1))},
            InvalidArgument,
            "NEGATIVE_DURATION",
            "deployment.checkpoint.ttl",
        ),
        (
            "qa",
            {"checkpoint": checkpoint(ttl=Duration(nanos=-1))},
            InvalidArgument,
            "NEGATIVE_DURATION",
            "deployment.checkpoint.ttl",
        ),
        (
            "qa",
            {"idle_timeout": Duration(seconds=11 * 365 * 86400)},
            InvalidArgument,
            "DURATION_TOO_LONG",
            "deployment.idle_timeout",
        ),
        (
            "qa",
            {"park_timeout": Duration(seconds=-5)},
            InvalidArgument,
            "NEGATIVE_DURATION",
            "deployment.park_timeout",
        ),
        (
            "qa",
            {"checkpoint": checkpoint(storage=pb.STORAGE_S3)},
            FailedPrecondition,
            "OBJECT_STORE_NOT_CONFIGURED",
            "deployment.checkpoint.storage",
        ),
        (
            "qa",
            {"checkpoint": checkpoint(storage=9)},
            InvalidArgument,
            "INVALID_STORAGE",
            "deployment.checkpoint.storage",
        ),
        (
            "qa",
            {"checkpoint": checkpoint(weights=9)},
            InvalidArgument,
            "INVALID_WEIGHTS",
            "deployment.checkpoint.weights",
        ),
        ("qa", {"priority": 1001}, InvalidArgument, "INVALID_PRIORITY", "deployment.priority"),
        ("qa", {"min_instances": -1}, InvalidArgument, "INVALID_INSTANCES", "deployment.min_instances"),
        ("qa", {"max_instances": 0}, InvalidArgument, "INVALID_INSTANCES", "deployment.max_instances"),
        (
            "qa",
            {"min_instances": 3, "max_instances": 2},
            InvalidArgument,
            "INSTANCES_DISAGREE",
            "deployment.min_instances",
        ),
    ],
)
async def test_bad_settings_are_refused_by_field_and_change_nothing(
    world: World,
    service: DeploymentService,
    identifier: str,
    fields: dict[str, Any],
    kind: type,
    reason: str,
    field: str,
) -> None:
    with pytest.raises(kind) as raised:
        await create(service, identifier, **fields)
    failure: Any = raised.value
    assert (failure.reason, failure.field) == (reason, field)
    assert (await world.registry.load()).deployments == ()
    assert world.nodes.named("resolve_model") == []


@pytest.mark.parametrize(
    "error",
    [
        NotFound("MODEL_NOT_FOUND", "no such model"),
        FailedPrecondition("MODEL_DAMAGED", "truncated"),
        InvalidArgument("UNKNOWN_ENGINE", "what?"),
    ],
)
async def test_what_a_node_says_of_the_model_names_the_field(
    world: World, service: DeploymentService, error: DumontError
) -> None:
    world.nodes.fail("resolve_model", error)
    with pytest.raises(type(error)) as failure:
        await create(service)
    assert (failure.value.reason, failure.value.field) == (error.reason, "deployment.model")
    assert (await world.registry.load()).deployments == ()


async def test_without_a_node_the_model_cannot_be_checked(world: World) -> None:
    parts = world.controller
    alone = DeploymentService(parts.core, parts.starts)
    with pytest.raises(Unavailable) as failure:
        await create(alone)
    assert failure.value.reason == "NO_NODE"


async def test_a_taken_id_is_refused(service: DeploymentService) -> None:
    await create(service)
    with pytest.raises(AlreadyExists) as failure:
        await create(service, model="org/other")
    assert (failure.value.reason, failure.value.field) == ("DEPLOYMENT_EXISTS", "deployment_id")


async def test_repeating_a_request_id_returns_the_first_answer(
    world: World, service: DeploymentService
) -> None:
    once = request()
    once.request_id = str(uuid.uuid4())
    first = await service.CreateDeployment(once, None)
    assert await service.CreateDeployment(once, None) == first
    assert len(world.nodes.named("resolve_model")) == 1
    once.request_id = "not a uuid"
    with pytest.raises(InvalidArgument) as failure:
        await service.CreateDeployment(once, None)
    assert failure.value.field == "request_id"


async def test_prewarm_starts_and_captures_at_once(world: World, service: DeploymentService) -> None:
    wanted = request()
    wanted.prewarm = True
    made = await service.CreateDeployment(wanted, None)
    assert made.state == pb.Deployment.STATE_CREATING
    await world.until(lambda: bool(world.inventory.snapshots) and not world.controller.starts.starting("qa"))
    assert world.controller.starts.condition(world.controller.core.deployments.get("qa")) == (
        DeploymentState.ACTIVE,
        "",
    )


async def update(service: DeploymentService, mask: list[str] | None, **fields: Any) -> pb.Deployment:
    wanted = pb.UpdateDeploymentRequest(deployment=pb.Deployment(name="deployments/qa", **fields))
    if mask is not None:
        wanted.update_mask.CopyFrom(FieldMask(paths=mask))
    return await service.UpdateDeployment(wanted, None)


async def test_an_update_changes_what_its_mask_names(service: DeploymentService) -> None:
    made = await create(service, idle_timeout=Duration(seconds=9))
    seconds = Duration(seconds=42)

    changed = await update(service, ["park_timeout"], park_timeout=seconds, idle_timeout=seconds)

    assert (changed.park_timeout.seconds, changed.idle_timeout.seconds) == (42, 9)
    assert changed.etag != made.etag
    assert changed.uid == made.uid
    assert (await update(service, ["idle_timeout"])).idle_timeout.seconds == 300


async def test_where_the_weights_go_is_set_kept_and_changed(service: DeploymentService) -> None:
    made = await create(service, checkpoint=checkpoint(weights=pb.WEIGHTS_INCLUDED))
    assert made.checkpoint.weights == pb.WEIGHTS_INCLUDED
    changed = await update(service, ["checkpoint.ttl"], checkpoint=checkpoint(ttl=Duration(seconds=5)))
    assert changed.checkpoint.weights == pb.WEIGHTS_INCLUDED
    changed = await update(service, ["checkpoint.weights"], checkpoint=checkpoint())
    assert (changed.checkpoint.weights, changed.checkpoint.ttl.seconds) == (pb.WEIGHTS_DETACHED, 5)


async def test_priority_and_the_number_of_instances_are_set_kept_and_changed(
    service: DeploymentService,
) -> None:
    made = await create(service)
    assert (made.priority, made.min_instances, made.max_instances) == (0, 0, 1)
    changed = await update(service, ["priority", "max_instances"], priority=-5, max_instances=4)
    assert (changed.priority, changed.min_instances, changed.max_instances) == (-5, 0, 4)
    changed = await update(service, ["start_mode"], start_mode=pb.START_MODE_WARM)
    assert (changed.priority, changed.min_instances, changed.max_instances) == (-5, 1, 4)


async def test_without_a_mask_every_set_field_counts(service: DeploymentService) -> None:
    await create(service, idle_timeout=Duration(seconds=9), checkpoint=checkpoint(ttl=Duration(seconds=5)))
    changed = await update(service, None, idle_timeout=Duration(seconds=1), model="org/model")
    assert (changed.idle_timeout.seconds, changed.checkpoint.ttl.seconds) == (1, 5)


async def test_a_star_replaces_everything_that_can_be_set(service: DeploymentService) -> None:
    await create(service, idle_timeout=Duration(seconds=9), checkpoint=checkpoint(ttl=Duration(seconds=5)))
    changed = await update(service, ["*"], start_mode=pb.START_MODE_WARM)
    assert changed.start_mode == pb.START_MODE_WARM
    assert (changed.idle_timeout.seconds, changed.checkpoint.ttl.seconds) == (300, 86400)
    assert not changed.checkpoint.enabled


async def test_changing_the_start_mode_keeps_or_follows_checkpointing(service: DeploymentService) -> None:
    await create(service, start_mode=pb.START_MODE_COLD)
    changed = await update(service, ["start_mode"], start_mode=CHECKPOINT)
    assert changed.checkpoint.enabled
    with pytest.raises(InvalidArgument) as failure:
        await update(service, ["checkpoint.enabled"], checkpoint=checkpoint(enabled=False))
    assert failure.value.reason == "CHECKPOINT_DISABLED"


@pytest.mark.parametrize(
    ("mask", "fields", "kind", "reason", "field"),
    [
        (["colour"], {}, InvalidArgument, "UNKNOWN_FIELD", "update_mask"),
        (["checkpoint.colour"], {}, InvalidArgument, "UNKNOWN_FIELD", "update_mask"),
        (["model"], {"model": "org/other"}, InvalidArgument, "IMMUTABLE_FIELD", "deployment.model"),
        (["engine"], {"engine": "embedding"}, InvalidArgument, "IMMUTABLE_FIELD", "deployment.engine"),
        (None, {"model": "org/other"}, InvalidArgument, "IMMUTABLE_FIELD", "deployment.model"),
        (["start_mode"], {}, InvalidArgument, "START_MODE_REQUIRED", "deployment.start_mode"),
        (["idle_timeout"], {"etag": "old"}, Aborted, "ETAG_MISMATCH", "deployment.etag"),
        (
            ["idle_timeout"],
            {"idle_timeout": Duration(seconds=-1)},
            InvalidArgument,
            "NEGATIVE_DURATION",
            "deployment.idle_timeout",
        ),
    ],
)
async def test_a_bad_update_changes_nothing(
    world: World,
    service: DeploymentService,
    mask: list[str] | None,
    fields: dict[str, Any],
    kind: type,
    reason: str,
    field: str,
) -> None:
    await create(service)
    before = (await world.registry.load()).deployments
    with pytest.raises(kind) as raised:
        await update(service, mask, **fields)
    failure: Any = raised.value
    assert (failure.reason, failure.field) == (reason, field)
    assert (await world.registry.load()).deployments == before


async def test_output_only_paths_are_passed_over_and_a_right_etag_accepted(
    service: DeploymentService,
) -> None:
    made = await create(service)
    changed = await update(service, ["state", "uid", "idle_timeout"], uid="x", etag=made.etag)
    assert changed.uid == made.uid


@pytest.mark.parametrize("name", ["", "deployments/", "instances/qa", "deployments/A"])
async def test_a_malformed_name_is_refused(service: DeploymentService, name: str) -> None:
    with pytest.raises(InvalidArgument) as failure:
        await service.GetDeployment(pb.GetDeploymentRequest(name=name), None)
    assert failure.value.field == "name"


async def test_an_unknown_deployment_is_not_found(service: DeploymentService) -> None:
    for call in (
        service.GetDeployment(pb.GetDeploymentRequest(name="deployments/no"), None),
        service.DeleteDeployment(pb.DeleteDeploymentRequest(name="deployments/no"), None),
        update(service, ["idle_timeout"]),
    ):
        with pytest.raises(NotFound) as failure:
            await call
        assert failure.value.reason == "DEPLOYMENT_NOT_FOUND"


async def test_delete_returns_when_nothing_is_left(world: World, service: DeploymentService) -> None:
    await create(service)
    await world.ask()
    await service.DeleteDeployment(pb.DeleteDeploymentRequest(name="deployments/qa"), None)
    assert world.nodes.world["n1"].instances == {}
    assert world.nodes.world["n1"].snapshots == {}
    assert world.controller.core.deployments.by_id == {}


async def test_a_list_comes_in_pages_that_join_to_all(service: DeploymentService) -> None:
    for number in range(5):
        await create(service, f"d{number}", start_mode=pb.START_MODE_COLD)
    found: list[str] = []
    token = ""
    while True:
        answer = await service.ListDeployments(pb.ListDeploymentsRequest(page_size=2, page_token=token), None)
        found += [deployment.name for deployment in answer.deployments]
        token = answer.next_page_token
        if not token:
            break
    assert found == [f"deployments/d{number}" for number in range(5)]


def test_start_modes_go_both_ways() -> None:
    assert set(convert.MODES.values()) == set(StartMode)
    assert all(convert.MODES[value] is mode for mode, value in convert.MODES_BACK.items())


@pytest.mark.parametrize("mode", [pb.START_MODE_WARM, pb.START_MODE_COLD])
async def test_a_ttl_that_the_start_mode_ignores_is_refused(
    service: DeploymentService, mode: pb.StartMode.ValueType
) -> None:
    an_hour = Duration(seconds=3600)
    with pytest.raises(InvalidArgument) as raised:
        await create(service, start_mode=mode, checkpoint=checkpoint(ttl=an_hour))
    assert (raised.value.reason, raised.value.field) == ("TTL_WITHOUT_SNAPSHOTS", "deployment.checkpoint.ttl")

    # neither by a later change,
    await create(service, start_mode=mode)
    with pytest.raises(InvalidArgument, match="no effect"):
        await update(service, ["checkpoint.ttl"], checkpoint=checkpoint(ttl=an_hour))

    # while it is taken where snapshots are made on request, and kept where the start mode changes
    made = await create(service, "other", start_mode=mode, checkpoint=checkpoint(ttl=an_hour, enabled=True))
    assert made.checkpoint.ttl.seconds == 3600
    made = await create(service, "third", checkpoint=checkpoint(ttl=an_hour))
    await service.UpdateDeployment(
        pb.UpdateDeploymentRequest(
            deployment=pb.Deployment(name="deployments/third", start_mode=mode),
            update_mask=FieldMask(paths=["start_mode"]),
        ),
        None,
    )
