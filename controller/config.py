"""Settings: flags, then ``DUMONT_CONTROLLER_*``, then a TOML file, then the defaults."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from pydantic import Field
from pydantic_settings import (
    BaseSettings,
    CliImplicitFlag,
    CliSettingsSource,
    PydanticBaseSettingsSource,
    SettingsConfigDict,
    TomlConfigSettingsSource,
)

from controller.instances import YIELD_SECONDS
from controller.queue import DEFAULT_LENGTH
from dumont.errors import InvalidArgument

PREFIX = "DUMONT_CONTROLLER_"


class Config(BaseSettings):
    """The controller: deployments, start modes, routing and expiry."""

    model_config = SettingsConfigDict(
        env_prefix=PREFIX, extra="forbid", frozen=True, cli_kebab_case=True, cli_prog_name="dumont-controller"
    )

    config: Path | None = Field(default=None, description="TOML file with any of these settings")
    listen: str = Field(default="127.0.0.1:7070", description="host:port or unix:path to serve on")
    advertise: str = Field(
        default="", description="host:port where the other controllers of the database reach this one"
    )
    insecure: CliImplicitFlag[bool] = Field(
        default=False, description="serve in plain text on addresses other machines reach"
    )
    database: str = Field(default="", description="SQLAlchemy URL; empty: SQLite in the state directory")
    state_dir: Path = Field(
        default=Path("~/.local/state/dumont/controller"),
        description="directory for the controller's own files",
    )
    controller_id: str = Field(
        default="",
        pattern=r"^([a-z0-9][a-z0-9-]{0,62})?$",
        description="replace the lost controller of this id, which its nodes report",
    )
    accept_database: CliImplicitFlag[bool] = Field(
        default=False,
        description="use the database although it is empty or not that of the last start; "
        "nothing that it does not know is deleted",
    )
    lease_seconds: float = Field(
        default=10.0,
        ge=0.5,
        le=3600,
        description="of several controllers on PostgreSQL, one that is silent for so long is replaced",
    )
    metrics_listen: str = Field(
        default="", pattern=r"^(.*:\d{1,5})?$", description="host:port of the Prometheus page; empty: none"
    )
    heartbeat_seconds: float = Field(
        default=5.0,
        gt=0,
        le=3600,
        description="seconds between heartbeats of a node; after three missing ones it is unreachable",
    )
    max_new_tokens: int = Field(
        default=4096, gt=0, le=1_000_000, description="the most tokens that one answer may have"
    )
    max_queue: int = Field(
        default=DEFAULT_LENGTH, gt=0, le=100_000, description="requests that may wait for one deployment"
    )
    yield_seconds: float = Field(
        default=YIELD_SECONDS,
        ge=0,
        le=3600,
        description="seconds that an instance which makes room for a higher priority answers its requests",
    )
    prune_seconds: float = Field(
        default=21600.0,
        ge=0,
        le=31_536_000,
        description="between two prunings of each object store by one of its nodes; 0: none but by hand",
    )
    rebalance: CliImplicitFlag[bool] = Field(
        default=True, description="bring idle instances from crowded GPUs to emptier ones"
    )
    drain_seconds: float = Field(
        default=30.0, ge=0, le=3600, description="seconds that running calls get at SIGTERM"
    )
    log_format: Literal["json", "console"] = Field(default="json", description="how logs are written")
    log_level: str = Field(
        default="info", pattern="^(debug|info|warning|error)$", description="how much is logged"
    )

    @property
    def shared(self) -> bool:
        """Whether several controllers may use the database."""
        return self.database_url.startswith("postgresql")

    def reached_at(self, bound: str) -> str:
        """Where the other controllers of the database reach this one, which listens on ``bound``.

        Raises:
            InvalidArgument: ADVERTISE_MISSING, it listens on all addresses, and does not say on which one.
        """
        everywhere = bound.rpartition(":")[0] in ("0.0.0.0", "[::]", "::")
        if self.shared and everywhere and not self.advertise:
            raise InvalidArgument(
                "ADVERTISE_MISSING",
                f"controllers that share a database must reach each other, and this one listens on {bound}; "
                "set --advertise (DUMONT_CONTROLLER_ADVERTISE) to an address that the others can connect to",
                field="advertise",
            )
        return self.advertise or bound

    @property
    def database_url(self) -> str:
        """The registry's URL."""
        path = self.state_dir.expanduser() / "controller.db"
        return self.database or f"sqlite+aiosqlite:///{path.absolute()}"

    @property
    def database_file(self) -> Path | None:
        """The registry's SQLite file, wherever links lead to it; None: it is not in a file."""
        scheme, _, rest = self.database_url.partition(":///")
        path = rest.partition("?")[0]
        return Path(path).resolve() if scheme.startswith("sqlite") and path not in ("", ":memory:") else None


def load(arguments: Sequence[str]) -> Config:
    """Read the settings; ``arguments`` are the command line without the program's name.

    Raises:
        InvalidArgument: INVALID_CONFIG, a value or the file is wrong.
        SystemExit: ``--help``, or an unknown flag.
    """

    class Sourced(Config):
        @classmethod
        def settings_customise_sources(
            cls,
            settings_cls: type[BaseSettings],
            init_settings: PydanticBaseSettingsSource,
            env_settings: PydanticBaseSettingsSource,
            dotenv_settings: PydanticBaseSettingsSource,
            file_secret_settings: PydanticBaseSettingsSource,
        ) -> tuple[PydanticBaseSettingsSource, ...]:
            flags: CliSettingsSource[Any] = CliSettingsSource(settings_cls, cli_parse_args=list(arguments))
            file = _file(arguments)
            sources: tuple[PydanticBaseSettingsSource, ...] = (flags, env_settings)
            return (*sources, TomlConfigSettingsSource(settings_cls, file)) if file else sources

    Sourced.__doc__ = Config.__doc__
    try:
        return Sourced()
    except (ValueError, OSError) as error:
        raise InvalidArgument("INVALID_CONFIG", f"the configuration is wrong: {error}") from error


def _file(arguments: Sequence[str]) -> Path | None:
    chosen = os.environ.get(f"{PREFIX}CONFIG", "")
    for number, argument in enumerate(arguments):
        flag, _, value = argument.partition("=")
        if flag == "--config":
            chosen = value or (arguments[number + 1] if number + 1 < len(arguments) else "")
    if not chosen:
        return None
    path = Path(chosen).expanduser()
    if not path.is_file():
        raise FileNotFoundError(2, "there is no such file", str(path))
    return path
