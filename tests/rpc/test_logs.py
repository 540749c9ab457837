"""What is logged may be lost; whoever logs it goes on."""

from __future__ import annotations

import errno
import io

import pytest
import structlog

from dumont.rpc.logs import configure_logs


class FullDisk(io.StringIO):
    tried = 0

    def write(self, text: str) -> int:
        self.tried += 1
        raise OSError(errno.ENOSPC, "No space left on device")


@pytest.fixture(autouse=True)
def unconfigured() -> object:
    yield
    structlog.reset_defaults()


def test_a_log_on_a_full_disk_ends_nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    disk = FullDisk()
    monkeypatch.setattr("sys.stderr", disk)
    configure_logs("json")

    structlog.get_logger("test").error("no room", bytes=1)

    assert disk.tried == 1


def test_a_log_whose_reader_is_gone_ends_nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    closed = io.StringIO()
    closed.close()
    monkeypatch.setattr("sys.stderr", closed)
    configure_logs("json")

    structlog.get_logger("test").error("nobody listens")
