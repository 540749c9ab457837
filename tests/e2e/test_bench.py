"""``dumont bench`` as a user runs it: every case on a tiny model, with real CRIU."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from dumont.benchmarks.results import CASES
from tests.conftest import require

pytestmark = pytest.mark.node

BENCH = [sys.executable, "-m", "dumont.cli.main", "bench", "--config", "qwen3-tiny", "--rounds", "1"]


@pytest.fixture(scope="module")
def bench(criu: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], Path, str]:
    """What one whole run printed as JSON, the directory that it wrote to, and what it told meanwhile."""
    require(find_spec("matplotlib") is not None, "matplotlib is not installed; run scripts/setup")
    directory = tmp_path_factory.mktemp("bench")
    (directory / "scratch").mkdir()
    done = subprocess.run(
        [
            *BENCH, "--json", "--directory", str(directory / "scratch"),
            "--plot", str(directory / "bench.png"), "--output", str(directory / "bench.json"),
        ],
        capture_output=True,
        text=True,
        check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    return json.loads(done.stdout), directory, done.stderr


@pytest.fixture(scope="module")
def rows(bench: tuple[dict[str, Any], Path, str]) -> dict[str, dict[str, Any]]:
    """The rows by their case."""
    return {row["case"]: row for row in bench[0]["rows"]}


def test_every_case_is_measured_and_consists_of_its_phases(rows: dict[str, dict[str, Any]]) -> None:
    assert tuple(rows) == CASES
    for case, row in rows.items():
        assert row["model"] == "qwen3-tiny"
        assert 0 < row["seconds"]["min"] <= row["seconds"]["median"] <= row["seconds"]["max"]
        # One round: its phases are all that it took.
        assert sum(row["phases"].values()) == pytest.approx(row["seconds"]["median"], abs=0.02), case
        assert row["ratios"].keys() == {"plain_cold", "stock"} - {case}


def test_each_case_takes_the_way_that_it_is_named_after(rows: dict[str, dict[str, Any]]) -> None:
    assert {
        case: set(rows[case]["phases"]) for case in ("plain_cold", "plain_cold_after_imports", "stock")
    } == {
        "plain_cold": {"imports", "load", "first_token"},
        "plain_cold_after_imports": {"load", "first_token"},
        "stock": {"criu", "first_token"},
    }
    assert {"launch", "load", "load.import_torch"} <= rows["cold"]["phases"].keys()
    assert {"criu", "canary", "wake"} <= rows["local"]["phases"].keys()
    assert "thaw" in rows["parked"]["phases"]


def test_images_and_pauses_are_told_where_there_are_any(rows: dict[str, dict[str, Any]]) -> None:
    assert 0 < rows["local"]["stored_bytes"] < rows["local"]["image_bytes"]
    assert rows["stock"]["image_bytes"] > 0
    assert rows["stock"]["capture_phases"].keys() == {"dump"}
    assert rows["local"]["source_pause"]["median"] > 0
    assert rows["parked"]["park"]["median"] > 0
    assert rows["cold"]["image_bytes"] is None


def test_the_machine_and_the_run_are_described(bench: tuple[dict[str, Any], Path, str]) -> None:
    document = bench[0]
    assert {"cpu", "kernel", "python", "torch", "transformers", "criu", "dumont"} <= document[
        "machine"
    ].keys()
    assert document["command"][:2] == ["dumont", "bench"]
    assert document["rounds"] == 1


def test_file_and_picture_are_written_and_the_table_is_told_beside_the_json(
    bench: tuple[dict[str, Any], Path, str],
) -> None:
    document, directory, told = bench
    assert json.loads((directory / "bench.json").read_text()) == document
    assert (directory / "bench.png").read_bytes().startswith(b"\x89PNG\r\n")
    assert "plain ÷" in told


def test_nothing_is_left(bench: tuple[dict[str, Any], Path, str]) -> None:
    scratch = bench[1] / "scratch"
    assert list(scratch.iterdir()) == []
    assert processes_naming(scratch) == []


def test_a_bench_that_is_ended_ends_what_it_has_started(criu: Path, tmp_path: Path) -> None:
    command = [*BENCH, "--cases", "local", "--directory", str(tmp_path)]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        assert any("starting snapshotd" in line for line in process.stderr)
        process.send_signal(signal.SIGTERM)
        process.stderr.read()
    assert process.returncode == 130
    assert list(tmp_path.iterdir()) == []
    assert processes_naming(tmp_path) == []


def test_many_callers_are_measured_on_every_path_and_after_a_wake(criu: Path, tmp_path: Path) -> None:
    require(find_spec("matplotlib") is not None, "matplotlib is not installed; run scripts/setup")
    scratch, output, plot = tmp_path / "scratch", tmp_path / "serving.json", tmp_path / "serving.png"
    scratch.mkdir()
    done = subprocess.run(
        [
            *BENCH, "--serve", "--engines", "dumont,generate", "--streams", "1,3", "--wake", "5",
            "--prompt-tokens", "6", "--answer-tokens", "4", "--json", "--directory", str(scratch),
            "--output", str(output), "--plot", str(plot),
        ],
        capture_output=True,
        text=True,
        check=False,
    )  # fmt: skip

    assert done.returncode == 0, done.stdout + done.stderr
    rows = json.loads(done.stdout)["rows"]
    assert [(row["engine"], row["path"], row["streams"]) for row in rows] == [
        ("dumont", "services", 1), ("dumont", "services", 3),
        ("dumont", "direct", 1), ("dumont", "direct", 3),
        ("dumont", "services", 5),
        ("generate", "direct", 1), ("generate", "direct", 3),
    ]  # fmt: skip
    for row in rows:
        assert row["failed"] == {}
        assert row["tokens_per_s"] > 0
        assert 0 < row["first_token"]["p50"] <= row["first_token"]["p99"]
    assert rows[4]["tiers"] == {"local": 5}
    assert json.loads(output.read_text())["rows"] == rows
    assert plot.read_bytes().startswith(b"\x89PNG\r\n")
    assert list(scratch.iterdir()) == []
    assert processes_naming(scratch) == []


def test_the_way_of_a_token_is_measured(criu: Path, tmp_path: Path) -> None:
    done = subprocess.run(
        [*BENCH, "--relay", "--streams", "2", "--json", "--directory", str(tmp_path)],
        capture_output=True,
        text=True,
        check=False,
    )

    assert done.returncode == 0, done.stdout + done.stderr
    one_by_one, loaded, *_ = json.loads(done.stdout)["rows"]
    assert one_by_one["first"]["p50"] > 0
    assert (loaded["path"], loaded["streams"], loaded["asked_per_s"]) == ("services", 2, 100)
    assert loaded["messages_per_s"] > 0
    assert loaded["cpu_per_message"].keys() == {"controller", "snapshotd", "model host", "client"}
    assert list(tmp_path.iterdir()) == []


def test_memory_is_watched_under_requests_of_every_kind(criu: Path, tmp_path: Path) -> None:
    done = subprocess.run(
        [*BENCH, "--mixed", "--minutes", "0.3", "--streams", "3", "--json", "--directory", str(tmp_path)],
        capture_output=True,
        text=True,
        check=False,
    )

    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads(done.stdout)
    assert found["outcomes"]["OK"] > 0
    assert found["failed"] == {}
    assert (found["probe_answers"], found["instances"]) == (1, 1)
    assert found["memory"].keys() >= {"controller", "snapshotd", "instance"}
    assert list(tmp_path.iterdir()) == []


def processes_naming(directory: Path) -> list[str]:
    """The processes in whose arguments a directory occurs, by pid."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            if os.fsencode(directory) in path.read_bytes():
                found.append(path.parent.name)
        except OSError:
            continue
    return found
