"""vLLM on a GPU: compiled or eager, it sleeps and comes back with the tokens that vLLM itself says."""

from __future__ import annotations

import asyncio
import json
import subprocess
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import pytest_asyncio

from dumont.benchmarks import configs
from snapshotd.model import Snapshot
from tests.gpu.gpu_node import GpuNode, comes_back_to, used

pytestmark = [
    pytest.mark.gpu, pytest.mark.node, pytest.mark.vllm, pytest.mark.asyncio(loop_scope="module"),
]  # fmt: skip

WEIGHT_BUDGET = 4 << 30
PROMPTS = tuple(f"Tale {number} begins" for number in range(4))
STREAMS = 32
# As generate of NodeUnderTest asks: six greedy tokens.
OWN = """
import json, os, sys
os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
from importlib.util import find_spec
if find_spec("flashinfer") is None:
    os.environ["VLLM_USE_FLASHINFER_SAMPLER"] = "0"
from vllm import LLM, SamplingParams
model, prompts, options = json.loads(sys.argv[1])
said = LLM(model=model, kv_cache_memory_bytes=2 << 30, max_model_len=2048, **options)
params = SamplingParams(temperature=0, max_tokens=6)
tokens = [said.generate([prompt], params, use_tqdm=False)[0].outputs[0].token_ids for prompt in prompts]
print("TOKENS", json.dumps([list(one) for one in tokens]))
"""


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("models") / "qwen3-0.6b"
    configs.build("qwen3-0.6b", place)
    return place


@pytest.fixture(scope="module", params=[True, False], ids=["eager", "compiled"])
def eager(request: pytest.FixtureRequest) -> bool:
    return bool(request.param)


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def node(
    criu: Path, vllm: Path, model: Path, eager: bool, tmp_path_factory: pytest.TempPathFactory
) -> AsyncIterator[GpuNode]:
    under_test = GpuNode(
        tmp_path_factory.mktemp("node"), model, WEIGHT_BUDGET, device="auto", engine="vllm",
        engine_python=f"vllm={vllm}",
        engine_options={"enforce_eager": eager, "kv_cache_memory_bytes": 2 << 30, "max_num_seqs": STREAMS},
    )  # fmt: skip
    await under_test.open_loader()
    yield under_test
    await under_test.close()


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def own(vllm: Path, model: Path, eager: bool) -> list[list[int]]:
    """What vLLM's own ``generate`` answers, alone in a process."""
    asked = json.dumps([str(model), PROMPTS, {"enforce_eager": eager}])
    command = [str(vllm), "-c", OWN, asked]
    done = await asyncio.to_thread(subprocess.run, command, capture_output=True, text=True, check=False)
    line = next((line for line in done.stdout.splitlines() if line.startswith("TOKENS ")), None)
    assert line is not None, done.stderr[-2000:]
    tokens: list[list[int]] = json.loads(line.removeprefix("TOKENS "))
    return tokens


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def snapshot(node: GpuNode, own: list[list[int]]) -> Snapshot:
    """A snapshot of an instance that is gone."""
    before = used()
    instance = await node.start("source", gpu="0")
    assert instance.device == "cuda:0"
    captured = await node.instances.capture("source", "first")
    assert await answers(node, "source") == own
    await node.instances.stop("source")
    await comes_back_to(before)
    return captured


async def answers(node: GpuNode, instance: str) -> list[list[int]]:
    """Its answers to all prompts, one after the other."""
    return [await node.generate(instance, prompt) for prompt in PROMPTS]


async def traffic(node: GpuNode, *instances: str) -> list[list[int]]:
    """Answers to many callers at once."""
    return await asyncio.gather(
        *(node.generate(instances[number % len(instances)], f"Call {number}") for number in range(STREAMS))
    )


async def test_a_dead_process_comes_back_with_the_tokens_of_vllm_itself(
    node: GpuNode, snapshot: Snapshot, own: list[list[int]]
) -> None:
    for number in range(3):
        await node.restore(f"back-{number}", snapshot)
        assert await answers(node, f"back-{number}") == own
        await node.instances.stop(f"back-{number}")


async def test_sleep_and_death_follow_each_other_in_any_order(
    node: GpuNode, snapshot: Snapshot, own: list[list[int]]
) -> None:
    # given: one that was restored, parked three times, and captured again before anybody asked it
    await node.restore("parked", snapshot)
    for _ in range(3):
        await node.instances.park("parked")
        await node.instances.resume("parked")
    second = await node.instances.capture("parked", "second")
    await node.instances.stop("parked")

    # when
    await node.restore("grandchild", second)
    assert await answers(node, "grandchild") == own
    for _ in range(3):
        await node.instances.park("grandchild")
        await node.instances.resume("grandchild")

        # then
        assert await answers(node, "grandchild") == own
    await node.instances.stop("grandchild")


async def test_a_parked_instance_holds_no_memory_of_the_gpu(node: GpuNode, snapshot: Snapshot) -> None:
    before = used()
    await node.restore("idle", snapshot)

    await node.instances.park("idle")

    await comes_back_to(before)
    await node.instances.stop("idle")


async def test_two_replicas_serve_many_callers_side_by_side(
    node: GpuNode, snapshot: Snapshot, own: list[list[int]]
) -> None:
    await asyncio.gather(node.restore("twin-a", snapshot), node.restore("twin-b", snapshot))

    said = await traffic(node, "twin-a", "twin-b")

    assert [len(one) for one in said] == [6] * STREAMS
    assert await answers(node, "twin-a") == await answers(node, "twin-b") == own
    await node.stop_all()
