"""Fixtures of the controller's unit tests."""

from __future__ import annotations

from collections.abc import AsyncIterator

import pytest

from tests.unit.controller.controller_world import World


@pytest.fixture
async def world() -> AsyncIterator[World]:
    made = World()
    await made.boot()
    yield made
    made.nodes.release_all()
    await made.controller.close()
