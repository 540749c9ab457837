"""Stop: end an instance."""

from __future__ import annotations

from snapshotd.jobs import actions
from snapshotd.jobs.context import Node, Subject
from snapshotd.jobs.executor import Step


def stop(node: Node, subject: Subject) -> list[Step]:
    """The steps of a stop: end the process, unpin its files and remove its directory."""

    async def release() -> None:
        await actions.release(subject)
        node.weights.unpin(subject.instance.id)
        await node.store.unpin(subject.instance.id)

    return [
        Step("release", release),
        Step("directory", lambda: actions.remove_directory(node, subject.instance)),
    ]
