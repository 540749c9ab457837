"""Tables on narrow terminals: something has to go, but never a name, a state or the reason of a failure."""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import replace
from datetime import UTC, datetime

import pytest
from rich.console import Console

from dumont import types
from dumont.cli import deployments, instances, nodes, snapshots
from dumont.cli.output import PIPE_WIDTH, Columns, table

LONG = "a-deployment-name"
INSTANCE = types.Instance(
    name=f"instances/{LONG}-66f20c3a7d0a", deployment=f"deployments/{LONG}", node="nodes/gpu-node-9cd76a",
    state="capturing", pid=4194303, device="NVIDIA H200", memory_bytes=2**34,
    snapshot=f"snapshots/{LONG}-27bdb209ae70", create_time=datetime.now(UTC), last_use_time=None, phases=(),
    failure_reason="HOST_DIED", failure_message="its process ended by itself: ended by SIGKILL, and the last "
    "line of its log is: CUDA out of memory", capacity=types.Capacity(128, 183296),
    load=types.Load(1, 0, 100), in_flight=12,
)  # fmt: skip
DEPLOYMENT = types.DeploymentInfo(
    f"deployments/{LONG}", "", "HuggingFaceTB/SmolLM2-135M-Instruct-with-more", "causal_lm", "checkpoint",
    types.CheckpointSettings(True, 3600, "local", "detached"), 300, 600, "degraded", "", None, None,
    datetime.now(UTC),
)  # fmt: skip
SNAPSHOT = types.Snapshot(
    f"snapshots/{LONG}-27bdb209ae70", f"deployments/{LONG}", "nodes/gpu-node-9cd76a", "m", "quarantined",
    datetime.now(UTC), datetime.now(UTC), None, 2**30, 0.1, {}, (), "", "", True, True, None, orphan=True,
)  # fmt: skip
NODE = types.Node(
    "nodes/gpu-node-with-a-long-name-9cd76a", "gpu-node.example:7071", "unreachable", "0.1.0",
    ("NVIDIA H200 NVL", "NVIDIA H200 NVL"), 2**37, 2**36, 16, True, datetime.now(UTC), (), "", 2**30, 2**34,
)  # fmt: skip


def drawn(columns: Columns, cells: Sequence[str], width: int) -> str:
    file = io.StringIO()
    Console(file=file, width=width, highlight=False, markup=False).print(table(columns, [cells], width))
    return file.getvalue()


@pytest.mark.parametrize("width", [80, 60, PIPE_WIDTH])
@pytest.mark.parametrize(
    ("columns", "cells", "kept"),
    [
        (instances.COLUMNS, instances.cells(INSTANCE), [f"{LONG}-66f20c3a7d0a", "capturing"]),
        (deployments.COLUMNS, deployments.cells(DEPLOYMENT), [LONG, "degraded"]),
        (snapshots.COLUMNS, snapshots.cells(SNAPSHOT), [f"{LONG}-27bdb209ae70", "quarantined, orphan"]),
        (nodes.COLUMNS, nodes.cells(NODE), ["gpu-node-with-a-long-name-9cd76a", "unreachable"]),
    ],
    ids=["ps", "ls", "snapshot ls", "node ls"],
)
def test_a_table_keeps_names_and_states_whole(
    columns: Columns, cells: tuple[str, ...], kept: list[str], width: int
) -> None:
    shown = drawn(columns, cells, width)

    assert "…" not in shown
    assert max(len(line.rstrip()) for line in shown.splitlines()) <= width
    for text in kept:
        assert text in shown
    assert "STATE" in shown.splitlines()[0]


def test_the_reason_of_a_failure_is_folded_not_cut() -> None:
    shown = drawn(instances.COLUMNS, instances.cells(INSTANCE), 80)
    words = " ".join(line[-30:] for line in shown.splitlines()).split()
    assert {"SIGKILL,", "CUDA", "memory"} <= set(words)


def test_a_pipe_gets_every_column() -> None:
    header = drawn(instances.COLUMNS, instances.cells(INSTANCE), PIPE_WIDTH).splitlines()[0]
    assert header.split() == " ".join(instances.COLUMNS.headers).split()


def test_columns_go_in_the_order_that_was_said() -> None:
    columns = Columns(("NAME", "STATE", "NODE", "AGE"), drop=("AGE", "NODE"))
    row = ("one", "ready", "node-a", "5m")
    assert columns.shown([row], 40) == ([0, 1, 2, 3], True)
    assert columns.shown([row], 20) == ([0, 1, 2], True)
    assert columns.shown([row], 5) == ([0, 1], False)


def test_what_must_stay_and_does_not_fit_is_folded() -> None:
    shown = drawn(snapshots.COLUMNS, snapshots.cells(SNAPSHOT), 40)
    assert "quarantined, orphan" in shown
    assert "".join(line[:19].strip() for line in shown.splitlines()[1:]) == f"{LONG}-27bdb209ae70"


def test_an_instance_that_cannot_batch_says_why() -> None:
    slow = replace(INSTANCE, failure_message="", capacity=types.Capacity(64, None, "it looks ahead"))

    assert instances.cells(slow)[-1] == "computes one answer at a time: it looks ahead"
    assert instances.cells(INSTANCE)[-1] == INSTANCE.failure_message
