"""A service whose node encrypts its snapshots: fast with the key, and without it slow and plain about why."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

import dumont
from tests.e2e.stack import Stack
from tests.unit.snapshotd.repository.world import a_key_file

pytestmark = pytest.mark.node

PROMPT = "The capital of France is"


def test_without_the_key_a_deployment_starts_cold_and_says_why(
    criu: Path,
    grpcurl: Path,
    instruct_model: Path,
    free_port: Callable[[], int],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # given: settings in the environment, as ``dumont up`` passes them on
    key = a_key_file(tmp_path / "key")
    monkeypatch.setenv("DUMONT_SNAPSHOTD_ENCRYPTION_KEY_FILE", str(key))
    monkeypatch.setenv("DUMONT_SNAPSHOTD_ENCRYPT_LOCAL", "true")
    ports = free_port(), free_port()

    def served() -> dumont.Generation:
        with Stack(tmp_path / "up", *ports, grpcurl) as running, dumont.Client(running.endpoint) as client:
            if not client.deployments.list():
                client.deploy(str(instruct_model), name="qa")
            return client.deployments.get("qa").generate(PROMPT, max_new_tokens=8)

    first = served()
    assert first.start.tier == "cold"

    # when: the services start again
    second = served()

    # then
    assert (second.start.tier, second.text) == ("local", first.text)
    assert list((tmp_path / "up/snapshotd/snapshots").iterdir()) == [
        tmp_path / "up/snapshotd/snapshots/.sealed"
    ]

    # and with another key
    key.unlink()
    a_key_file(key)
    third = served()
    assert (third.start.tier, third.text) == ("cold", first.text)
    assert any("KEY_MISSING" in reason for reason in third.start.reasons), third.start.reasons
