"""``dumont logs -f DEPLOYMENT`` goes on with the next instance when one has ended."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import UTC, datetime
from typing import Any

from dumont import types
from dumont.cli.instances import _follow
from dumont.errors import NotFound


def instance(name: str, second: int) -> types.Instance:
    return types.Instance(
        name=f"instances/{name}", deployment="deployments/qa", node="nodes/one", state="serving", pid=1,
        device="cpu", memory_bytes=0, snapshot="", create_time=datetime(2026, 1, 1, 0, 0, second, tzinfo=UTC),
        last_use_time=None, phases=(), failure_reason="", failure_message="", capacity=None,
        load=types.Load(0, 0, 0), in_flight=0,
    )  # fmt: skip


class Recorded:
    """A client whose deployment has an instance, then a newer one, and then no more changes."""

    def __init__(self) -> None:
        self.instances = self.deployments = self
        self.name = "deployments/qa"
        self.tails: list[int] = []
        self.old, self.new = instance("old", 1), instance("new", 2)

    def get(self, name: str) -> Any:
        if name != "qa":
            raise NotFound("X", "none")
        return self

    def watch(self) -> Iterator[list[types.Instance]]:
        yield [self.old]
        yield [self.old]
        yield [self.new, self.old]

    def logs(self, name: str, *, tail: int, follow: bool) -> Iterator[str]:
        self.tails.append(tail)
        if name == "instances/old":
            yield "loading\n"
            yield "ready\n"
            raise NotFound("INSTANCE_NOT_FOUND", "it is gone")


def test_the_next_instance_is_followed_when_one_has_ended() -> None:
    client: Any = Recorded()
    client.get = lambda name: client
    client.instances = type("Instances", (), {"watch": client.watch, "logs": client.logs})()

    def nobody(name: str) -> Any:
        raise NotFound("INSTANCE_NOT_FOUND", "none")

    client.instances.get = nobody
    printed: list[str] = []

    _follow(client, "qa", 5, lambda name, text: printed.append(f"{name}: {text}"), printed.append)

    assert printed == [
        "--- old ---", "instances/old: loading\n", "instances/old: ready\n",
        "--- new ---", "new has printed nothing",
    ]  # fmt: skip
    # The lines of the first are cut as asked; those of the next are all new.
    assert client.tails == [5, 0]
