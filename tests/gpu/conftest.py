"""Nodes on real GPUs, over each backend."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path
from typing import Literal

import pytest
import pytest_asyncio

from dumont.errors import DumontError
from snapshotd.adapters.cuda import backend as cuda_backend
from snapshotd.config import Settings
from snapshotd.model import Snapshot
from tests.conftest import require
from tests.gpu.gpu_node import GpuNode, comes_back_to, used
from tests.helpers.models import make_model

WEIGHT_BUDGET = 2 << 30


@pytest.fixture(scope="session")
def gpu_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of random weights that fits any GPU."""
    return make_model(tmp_path_factory.mktemp("models") / "random")


@pytest.fixture(scope="module", params=["driver", "cli"])
def backend(request: pytest.FixtureRequest) -> Literal["driver", "cli"]:
    """Each way of driving CUDA that is here."""
    name: Literal["driver", "cli"] = request.param
    try:
        cuda_backend.choose(name, Settings().cuda_checkpoint)
    except DumontError as error:
        require(False, error.message)
    return name


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def node(
    criu: Path, gpu_model: Path, backend: Literal["driver", "cli"], tmp_path_factory: pytest.TempPathFactory
) -> AsyncIterator[GpuNode]:
    under_test = GpuNode(
        tmp_path_factory.mktemp("node"), gpu_model, WEIGHT_BUDGET, device="auto", cuda_backend=backend
    )
    await under_test.open_loader()
    yield under_test
    await under_test.close()


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def snapshot(node: GpuNode) -> Snapshot:
    """A snapshot of an instance that is gone; ``node.answer`` is what it answered."""
    before = used()
    instance = await node.start("source", gpu="0")
    assert instance.device.startswith("cuda"), "the model did not load on the GPU"
    captured = await node.instances.capture("source", "first")
    node.answer = await node.generate("source")
    assert len(node.answer) > 2
    node.source_pid = instance.pid
    await node.instances.stop("source")
    await comes_back_to(before)
    return captured


@pytest_asyncio.fixture(loop_scope="module")
async def memory(node: GpuNode, snapshot: Snapshot) -> AsyncIterator[list[int]]:
    """Bytes in use on each GPU when the test began; when it has ended there must be no more."""
    await node.stop_all()
    held, before = await node.remains(), used()
    yield before
    await node.stop_all()
    await comes_back_to(before)
    assert await node.remains() == held
