"""Stop: end an instance."""

from __future__ import annotations

from snapshotd.executor import Step
from snapshotd.jobs import moves
from snapshotd.node import Node, Subject


def stop(node: Node, subject: Subject) -> list[Step]:
    """End an instance and remove what it left."""

    async def release() -> None:
        await moves.release(subject)
        node.weights.release(subject.instance.id)
        await node.store.release(subject.instance.id)

    return [
        Step("release", release),
        Step("directory", lambda: moves.remove_directory(node, subject.instance)),
    ]
