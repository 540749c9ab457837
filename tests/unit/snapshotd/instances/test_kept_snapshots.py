"""An instance keeps the files of the snapshot that it maps, from before its restore until it is gone."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from pathlib import Path

import pytest

from dumont.errors import DumontError
from tests.unit.snapshotd.instances.gpu_world import GpuHost, World, a_snapshot, a_world

ON_CPU = a_snapshot(device="cpu", gpus=(), gpu="", compatibility={"weights": "digest"})


@pytest.fixture
def world(tmp_path: Path) -> World:
    return a_world(tmp_path)


async def test_it_keeps_them_until_it_is_stopped(world: World) -> None:
    await world.restored("one", ON_CPU)
    await world.restored("two", ON_CPU)
    assert world.store.pins == {"one": "first", "two": "first"}

    await world.instances.stop("one")
    assert world.store.pins == {"two": "first"}


async def test_it_keeps_them_before_they_are_fetched(world: World) -> None:
    kept = {}

    async def fetch() -> None:
        kept.update(world.store.pins)

    await world.restored("one", ON_CPU, fetch=fetch)
    assert kept == {"one": "first"}


async def test_a_restore_that_fails_lets_them_go(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    take_one = world.hosts.take

    async def take() -> GpuHost:
        host = await take_one()
        host.failing.add("wake")
        return host

    monkeypatch.setattr(world.hosts, "take", take)
    with pytest.raises(DumontError):
        await world.restored("one", ON_CPU)
    assert world.store.pins == {}


async def test_a_refused_restore_keeps_nothing(world: World) -> None:
    with pytest.raises(DumontError):
        await world.restored("one", replace(ON_CPU, quarantine_reason="its canary was wrong"))
    assert world.store.pins == {}


async def test_an_instance_whose_process_ends_by_itself_lets_them_go(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    await world.restored("one", ON_CPU)
    released = asyncio.Event()
    unpin = world.store.unpin

    async def told(owner: str) -> None:
        await unpin(owner)
        released.set()

    monkeypatch.setattr(world.store, "unpin", told)
    world.host.lost.set()
    await released.wait()
    assert world.store.pins == {}
