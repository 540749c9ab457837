"""Where a setting comes from: flags, then the environment, then the file, then the default."""

from __future__ import annotations

from pathlib import Path

import pytest

from controller.config import Config, load
from dumont.errors import InvalidArgument


@pytest.fixture
def toml(tmp_path: Path) -> Path:
    path = tmp_path / "controller.toml"
    path.write_text('listen = "127.0.0.1:1"\nmax_new_tokens = 7\nheartbeat_seconds = 2.5\n')
    return path


def test_the_nearest_source_wins(toml: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DUMONT_CONTROLLER_LISTEN", "127.0.0.1:2")
    monkeypatch.setenv("DUMONT_CONTROLLER_MAX_NEW_TOKENS", "8")
    settings = load(["--config", str(toml), "--listen", "127.0.0.1:3"])
    assert (settings.listen, settings.max_new_tokens, settings.heartbeat_seconds) == ("127.0.0.1:3", 8, 2.5)
    assert settings.drain_seconds == 30.0


def test_the_file_may_come_from_the_environment(toml: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DUMONT_CONTROLLER_CONFIG", str(toml))
    assert load([]).max_new_tokens == 7


def test_the_database_is_in_the_state_directory_unless_named(tmp_path: Path) -> None:
    assert (
        load(["--state-dir", str(tmp_path)]).database_url == f"sqlite+aiosqlite:///{tmp_path}/controller.db"
    )
    assert load(["--database=postgresql+asyncpg://db/x"]).database_url == "postgresql+asyncpg://db/x"


def test_a_database_file_is_the_same_by_whichever_way_it_is_named(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(tmp_path / "controller.db")

    by_default = load(["--state-dir", str(tmp_path)]).database_file
    by_name = load([f"--database=sqlite+aiosqlite:///{tmp_path}/controller.db?timeout=5"]).database_file
    by_link = load([f"--database=sqlite+aiosqlite:///{tmp_path}/link"]).database_file

    assert by_default == by_name == by_link == tmp_path / "controller.db"
    assert load(["--database=sqlite+aiosqlite:///:memory:"]).database_file is None
    assert load(["--database=postgresql+asyncpg://db/x"]).database_file is None


@pytest.mark.parametrize(
    "arguments",
    [
        ["--max-new-tokens", "0"],
        ["--heartbeat-seconds", "soon"],
        ["--config", "/nowhere.toml"],
        ["--metrics-listen", "x"],
    ],
)
def test_a_wrong_value_is_told(arguments: list[str]) -> None:
    with pytest.raises(InvalidArgument) as failure:
        load(arguments)
    assert failure.value.reason == "INVALID_CONFIG"


def test_an_unknown_key_in_the_file_is_told(tmp_path: Path) -> None:
    path = tmp_path / "typo.toml"
    path.write_text('lisden = "x"\n')
    with pytest.raises(InvalidArgument, match="lisden"):
        load(["--config", str(path)])


def test_a_controller_of_several_says_where_the_others_reach_it() -> None:
    shared = Config(database="postgresql+asyncpg://db/dumont", listen="0.0.0.0:7070")
    with pytest.raises(InvalidArgument) as refusal:
        shared.reached_at("0.0.0.0:7070")
    assert refusal.value.reason == "ADVERTISE_MISSING"
    assert shared.model_copy(update={"advertise": "c1:7070"}).reached_at("0.0.0.0:7070") == "c1:7070"
    assert shared.reached_at("10.0.0.1:7070") == "10.0.0.1:7070"
    assert Config().reached_at("0.0.0.0:7070") == "0.0.0.0:7070"
