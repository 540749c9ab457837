"""compose.yaml says what the services understand."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from compose_spec import PyCompose

from controller import config as controller
from snapshotd import config as snapshotd

COMPOSE = Path(__file__).parents[2] / "compose.yaml"
SETTINGS = {"DUMONT_CONTROLLER_": controller.Config, "DUMONT_SNAPSHOTD_": snapshotd.Settings}
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
