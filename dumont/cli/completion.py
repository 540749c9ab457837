"""What a shell completes: words of a fixed choice, and names that the controller knows."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Iterable
from typing import Final

import typer

from dumont.cli.output import short
from dumont.client import AsyncClient
from dumont.errors import DumontError

# A person waits for a completion, and gets none rather than wait longer.
SECONDS: Final = 1.0

Completion = Callable[[typer.Context, str], list[str]]


def choices(words: Iterable[str]) -> Completion:
    """Those of ``words`` that begin as what was typed."""
    known = tuple(words)

    def complete(context: typer.Context, incomplete: str) -> list[str]:
        return [word for word in known if word.startswith(incomplete)]

    return complete


async def _deployments(client: AsyncClient) -> list[str]:
    return [deployment.name for deployment in await client.deployments.list()]


async def _instances(client: AsyncClient) -> list[str]:
    return [instance.name for instance in await client.instances.list()]


async def _snapshots(client: AsyncClient) -> list[str]:
    return [snapshot.name for snapshot in await client.snapshots.list()]


async def _nodes(client: AsyncClient) -> list[str]:
    return [node.name for node in await client.nodes.list()]


def _names(*listings: Callable[[AsyncClient], Awaitable[list[str]]]) -> Completion:
    def complete(context: typer.Context, incomplete: str) -> list[str]:
        async def found() -> list[str]:
            async with asyncio.timeout(SECONDS), AsyncClient(context.params.get("endpoint")) as client:
                return [short(name) for listing in listings for name in await listing(client)]

        try:
            return sorted(name for name in asyncio.run(found()) if name.startswith(incomplete))
        except (DumontError, TimeoutError):
            return []

    return complete


deployments: Final = _names(_deployments)
instances: Final = _names(_instances)
targets: Final = _names(_deployments, _instances)
snapshots: Final = _names(_snapshots)
nodes: Final = _names(_nodes)
