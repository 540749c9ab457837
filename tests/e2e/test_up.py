"""``dumont up`` as a user meets it: real services, real CRIU, a real model, real grpcurl."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import dumont
from tests.e2e.stack import Refusal, Stack

pytestmark = pytest.mark.node

CREATE = "dumont.controller.v1.DeploymentService/CreateDeployment"
GENERATE = "dumont.controller.v1.InferenceService/Generate"
PROMPT = "The capital of France is"

INVALID_ARGUMENT = 3
NOT_FOUND = 5
ALREADY_EXISTS = 6
FAILED_PRECONDITION = 9


@pytest.fixture(scope="module")
def qa(stack: Stack, instruct_model: Path) -> str:
    """A checkpoint deployment, created with grpcurl."""
    deployment = {"model": str(instruct_model), "start_mode": "START_MODE_CHECKPOINT"}
    (created,) = stack.controller.call(CREATE, {"deployment_id": "qa", "deployment": deployment})
    assert created["name"] == "deployments/qa"
    return "deployments/qa"


def test_up_says_where_both_services_are(stack: Stack) -> None:
    assert stack.announced["controller"] == stack.endpoint


@pytest.mark.parametrize(
    ("server", "services"),
    [
        (
            "controller",
            {"DeploymentService", "InferenceService", "InstanceService", "SnapshotService", "NodeService"},
        ),
        ("snapshotd", {"InstanceService", "InferenceService", "SnapshotService", "NodeService"}),
    ],
)
def test_grpcurl_lists_describes_and_finds_every_service_healthy(
    stack: Stack, server: str, services: set[str]
) -> None:
    grpcurl = getattr(stack, server)

    listed = set(grpcurl.show("list").split())

    expected = {f"dumont.{server}.v1.{service}" for service in services}
    assert expected <= listed
    assert {"grpc.health.v1.Health", "google.longrunning.Operations"} <= listed
    for service in sorted(expected):
        assert f"service {service.rpartition('.')[2]}" in grpcurl.show("describe", service)
        (health,) = grpcurl.call("grpc.health.v1.Health/Check", {"service": service})
        assert health == {"status": "SERVING"}


def test_the_create_request_is_described_with_its_fields(stack: Stack) -> None:
    described = stack.controller.show("describe", "dumont.controller.v1.CreateDeploymentRequest")

    assert "string deployment_id = 1" in described
    assert ".dumont.controller.v1.Deployment deployment = 2" in described


def test_grpcurl_gets_an_answer_that_begins_with_how_it_was_started(stack: Stack, qa: str) -> None:
    start, *chunks, finish = stack.controller.call(
        GENERATE, {"deployment": qa, "prompt": PROMPT, "max_new_tokens": 8}
    )

    assert "Paris" in "".join(message["chunk"].get("text", "") for message in chunks)
    assert start["start"]["tier"] in ("TIER_COLD", "TIER_RESIDENT")
    assert start["start"]["reasons"]
    assert start["start"]["instance"].startswith("instances/")
    assert finish["finish"]["reason"] == "FINISH_REASON_LENGTH"
    assert finish["finish"]["usage"]["outputTokens"] == 8


def test_a_deployment_answers_the_same_cold_restored_and_resumed(stack: Stack, instruct_model: Path) -> None:
    with dumont.Client(stack.endpoint) as client:
        # Given a deployment that answered cold, and whose process is gone
        deployment = client.deploy(str(instruct_model), name="main-job")
        cold = deployment.generate(PROMPT, max_new_tokens=8)
        pid = client.instances.get(cold.start.instance).pid
        assert Path(f"/proc/{pid}").exists()
        client.instances.stop(cold.start.instance)
        assert not Path(f"/proc/{pid}").exists()

        # When it is asked again, parked, and asked once more
        restored = deployment.generate(PROMPT, max_new_tokens=8)
        client.instances.park(restored.start.instance)
        resumed = deployment.generate(PROMPT, max_new_tokens=8)

        # Then each answer is the same, from where it was to come from
        assert [cold.start.tier, restored.start.tier, resumed.start.tier] == ["cold", "local", "parked"]
        assert "Paris" in cold.text
        assert cold.text == restored.text == resumed.text
        assert restored.start.instance != cold.start.instance
        assert resumed.start.instance == restored.start.instance

        # And deleting it leaves nothing of it
        pid = client.instances.get(resumed.start.instance).pid
        deployment.delete()
        assert wait_until_gone(client, deployment.name)
        assert not Path(f"/proc/{pid}").exists()
        assert client.snapshots.list(deployment.name) == []


def test_the_embedding_model_tells_close_sentences_from_far_ones(stack: Stack, embedding_model: Path) -> None:
    with dumont.Client(stack.endpoint) as client:
        deployment = client.deploy(str(embedding_model), start_mode="cold", name="embed")

        cat, kitten, tax = deployment.embed(["A cat sits.", "A kitten is sitting.", "Taxes rose in May."])

        assert dot(cat, kitten) > dot(cat, tax) + 0.2


def test_the_command_generates_and_shows_instances(stack: Stack, qa: str) -> None:
    answer = stack.dumont("generate", "qa", PROMPT, "--max-new-tokens", "8")
    instances = json.loads(stack.dumont("ps", "--json", "--deployment", "qa"))

    assert "Paris" in answer
    assert [(i["deployment"], i["state"]) for i in instances] == [(qa, "serving")]
    assert Path(f"/proc/{instances[0]['pid']}").exists()


@pytest.fixture(scope="module")
def truncated_model(instruct_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model directory whose weights end in the middle."""
    directory = tmp_path_factory.mktemp("truncated")
    for file in instruct_model.iterdir():
        if file.suffix != ".safetensors":
            shutil.copy(file, directory)
    whole = instruct_model / "model.safetensors"
    with whole.open("rb") as source, (directory / whole.name).open("wb") as target:
        target.write(source.read(1_000_000))
    return directory


