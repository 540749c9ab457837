"""The services as a user runs them, shared by the tests of a module."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.e2e.stack import Controller, Stack


@pytest.fixture(scope="module")
def new_stack(
    criu: Path, grpcurl: Path, free_port: Callable[[], int], tmp_path_factory: pytest.TempPathFactory
) -> Callable[[], Stack]:
    """A function that prepares services with a state directory and ports of their own."""
    return lambda: Stack(tmp_path_factory.mktemp("up"), free_port(), free_port(), grpcurl)


@pytest.fixture(scope="module")
def stack(new_stack: Callable[[], Stack]) -> Iterator[Stack]:
    """Running services that the tests of a module share."""
    with new_stack() as running:
        yield running


@pytest.fixture
def controller(criu: Path, free_port: Callable[[], int], tmp_path: Path) -> Iterator[Controller]:
    running = Controller(f"127.0.0.1:{free_port()}", tmp_path / "controller")
    yield running
    running.close()
