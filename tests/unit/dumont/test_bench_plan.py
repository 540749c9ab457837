"""What a bench refuses before it begins."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest

from dumont.benchmarks import configs, run
from dumont.benchmarks.results import CASES, PLAIN
from dumont.errors import FailedPrecondition, InvalidArgument, NotFound


@pytest.fixture
def able(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine with root and CRIU and without a GPU."""
    monkeypatch.setattr("os.geteuid", lambda: 0)
    monkeypatch.setattr(run, "find_criu", lambda: Path("/usr/sbin/criu"))
    monkeypatch.setattr(run, "has_gpu", lambda: False)


def test_without_a_choice_every_case_is_measured(able: None) -> None:
    plan = run.plan([], ["qwen3-0.6b", "qwen2-7.6b"], [], 3)
    assert plan.cases == CASES
    assert [subject.name for subject in plan.subjects] == ["qwen3-0.6b", "qwen2-7.6b"]
    assert (plan.criu, plan.cuda_checkpoint) == (Path("/usr/sbin/criu"), None)


@pytest.mark.parametrize(("config", "weights"), [("qwen3-0.6b", 0.596e9), ("qwen2-7.6b", 7.615e9)])
def test_a_configuration_has_the_size_in_its_name(config: str, weights: float) -> None:
    taken = configs.weights_bytes(configs.settings_of(config))
    assert taken == pytest.approx(2 * weights, rel=0.002)


def test_a_model_is_a_directory_or_a_name_in_the_cache(
    able: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(run, "models_dir", lambda: tmp_path)
    model = tmp_path / "organisation" / "small"
    model.mkdir(parents=True)
    (model / "model.safetensors").write_bytes(bytes(100))
    plan = run.plan([str(model), "organisation/small"], [], [], 1)
    assert plan.subjects == (run.Subject("small", 100, model),) * 2
    with pytest.raises(NotFound, match="neither a directory nor a model in"):
        run.plan(["organisation/absent"], [], [], 1)


def test_unknown_words_are_refused_with_the_known_ones(able: None) -> None:
    with pytest.raises(InvalidArgument, match=r"plain_cold, .*stock") as refused:
        run.plan([], ["qwen3-tiny"], ["warm"], 1)
    assert refused.value.reason == "UNKNOWN_CASE"
    with pytest.raises(InvalidArgument, match=r"qwen3-0\.6b, qwen2-7\.6b") as refused:
        run.plan([], ["qwen4"], [], 1)
    assert refused.value.reason == "UNKNOWN_CONFIG"


def test_root_is_needed_for_all_but_the_plain_cases(able: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.geteuid", lambda: 1000)
    assert run.plan([], ["qwen3-tiny"], PLAIN, 1).cases == PLAIN
    with pytest.raises(FailedPrecondition, match="need root") as refused:
        run.plan([], ["qwen3-tiny"], ["plain_cold", "parked"], 1)
    assert refused.value.reason == "NOT_ROOT"


def test_on_a_gpu_stock_needs_its_tool_and_the_other_cases_do_not(
    able: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(run, "has_gpu", lambda: True)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert run.plan([], ["qwen3-tiny"], ["local"], 1).cuda_checkpoint is None
    with pytest.raises(FailedPrecondition, match="--cuda-checkpoint") as refused:
        run.plan([], ["qwen3-tiny"], [], 1)
    assert refused.value.reason == "CUDA_CHECKPOINT_NOT_FOUND"
    tool = tmp_path / "cuda-checkpoint"
    tool.write_text("#!/bin/sh\n")
    tool.chmod(0o755)
    assert run.plan([], ["qwen3-tiny"], [], 1).cuda_checkpoint == tool
    assert run.plan([], ["qwen3-tiny"], [], 1, tool).cuda_checkpoint == tool


def test_a_picture_is_refused_before_it_is_too_late(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run, "find_spec", lambda name: None)
    with pytest.raises(FailedPrecondition, match=r"dumont-services\[bench\]") as refused:
        run.check_plot()
    assert refused.value.reason == "MATPLOTLIB_NOT_INSTALLED"


def test_the_workspace_is_where_it_was_asked_for_and_leaves_nothing(tmp_path: Path) -> None:
    with run.workspace(tmp_path, [run.Subject("m", 1)]) as place:
        assert place.parent == tmp_path
        (place / "image").write_text("")
    assert list(tmp_path.iterdir()) == []


def test_a_directory_that_does_not_exist_yet_is_made(tmp_path: Path) -> None:
    with run.workspace(tmp_path / "not" / "yet") as place:
        assert place.parent == tmp_path / "not" / "yet"


def test_a_workspace_where_nothing_can_be_written_is_refused_by_name(tmp_path: Path) -> None:
    (tmp_path / "nowhere").touch()
    with pytest.raises(InvalidArgument, match="nowhere") as refused, run.workspace(tmp_path / "nowhere"):
        pass
    assert (refused.value.reason, refused.value.field) == ("INVALID_DIRECTORY", "directory")


@pytest.mark.parametrize(("available", "in_memory"), [(64 << 30, True), (63 << 30, False)])
def test_the_workspace_is_in_memory_only_where_it_fits(
    available: int, in_memory: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(run, "MEMORY_FILE_SYSTEM", tmp_path)
    monkeypatch.setattr(run, "memory_available", lambda: available)
    monkeypatch.setattr("shutil.disk_usage", lambda path: SimpleNamespace(free=1 << 40))
    with run.workspace(None, [run.Subject("m", 15 << 30)]) as place:
        assert (place.parent == tmp_path) is in_memory


def test_the_engine_and_its_options_are_checked_before_anything_begins(able: None) -> None:
    plan = run.plan([], ["qwen3-tiny"], [], 1, engine="vllm", engine_options={"max_num_seqs": 8.0})
    assert (plan.engine, plan.engine_options) == ("vllm", {"max_num_seqs": 8})
    assert run.label("qwen3-tiny", plan.engine) == "qwen3-tiny (vllm)"
    assert run.label("qwen3-tiny", "") == "qwen3-tiny"
    with pytest.raises(InvalidArgument) as refused:
        run.plan([], ["qwen3-tiny"], [], 1, engine="tgi")
    assert refused.value.reason == "UNKNOWN_ENGINE"
    with pytest.raises(InvalidArgument) as refused:
        run.plan([], ["qwen3-tiny"], [], 1, engine="vllm", engine_options={"tensor_parallel_size": 2})
    assert refused.value.reason == "OPTION_REFUSED"
