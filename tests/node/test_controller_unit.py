"""The controller as its unit runs it: nothing may be written but its own state directory."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

import dumont
from tests.helpers.systemd_unit import environment

pytestmark = pytest.mark.node

# As ProtectSystem=strict and ProtectHome=yes do, and a HOME as DynamicUser=yes gives.
SANDBOX = """
mount --make-rprivate /
mount --bind "$STATE" "$STATE"
mount -o remount,bind,ro /
touch /root/dumont-test 2>/dev/null && { echo "/ can be written"; exit 99; }
exec "$@"
"""


def test_the_controller_runs_with_what_its_unit_gives_it(
    root: None, free_port: Callable[[], int], tmp_path: Path
) -> None:
    # given
    endpoint = f"127.0.0.1:{free_port()}"
    state = tmp_path / "dumont-controller"
    state.mkdir(mode=0o700)
    given = environment("dumont-controller", str(tmp_path))
    log = (tmp_path / "log").open("wb")
    command = ["unshare", "--mount", "sh", "-ec", SANDBOX, "sandbox", sys.executable, "-m", "controller.main"]

    # when
    process = subprocess.Popen(
        command,
        env={**given, "STATE": str(state), "HOME": "/", "PATH": "/usr/sbin:/usr/bin:/sbin:/bin",
             "DUMONT_CONTROLLER_LISTEN": endpoint},
        cwd=Path(__file__).parents[2],
        stdout=log,
        stderr=log,
    )  # fmt: skip
    try:
        with dumont.Client(endpoint) as client:
            for _ in range(100):
                try:
                    assert client.deployments.list() == []
                    break
                except dumont.Unavailable:
                    assert process.poll() is None, (tmp_path / "log").read_text()
            else:
                pytest.fail((tmp_path / "log").read_text())
    finally:
        process.terminate()
        process.wait(60)
        log.close()

    # then
    assert (state / "controller.db").exists()
