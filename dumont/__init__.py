"""Serve models that sleep for free and wake in about a second.

    deployment = dumont.deploy("HuggingFaceTB/SmolLM2-135M-Instruct")
    print(deployment.generate("The capital of France is"))

Importing this loads the errors only; gRPC is imported when the client is first used.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from dumont.errors import (
    Aborted,
    AlreadyExists,
    Cancelled,
    DataLoss,
    DeadlineExceeded,
    DumontError,
    FailedPrecondition,
    Internal,
    InvalidArgument,
    NotFound,
    PermissionDenied,
    ResourceExhausted,
    Unauthenticated,
    Unavailable,
)

if TYPE_CHECKING:
    __version__: str
    from dumont.client import AsyncClient, AsyncDeployment
    from dumont.stream import AsyncTextStream
    from dumont.sync import Client, Deployment, TextStream, deploy
    from dumont.types import (
        Answer,
        Capacity,
        CheckpointSettings,
        DeploymentInfo,
        Explanation,
        Finding,
        Generation,
        Instance,
        Load,
        Node,
        NodeGpu,
        NodeModel,
        Phase,
        Piece,
        Pruned,
        Remainder,
        Snapshot,
        SnapshotFile,
        SnapshotProgress,
        StartCandidate,
        StartInfo,
        StartProgress,
        StoredSnapshot,
        TokenLogprob,
        TopLogprob,
        Usage,
    )

__all__ = [
    "Aborted",
    "AlreadyExists",
    "Answer",
    "AsyncClient",
    "AsyncDeployment",
    "AsyncTextStream",
    "Cancelled",
    "Capacity",
    "CheckpointSettings",
    "Client",
    "DataLoss",
    "DeadlineExceeded",
    "Deployment",
    "DeploymentInfo",
    "DumontError",
    "Explanation",
    "FailedPrecondition",
    "Finding",
    "Generation",
    "Instance",
    "Internal",
    "InvalidArgument",
    "Load",
    "Node",
    "NodeGpu",
    "NodeModel",
    "NotFound",
    "PermissionDenied",
    "Phase",
    "Piece",
    "Pruned",
    "Remainder",
    "ResourceExhausted",
    "Snapshot",
    "SnapshotFile",
    "SnapshotProgress",
    "StartCandidate",
    "StartInfo",
    "StartProgress",
    "StoredSnapshot",
    "TextStream",
    "TokenLogprob",
    "TopLogprob",
    "Unauthenticated",
    "Unavailable",
    "Usage",
    "deploy",
]

_HOMES = {
    "AsyncClient": "dumont.client",
    "AsyncDeployment": "dumont.client",
    "AsyncTextStream": "dumont.stream",
    "Client": "dumont.sync",
    "Deployment": "dumont.sync",
    "TextStream": "dumont.sync",
    "deploy": "dumont.sync",
}


def __getattr__(name: str) -> Any:
    if name == "__version__":
        from importlib.metadata import version

        return version("dumont")
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_HOMES.get(name, "dumont.types")), name)


def __dir__() -> list[str]:
    return __all__
