"""compose.yaml says what the services understand."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from compose_spec import PyCompose
from pydantic_settings import BaseSettings

from controller import config as controller
from snapshotd import config as snapshotd

ROOT = Path(__file__).parents[2]
COMPOSE = ROOT / "compose.yaml"
GPU = ROOT / "compose.gpu.yaml"
DOCKERFILE = ROOT / "deploy" / "Dockerfile"
SETTINGS: dict[str, type[BaseSettings]] = {
    "DUMONT_CONTROLLER_": controller.Config,
    "DUMONT_SNAPSHOTD_": snapshotd.Settings,
}
# What snapshotd reads besides its own variables.
STORE = {"S3_ENDPOINT", "S3_ACCESS_KEY", "S3_SECRET_KEY", "S3_REGION"}
WITH_DEFAULT = re.compile(r"\$\{[A-Z_]+_IMAGE:-[a-z/]+\}:\$\{[A-Z_]+_TAG:-[\w.-]+\}")


@pytest.fixture
def services() -> dict[str, Any]:
    document: dict[str, Any] = yaml.safe_load(COMPOSE.read_text())
    return dict(document["services"])


def filled_in(text: str) -> str:
    """With the value that each variable has by default, or when it is set."""
    return re.sub(r"\$\{\w+:[-+]([^}]*)\}", r"\1", text)


def test_it_is_a_compose_file() -> None:
    parsed = PyCompose.from_json(json.dumps(yaml.safe_load(filled_in(COMPOSE.read_text()))))
    assert set(parsed.service_names()) == {"controller", "snapshotd", "minio", "seaweedfs"}


def test_every_variable_of_the_services_is_a_setting(services: dict[str, Any]) -> None:
    names = {*services["controller"]["environment"], *services["snapshotd"]["environment"]} - STORE
    assert names
    for name in names:
        prefix = next(prefix for prefix in SETTINGS if name.startswith(prefix))
        assert name.removeprefix(prefix).lower() in SETTINGS[prefix].model_fields, name


def test_the_settings_are_accepted_with_their_values(
    services: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    for service, settings in (("controller", controller.Config), ("snapshotd", snapshotd.Settings)):
        for name, value in services[service]["environment"].items():
            monkeypatch.setenv(name, filled_in(value))
        assert settings.model_validate({}).state_dir == Path("/var/lib/dumont")


@pytest.mark.parametrize("store", ["minio", "seaweedfs"])
def test_a_store_s_image_can_be_named_and_has_a_pinned_default(services: dict[str, Any], store: str) -> None:
    assert WITH_DEFAULT.fullmatch(services[store]["image"])
    assert services[store]["profiles"] == [store]


def test_every_service_says_whether_it_is_healthy_and_is_waited_for(services: dict[str, Any]) -> None:
    for name, service in services.items():
        assert service["healthcheck"]["test"][0] == "CMD", name
    assert {
        name: dependency["condition"] for name, dependency in services["snapshotd"]["depends_on"].items()
    } == {"controller": "service_healthy", "minio": "service_healthy", "seaweedfs": "service_healthy"}
    # Only one of the stores runs, or neither.
    assert not services["snapshotd"]["depends_on"]["minio"]["required"]
    assert not services["snapshotd"]["depends_on"]["seaweedfs"]["required"]


@pytest.mark.parametrize("service", ["controller", "snapshotd"])
def test_the_health_of_a_service_is_asked_where_it_listens(services: dict[str, Any], service: str) -> None:
    settings = services[service]
    listens = settings["environment"][f"DUMONT_{service.upper()}_LISTEN"].replace("0.0.0.0", "127.0.0.1")
    assert settings["healthcheck"]["test"] == ["CMD", "healthcheck", listens]


def test_the_network_that_is_shared_is_waited_for_again(services: dict[str, Any]) -> None:
    assert services["snapshotd"]["network_mode"] == "service:controller"
    assert services["snapshotd"]["depends_on"]["controller"]["restart"]


def test_gpus_are_handed_over_by_a_file_of_their_own(services: dict[str, Any]) -> None:
    document = yaml.safe_load(GPU.read_text())
    PyCompose.from_json(json.dumps(document))
    # Nothing is reserved where there may be none.
    assert all("deploy" not in service for service in services.values())
    assert set(document["services"]) == {"snapshotd"}
    (devices,) = document["services"]["snapshotd"]["deploy"]["resources"]["reservations"]["devices"]
    assert devices == {"driver": "nvidia", "count": "all", "capabilities": ["gpu"]}


def test_the_image_has_what_a_node_with_gpus_needs() -> None:
    """Without the extra, snapshotd finds a driver and nothing to speak to it with."""
    (extras,) = re.findall(r"^RUN pip install .*\[([a-z,]+)\]'$", DOCKERFILE.read_text(), re.M)
    assert {"controller", "node", "gpu"} <= set(extras.split(","))


def test_what_the_image_copies_is_there_and_not_ignored() -> None:
    ignored = (ROOT / ".dockerignore").read_text().splitlines()
    assert ignored[0] == "*"
    copied = [
        source
        for line in re.findall(r"^COPY (.*)$", DOCKERFILE.read_text(), re.M)
        for source in line.split()[:-1]
    ]
    assert copied
    for source in copied:
        assert (ROOT / source).exists(), source
        assert f"!{source}" in ignored, source