CHECKPOINT = "START_MODE_CHECKPOINT"


@pytest.mark.parametrize(
    ("method", "body", "expected"),
    [
        pytest.param(
            CREATE,
            {"deployment_id": "bad", "deployment": {"model": "nobody/nothing", "start_mode": CHECKPOINT}},
            Refusal(NOT_FOUND, "MODEL_NOT_FOUND", "deployment.model"),
            id="unknown model",
        ),
        pytest.param(
            CREATE,
            {"deployment_id": "bad", "deployment": {"model": "{truncated}", "start_mode": CHECKPOINT}},
            Refusal(FAILED_PRECONDITION, "MODEL_INVALID", "deployment.model"),
            id="truncated weights",
        ),
        pytest.param(
            CREATE,
            {
                "deployment_id": "bad",
                "deployment": {"model": "{model}", "start_mode": CHECKPOINT, "checkpoint": {"ttl": "-5s"}},
            },
            Refusal(INVALID_ARGUMENT, "NEGATIVE_DURATION", "deployment.checkpoint.ttl"),
            id="negative ttl",
        ),
        pytest.param(
            CREATE,
            {
                "deployment_id": "bad",
                "deployment": {
                    "model": "{model}",
                    "start_mode": CHECKPOINT,
                    "checkpoint": {"enabled": False},
                },
            },
            Refusal(INVALID_ARGUMENT, "CHECKPOINT_DISABLED", "deployment.checkpoint.enabled"),
            id="checkpoint start mode without checkpointing",
        ),
        pytest.param(
            CREATE,
            {"deployment_id": "qa", "deployment": {"model": "{model}", "start_mode": CHECKPOINT}},
            Refusal(ALREADY_EXISTS, "DEPLOYMENT_EXISTS", "deployment_id"),
            id="duplicate id",
        ),
        pytest.param(
            CREATE,
            {"deployment_id": "Not An Id", "deployment": {"model": "{model}", "start_mode": CHECKPOINT}},
            Refusal(INVALID_ARGUMENT, "INVALID_ID", "deployment_id"),
            id="malformed id",
        ),
        pytest.param(
            CREATE,
            {"deployment_id": "bad", "deployment": {"model": "{model}"}},
            Refusal(INVALID_ARGUMENT, "START_MODE_REQUIRED", "deployment.start_mode"),
            id="no start mode",
        ),
        pytest.param(
            GENERATE,
            {"deployment": "deployments/qa", "prompt": ""},
            Refusal(INVALID_ARGUMENT, "EMPTY_PROMPT", "prompt"),
            id="empty prompt",
        ),
        pytest.param(
            GENERATE,
            {"deployment": "deployments/qa", "prompt": "Hello", "max_new_tokens": 1_000_000},
            Refusal(INVALID_ARGUMENT, "INVALID_MAX_NEW_TOKENS", "max_new_tokens"),
            id="too many tokens",
        ),
        pytest.param(
            GENERATE,
            {"deployment": "deployments/nobody", "prompt": "Hello"},
            Refusal(NOT_FOUND, "DEPLOYMENT_NOT_FOUND", "deployment"),
            id="unknown deployment",
        ),
    ],
)
def test_a_bad_request_is_refused_with_reason_and_field_and_changes_nothing(
    stack: Stack,
    qa: str,
    instruct_model: Path,
    truncated_model: Path,
    method: str,
    body: dict[str, Any],
    expected: Refusal,
) -> None:
    paths = {"{model}": str(instruct_model), "{truncated}": str(truncated_model)}
    if (deployment := body.get("deployment")) and isinstance(deployment, dict):
        body = {
            **body,
            "deployment": {**deployment, "model": paths.get(deployment["model"], deployment["model"])},
        }
    before = everything(stack)

    refusal = stack.controller.refused(method, body)

    assert refusal == expected
    assert everything(stack) == before


def test_sigterm_lets_a_running_answer_end_and_leaves_no_process(
    new_stack: Callable[[], Stack], instruct_model: Path
) -> None:
    # Given an answer on its way
    with new_stack() as stack, dumont.Client(stack.endpoint) as client:
        deployment = client.deploy(str(instruct_model), start_mode="warm", name="drain")
        expected = deployment.generate(PROMPT, max_new_tokens=24).text
        stream = deployment.stream(PROMPT, max_new_tokens=24)
        pieces = iter(stream)
        first = next(pieces)
        (instance,) = client.instances.list()

        # When the services are told to end
        stack.process.terminate()

        # Then the answer still comes whole, and nothing is left
        assert first + "".join(pieces) == expected
        assert stack.process.wait(60) == 0
        assert not Path(f"/proc/{instance.pid}").exists()


def everything(stack: Stack) -> list[Any]:
    """What there is, as the controller tells it, without what changes by itself."""
    told: list[Any] = [
        stack.controller.call(f"dumont.controller.v1.{service}/{method}")
        for service, method in (
            ("DeploymentService", "ListDeployments"),
            ("InstanceService", "ListInstances"),
            ("SnapshotService", "ListSnapshots"),
        )
    ]
    for message in told[1]:
        for instance in message.get("instances", ()):
            for live in ("reasons", "memoryBytes", "ramBytes", "load"):
                instance.pop(live, None)
    return told


def wait_until_gone(client: dumont.Client, deployment: str) -> bool:
    """Whether a deployment's instances have all ended."""
    return any(
        all(instance.deployment != deployment for instance in instances)
        for instances in client.instances.watch()
    )


def dot(a: list[float], b: list[float]) -> float:
    return sum(x * y for x, y in zip(a, b, strict=True))
