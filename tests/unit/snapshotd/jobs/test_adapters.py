"""A LoRA adapter that an engine's options name: checked before a start, and compared at a restore."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

from dumont.errors import FailedPrecondition
from snapshotd.adapters.models import NodeModels
from snapshotd.jobs import actions
from snapshotd.jobs.context import Node
from snapshotd.weights.files import NodeWeightFiles
from tests.unit.snapshotd.instances.instances_world import FakeHosts, a_node


@pytest.fixture
def adapter(tmp_path: Path) -> Path:
    directory = tmp_path / "adapter"
    directory.mkdir()
    (directory / "adapter_config.json").write_text('{"r": 8}')
    save_file({"a": np.zeros(4, np.float32)}, directory / "adapter_model.safetensors")
    return directory


@pytest.fixture
def model(tmp_path: Path) -> Path:
    directory = tmp_path / "model"
    directory.mkdir()
    (directory / "config.json").write_text('{"architectures": ["LlamaForCausalLM"]}')
    save_file({"a": np.zeros(4, np.float32)}, directory / "model.safetensors")
    return directory


@pytest.fixture
def node(tmp_path: Path) -> Node:
    weights = NodeWeightFiles(tmp_path / "weights.json", None)
    return a_node(tmp_path, FakeHosts(), models=NodeModels(tmp_path / "models"), weights=weights)


async def digests(node: Node, model: Path, *adapters: Path) -> dict[str, str]:
    options: dict[str, Any] = {"lora_modules": {f"mine{i}": str(path) for i, path in enumerate(adapters)}}
    found = await node.models.resolve(str(model), "vllm")
    return dict(await actions.digests(node, found, options if adapters else {}))


async def test_every_file_of_an_adapter_is_part_of_what_a_process_has_read(
    node: Node, model: Path, adapter: Path
) -> None:
    without, before = await digests(node, model), await digests(node, model, adapter)
    assert set(before) - set(without) == {"lora_modules/mine0", "lora_modules/mine0/adapter_config.json"}

    (adapter / "adapter_config.json").write_text('{"r": 9}')
    after = await digests(node, model, adapter)
    assert {name for name in before if before[name] != after[name]} == {
        "lora_modules/mine0/adapter_config.json"
    }
    save_file({"a": np.ones(4, np.float32)}, adapter / "adapter_model.safetensors")
    assert (await digests(node, model, adapter))["lora_modules/mine0"] != after["lora_modules/mine0"]


@pytest.mark.parametrize(
    ("file", "content", "said"),
    [
        ("adapter_config.json", None, "adapter_config.json is missing"),
        ("adapter_model.safetensors", None, "adapter_model.safetensors is missing"),
        ("adapter_model.safetensors", b"no weights", "damaged or cut short"),
    ],
)
async def test_what_is_no_adapter_is_refused_by_name(
    node: Node, model: Path, adapter: Path, file: str, content: bytes | None, said: str
) -> None:
    (adapter / file).unlink()
    if content is not None:
        (adapter / file).write_bytes(content)
    with pytest.raises(FailedPrecondition, match=said) as refusal:
        await digests(node, model, adapter)
    assert refusal.value.reason == "MODEL_INVALID"
    assert str(adapter) in refusal.value.message
