"""The README's tour, typed as it stands: in a clone, with the default ports, one block after the other."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.conftest import MODELS

pytestmark = [pytest.mark.node, pytest.mark.timeout(300)]

ROOT = Path(__file__).resolve().parents[2]
SERVING_SECONDS = 90
# Ports are the tour's own in a network of its own, as is the home directory. `sudo` is not needed by root.
IN_A_NETWORK = ("unshare", "--net", "--mount-proc", "--pid", "--fork", "bash", "-ec")


def tour() -> list[tuple[str, str]]:
    """The blocks of the section, each with its language."""
    section = (ROOT / "README.md").read_text().partition("## A short tour\n")[2].partition("\n## ")[0]
    return re.findall(r"```(\w+)\n(.*?)```", section, re.DOTALL)


@pytest.fixture
def clone(tmp_path: Path) -> Iterator[Path]:
    """A clone that is set up as ``scripts/setup`` does, with the packages of this environment."""
    clone = tmp_path / "clone"
    subprocess.run(["git", "clone", "-q", ROOT, clone], check=True)
    # What is to be tested is what lies here, committed or not.
    changed = subprocess.run(
        ["git", "ls-files", "-mo", "--exclude-standard"], cwd=ROOT, check=True, capture_output=True, text=True
    )
    for name in changed.stdout.split():
        if (ROOT / name).exists():
            (clone / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, clone / name)
    environment = clone / ".venv"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", environment], check=True)
    (site,) = environment.glob("lib/python*/site-packages")
    packages = next(path for path in sys.path if path.endswith("site-packages"))
    (site / "dumont.pth").write_text(f"{clone}\n{packages}\n")
    for program in ("dumont", "grpcurl"):
        script = (Path(sys.executable).with_name(program)).read_bytes()
        first, _, rest = script.partition(b"\n")
        target = environment / "bin" / program
        target.write_bytes(f"#!{environment}/bin/python\n".encode() + rest if b"python" in first else script)
        target.chmod(0o755)
    subprocess.run([environment / "bin/python", "proto/generate.py"], cwd=clone, check=True)
    yield clone
    shutil.rmtree(clone)


def test_the_tour_works_as_it_is_typed(criu: Path, instruct_model: Path, clone: Path, tmp_path: Path) -> None:
    # given: the blocks of the tour; the first sets up, which the fixture has done, and runs the services
    (first, services), *rest = tour()
    assert first == "bash"
    setup, up = services.splitlines()
    assert setup == "sudo scripts/setup"
    script = ["ip link set lo up", f"cd {clone}", f"{up.removeprefix('sudo ')} > {tmp_path}/up.log 2>&1 &"]
    script.append(
        f"timeout {SERVING_SECONDS} sh -c 'until grep -q dumont.run {tmp_path}/up.log; do sleep 0.2; done'"
    )

    # when: the others are typed in a second terminal
    for number, (language, block) in enumerate(rest):
        if language == "python":
            (clone / "tour.py").write_text(block)
            block = "python tour.py\n"
        script.append(f"echo '=== {number}'\n{block}")
    script.append("kill %1; wait %1")
    ended = subprocess.run(
        [*IN_A_NETWORK, "\n".join(script)],
        env={
            "PATH": os.environ["PATH"].replace(f"{Path(sys.executable).parent}:", ""),
            "HOME": str(tmp_path / "home"),
            "DUMONT_CACHE": str(MODELS.parent),
            "TMPDIR": str(tmp_path),
        },
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=280,
        check=False,
    )

    # then: each does what it is there for
    log = (tmp_path / "up.log").read_text() if (tmp_path / "up.log").exists() else ""
    assert ended.returncode == 0, f"{ended.stdout}\n{ended.stderr}\n{log}"
    asked, python, shell, grpc, _ = re.split(r"=== \d\n", ended.stdout)[1:]
    assert "Paris" in asked
    assert "serving" in asked
    assert "Paris" in python
    assert shell.count("Paris") == 2
    assert "local in" in ended.stderr
    assert "dumont.controller.v1.DeploymentService" in grpc
    assert '"name": "deployments/france"' in grpc
    assert "Paris" in grpc
    # and `up` says how to go on
    assert "export DUMONT_ENDPOINT=127.0.0.1:7070" in log


def test_set_up_ends_with_the_commands_of_the_tour() -> None:
    """The last words of ``scripts/setup``, which is not run here, are those that the tour goes on with."""
    words = (ROOT / "scripts/setup").read_text()
    (_, services), (_, terminal), *_ = tour()
    assert services.splitlines()[1].removeprefix("sudo ") in words
    export, run, *_ = terminal.splitlines()
    assert export.replace("$PATH", "\\$PATH") in words
    assert run.partition('"')[0].strip() in words
