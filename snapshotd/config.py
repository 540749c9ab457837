"""Settings of snapshotd: flags, then ``DUMONT_SNAPSHOTD_*`` in the environment, then a TOML file."""

from __future__ import annotations

import os
import socket
from pathlib import Path
from typing import Literal

from pydantic import Field, SecretStr
from pydantic_settings import (
    BaseSettings,
    CliImplicitFlag,
    PydanticBaseSettingsSource,
    SettingsConfigDict,
    TomlConfigSettingsSource,
)

from snapshotd.system.paths import cache_directory

CONFIG_VARIABLE = "DUMONT_SNAPSHOTD_CONFIG"


class Settings(BaseSettings):
    """The settings of snapshotd."""

    model_config = SettingsConfigDict(
        env_prefix="DUMONT_SNAPSHOTD_",
        cli_kebab_case=True,
        cli_prog_name="dumont-snapshotd",
        frozen=True,
        extra="forbid",
    )

    state_dir: Path = Field(Path("/var/lib/dumont/snapshotd"), description="state; private to root")
    listen: str = Field("127.0.0.1:7071", description="host:port or unix:path")
    controller: str = Field(
        "",
        description="controller to register with, or all that share a database: a:7070,b:7070; empty: none",
    )
    accept_controller: CliImplicitFlag[bool] = Field(
        False, description="belong to that controller, though this node belongs to another one"
    )
    advertise: str = Field(
        "", description="endpoint at which the controller reaches this node; empty: as --listen"
    )
    node_id: str = Field("", description="empty: the host's name and a number kept in the state directory")
    models_dir: Path = Field(
        default_factory=lambda: cache_directory() / "models", description="the node's models"
    )
    models_bytes: int | None = Field(
        None,
        ge=0,
        description="bytes that models fetched from the hub may take; beyond it the least recently used are "
        "deleted, unless instances run them; unset: half of their file system; 0: no limit",
    )
    cache_dir: Path | None = Field(
        None, description="the node's own snapshots, on disk or tmpfs; unset: in the state directory"
    )
    cache_bytes: int | None = Field(
        None,
        ge=0,
        description="bytes they may take; beyond it the least recently used are deleted, published ones "
        "first; unset: a quarter of their file system, or nine tenths of one of their own; 0: no limit",
    )
    disk_reserve_bytes: int | None = Field(
        None,
        ge=0,
        description="bytes of a disk that captures and fetches leave free for other uses; unset: a fiftieth "
        "of it, at most 1 GiB",
    )
    weight_cache_bytes: int | None = Field(
        None,
        ge=0,
        description="memory for the weights of running models; unset: two fifths of it all on a node that "
        "uses GPUs, else none; 0: none, weights are mapped from the models' own files",
    )
    weight_loader: CliImplicitFlag[bool] = Field(
        True,
        description="keep a process that brings cached weights to GPUs; its context takes 254 MiB of each "
        "once weights are cached",
    )
    store_url: str = Field(
        "", description="object store: s3://BUCKET/PREFIX or file:///DIRECTORY; empty: none"
    )
    store_grace_seconds: float = Field(
        86400.0, ge=0, description="younger chunks are never pruned; the same on all nodes of a store"
    )
    s3_endpoint: str = Field(
        default_factory=lambda: os.environ.get("S3_ENDPOINT", ""),
        description="http://HOST:PORT or https://HOST; unset: S3_ENDPOINT",
    )
    s3_access_key: str = Field(
        default_factory=lambda: os.environ.get("S3_ACCESS_KEY", ""), description="unset: S3_ACCESS_KEY"
    )
    s3_secret_key: SecretStr = Field(
        default_factory=lambda: SecretStr(os.environ.get("S3_SECRET_KEY", "")),
        description="better in the environment than among flags; unset: S3_SECRET_KEY",
    )
    s3_region: str = Field(
        default_factory=lambda: os.environ.get("S3_REGION", "us-east-1"), description="unset: S3_REGION"
    )
    s3_ca_file: Path | None = Field(None, description="PEM certificates that the endpoint's may be signed by")
    encryption_key_file: Path | None = Field(
        None, description="32 bytes, as hex or raw, that chunks are encrypted under; unset: not encrypted"
    )
    encrypt_local: CliImplicitFlag[bool] = Field(
        False,
        description="encrypt the node's own snapshots too; while they are used they are in memory, plain",
    )
    trusted_keys_file: Path | None = Field(
        None, description="public keys of the nodes whose snapshots are restored here, one a line"
    )
    device: Literal["auto", "cpu"] = Field(
        "auto", description="where models run; auto: a GPU if there is one"
    )
    cuda_backend: Literal["auto", "driver", "cli"] = Field(
        "auto",
        description="how CUDA processes are suspended; driver: a process that holds the driver; "
        "cli: cuda-checkpoint; auto: the first of these that is here",
    )
    cuda_checkpoint: Path | None = Field(
        default_factory=lambda: _path(os.environ.get("DUMONT_CUDA_CHECKPOINT", "")),
        description="the cuda-checkpoint program; unset: DUMONT_CUDA_CHECKPOINT, else the one on the PATH",
    )
    threads: int = Field(
        default_factory=lambda: len(os.sched_getaffinity(0)),
        ge=1,
        description="threads of store workers; unset: one for each core that snapshotd may use",
    )
    host_memory_bytes: int | None = Field(
        None,
        ge=0,
        description="bytes of memory that one model host may take before it is ended; unset: nine tenths of "
        "all; 0: no limit",
    )
    instance_memory_bytes: int | None = Field(
        None,
        ge=0,
        description="bytes of memory that all instances may take together, by which the controller places "
        "them; unset: nine tenths of what the weight cache leaves; 0: no limit",
    )
    parked_memory_bytes: int | None = Field(
        None,
        ge=0,
        description="of these, what parked instances may take, beyond which the least useful ones end; "
        "unset: half; 0: no limit",
    )
    host_threads: int = Field(0, ge=0, description="compute threads of a model host; 0: one for each core")
    engine_python: str = Field(
        "",
        description="interpreters of engines that run under their own, by comma: "
        "vllm=/opt/vllm/bin/python; an engine that is not named: the one of 'dumont engine install', if any",
    )
    max_queue: int = Field(64, ge=1, description="requests that one model host holds before it refuses more")
    max_new_tokens: int = Field(4096, ge=1, description="largest max_new_tokens of a request")
    start_timeout_seconds: float = Field(
        1800.0,
        gt=0,
        description="seconds that a start or a restore may take, including downloads",
    )
    heartbeat_seconds: float = Field(5.0, gt=0)
    drain_seconds: float = Field(
        30.0,
        ge=0,
        description="seconds for running calls to end, at SIGTERM and before a park; ten seconds later the "
        "daemon ends, even if something hangs",
    )
    metrics_listen: str = Field("", description="host:port of the Prometheus page; empty: none")
    log_format: Literal["json", "console"] = "json"
    failpoints: str = Field("", description="for rehearsing faults: step=error or step=exit, by comma")
    stop_instances_on_exit: CliImplicitFlag[bool] = Field(
        False, description="end all instances at exit, instead of leaving them to the next snapshotd"
    )

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        """Read flags first, then the environment, then the TOML file."""
        file = TomlConfigSettingsSource(settings_cls, toml_file=os.environ.get(CONFIG_VARIABLE))
        return init_settings, env_settings, file


def node_id(settings: Settings) -> str:
    """The node's id: as configured, else made once and kept in the state directory."""
    if settings.node_id:
        return settings.node_id
    path = settings.state_dir / "node_id"
    if not path.exists():
        host = "".join(letter if letter.isalnum() else "-" for letter in socket.gethostname().lower()).strip(
            "-"
        )
        path.write_text(f"node-{host[:40].rstrip('-') or 'local'}-{os.urandom(3).hex()}")
    return path.read_text()


def _path(text: str) -> Path | None:
    return Path(text) if text else None
