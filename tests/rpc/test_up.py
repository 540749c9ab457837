"""``dumont up`` starts two services, waits until they serve, and ends both however it ends."""

from __future__ import annotations

import os
import signal
import socket
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from pydantic_settings import CliApp

from controller.config import load
from dumont.errors import FailedPrecondition, InvalidArgument
from dumont.up import Daemon, check_models_dir, plan, run
from snapshotd.config import Settings


@pytest.fixture
def daemons(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, free_port: Callable[[], int]) -> list[Daemon]:
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(Path(__file__).parents[2]), str(Path.cwd())]))
    made = []
    for name in ("controller", "snapshotd"):
        endpoint = f"127.0.0.1:{free_port()}"
        arguments = (endpoint, str(tmp_path / f"{name}.left"))
        made.append(
            Daemon(name, "tests.rpc.fake_daemon", endpoint, tmp_path / "state" / f"{name}.log", arguments)
        )
    return made


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
async def test_it_is_ready_when_both_serve_and_ends_both_at_a_signal(
    daemons: list[Daemon], tmp_path: Path, number: signal.Signals
) -> None:
    ready: list[bool] = []

    def on_ready() -> None:
        ready.append(True)
        os.kill(os.getpid(), number)

    await run(daemons, on_ready)
    assert ready == [True]
    assert [(tmp_path / f"{daemon.name}.left").read_text() for daemon in daemons] == ["drained", "drained"]
    assert "draining" in daemons[0].log.read_text()


async def test_a_service_that_ends_is_named_with_its_last_words_and_the_other_is_stopped(
    daemons: list[Daemon], tmp_path: Path
) -> None:
    controller, snapshotd = daemons
    failing = Daemon(snapshotd.name, snapshotd.module, snapshotd.endpoint, snapshotd.log, ("fail",))
    with pytest.raises(FailedPrecondition, match="the machine is unfit") as raised:
        await run([controller, failing], lambda: None)
    assert raised.value.reason == "SERVICE_ENDED"
    assert raised.value.metadata == {"service": "snapshotd", "status": "3"}


async def test_a_state_directory_that_cannot_be_made_is_named(daemons: list[Daemon], tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for unusable in ("/proc/none", str(tmp_path / "file"), str(tmp_path / ("x" * 300))):
        placed = [replace(daemon, log=Path(unusable) / "service.log") for daemon in daemons]
        with pytest.raises(FailedPrecondition, match="choose another --state-dir") as raised:
            await run(placed, lambda: None)
        assert raised.value.reason == "STATE_UNUSABLE"
        assert unusable in raised.value.message


def test_a_models_directory_that_does_not_exist_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InvalidArgument) as raised:
        check_models_dir(tmp_path / "none")
    assert (raised.value.reason, raised.value.field) == ("MODELS_DIR_MISSING", "models_dir")


async def test_a_taken_port_is_refused_before_anything_starts(daemons: list[Daemon]) -> None:
    with socket.socket() as taken:
        host, _, port = daemons[1].endpoint.partition(":")
        taken.bind((host, int(port)))
        taken.listen(1)
        with pytest.raises(FailedPrecondition) as raised:
            await run(daemons, lambda: None)
    assert raised.value.reason == "ADDRESS_IN_USE"
    assert not daemons[0].log.exists()


def test_the_plan_keeps_all_state_below_one_directory(tmp_path: Path) -> None:
    controller, snapshotd = plan(tmp_path, 1, 2, tmp_path / "models", "cpu")
    assert (controller.endpoint, snapshotd.endpoint) == ("127.0.0.1:1", "127.0.0.1:2")
    assert controller.arguments[controller.arguments.index("--state-dir") + 1] == str(tmp_path / "controller")
    assert snapshotd.arguments[snapshotd.arguments.index("--controller") + 1] == controller.endpoint
    assert snapshotd.arguments[snapshotd.arguments.index("--device") + 1] == "cpu"
    assert "--stop-instances-on-exit" in snapshotd.arguments
    assert snapshotd.arguments[-2:] == ("--models-dir", str(tmp_path / "models"))
    assert "--models-dir" not in plan(tmp_path, 1, 2)[1].arguments


def test_the_node_takes_a_controller_that_has_lost_its_state(tmp_path: Path) -> None:
    assert "--accept-controller" in plan(tmp_path, 1, 2)[1].arguments


def test_the_services_take_the_flags_they_are_given(tmp_path: Path) -> None:
    controller, snapshotd = plan(tmp_path, 1, 2, tmp_path / "models", "cpu")
    assert load(controller.arguments).listen == controller.endpoint
    settings = CliApp.run(Settings, cli_args=list(snapshotd.arguments))
    assert (settings.listen, settings.controller) == (snapshotd.endpoint, controller.endpoint)
    assert settings.stop_instances_on_exit
