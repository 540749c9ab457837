"""The real vLLM under real CRIU: its CPU build, in an environment of its own."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import grpc
import pytest
import pytest_asyncio
import torch
from safetensors.torch import save_file

from dumont.inference.v1 import inference_pb2
from dumont.model_host.v1 import model_host_service_pb2 as pb2
from dumont.rpc.status import from_rpc_error
from snapshotd.model import Snapshot, State
from tests.node.node_under_test import NodeUnderTest, refused

pytestmark = [pytest.mark.node, pytest.mark.vllm, pytest.mark.asyncio(loop_scope="module")]

RANK = 8
QUESTION = inference_pb2.ChatMessage(
    role="user", content="What is the capital of France? Answer in one sentence."
)


@dataclass
class Answer:
    """One answer as its caller saw it."""

    text: str = ""
    tokens: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    finish: inference_pb2.Finish = field(default_factory=inference_pb2.Finish)


async def ask(
    node: NodeUnderTest, instance: str, *, seconds: float | None = None, **fields: Any
) -> list[Answer]:
    """All answers to a request, whose caller gives up after some seconds."""
    answers = [Answer() for _ in range(fields.get("n", 1))]
    async with node.model_host(instance) as stub:
        async for response in stub.Generate(pb2.GenerateRequest(**fields), timeout=seconds):
            if response.HasField("finish"):
                answers[response.finish.index].finish = response.finish
                continue
            answer = answers[response.chunk.index]
            answer.text += response.chunk.text
            answer.tokens += response.chunk.token_ids
            answer.logprobs += [one.logprob for one in response.chunk.logprobs]
    return answers


async def embed(node: NodeUnderTest, instance: str, *texts: str) -> list[list[float]]:
    async with node.model_host(instance) as stub:
        response = await stub.Embed(pb2.EmbedRequest(inputs=texts))
        return [list(one.values) for one in response.embeddings]


async def running(node: NodeUnderTest, instance: str) -> int:
    """How many answers are under way."""
    host = node.instances._record(instance).host
    assert host is not None
    return int((await host.call("status", 10.0))["running"])


async def idle(node: NodeUnderTest, instance: str) -> None:
    """Wait until nothing is under way any more."""
    for _ in range(500):
        if not await running(node, instance):
            return
        await asyncio.sleep(0.02)
    raise AssertionError(f"{instance} still computes")


def under_test(tmp: Path, model: Path, vllm: Path, **options: Any) -> NodeUnderTest:
    return NodeUnderTest(tmp, model, engine="vllm", engine_python=f"vllm={vllm}", engine_options=options)


def write_adapter(model: Path, folder: Path) -> Path:
    """A LoRA adapter of random weights for a Llama model."""
    config = json.loads((model / "config.json").read_text())
    size = config["hidden_size"]
    torch.manual_seed(0)
    weights = {}
    for layer in range(config["num_hidden_layers"]):
        name = f"base_model.model.model.layers.{layer}.self_attn.q_proj"
        weights[f"{name}.lora_A.weight"] = torch.randn(RANK, size) * 0.1
        weights[f"{name}.lora_B.weight"] = torch.randn(size, RANK) * 0.1
    folder.mkdir()
    save_file(weights, folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text(
        json.dumps(
            {
                "peft_type": "LORA",
                "task_type": "CAUSAL_LM",
                "r": RANK,
                "lora_alpha": 2 * RANK,
                "lora_dropout": 0.0,
                "bias": "none",
                "target_modules": ["q_proj"],
                "base_model_name_or_path": str(model),
            }
        )
    )
    return folder


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def node(
    criu: Path, vllm: Path, instruct_model: Path, tmp_path_factory: pytest.TempPathFactory
) -> AsyncIterator[NodeUnderTest]:
    made = under_test(tmp_path_factory.mktemp("vllm"), instruct_model, vllm, max_num_seqs=32)
    yield made
    await made.close()


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def snapshot(node: NodeUnderTest) -> Snapshot:
    """A snapshot of an instance that is gone; ``node.answer`` is what it answered."""
    await node.start("source")
    captured = await node.instances.capture("source", "first")
    node.answer = await node.generate("source")
    node.source_pid = node.instances.get("source").pid
    await node.instances.stop("source")
    return captured


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def restored(node: NodeUnderTest, snapshot: Snapshot) -> str:
    """An instance that was restored after its source had ended."""
    await node.restore("restored", snapshot)
    return "restored"


async def test_a_dead_process_comes_back_and_answers_the_same(
    node: NodeUnderTest, snapshot: Snapshot, restored: str
) -> None:
    assert not Path(f"/proc/{node.source_pid}").exists()
    assert node.instances.get(restored).state is State.SERVING
    assert len(node.answer) > 2
    assert await node.generate(restored) == node.answer


async def test_the_answer_is_that_of_the_model(node: NodeUnderTest, restored: str) -> None:
    [answer] = await ask(node, restored, messages=[QUESTION], max_new_tokens=40)

    assert "Paris" in answer.text
    assert not answer.text.startswith(" ")
    assert answer.finish.reason == inference_pb2.FINISH_REASON_END
    assert answer.finish.usage.output_tokens == len(answer.tokens)


async def test_two_replicas_answer_the_same_and_draw_differently(
    node: NodeUnderTest, snapshot: Snapshot
) -> None:
    await asyncio.gather(node.restore("twin-a", snapshot), node.restore("twin-b", snapshot))

    answers = await asyncio.gather(*(node.generate(name) for name in ("twin-a", "twin-b") for _ in range(4)))
    one, other = await asyncio.gather(node.draws("twin-a"), node.draws("twin-b"))
    free = [
        (await ask(node, name, prompt="The sea is", max_new_tokens=12, temperature=1.0))[0].tokens
        for name in ("twin-a", "twin-b")
    ]

    assert answers == [node.answer] * 8
    assert [name for name in one if one[name] == other[name]] == []
    assert free[0] != free[1]
    await node.instances.stop("twin-a")
    await node.instances.stop("twin-b")


async def test_a_restored_instance_can_be_captured_and_restored_again(
    node: NodeUnderTest, snapshot: Snapshot
) -> None:
    await node.restore("again", snapshot)
    second = await node.instances.capture("again", "second")
    await node.instances.stop("again")

    await node.restore("grandchild", second)

    assert await node.generate("grandchild") == node.answer
    await node.instances.stop("grandchild")


async def test_a_parked_instance_goes_on(node: NodeUnderTest, restored: str) -> None:
    await node.instances.park(restored)
    await node.instances.resume(restored)

    assert await node.generate(restored) == node.answer


async def test_an_instance_that_a_prompt_has_reached_is_not_captured(
    node: NodeUnderTest, restored: str
) -> None:
    await node.generate(restored)

    failure = await refused(node.instances.capture(restored, "late"))

    assert failure.reason == "INSTANCE_SERVED"
    assert await node.generate(restored) == node.answer


async def test_many_callers_are_answered_side_by_side(node: NodeUnderTest, restored: str) -> None:
    asked = [
        asyncio.create_task(ask(node, restored, prompt=f"Tale {number}:", max_new_tokens=24, ignore_eos=True))
        for number in range(40)  # more than are computed at a time
    ]
    most = 0
    while not all(task.done() for task in asked):
        most = max(most, await running(node, restored))
        await asyncio.sleep(0.02)

    answers = [answer for task in asked for answer in task.result()]
    assert [len(answer.tokens) for answer in answers] == [24] * 40
    assert most == 32
    await idle(node, restored)


async def test_a_cancelled_call_ends_and_the_other_goes_on(node: NodeUnderTest, restored: str) -> None:
    stays = asyncio.create_task(ask(node, restored, prompt="One", max_new_tokens=60, ignore_eos=True))
    async with node.model_host(restored) as stub:
        call = stub.Generate(pb2.GenerateRequest(prompt="Two", max_new_tokens=4000, ignore_eos=True))
        async for _ in call:
            break
        call.cancel()

    [answer] = await stays
    assert len(answer.tokens) == 60
    await idle(node, restored)


async def test_a_call_ends_at_its_deadline(node: NodeUnderTest, restored: str) -> None:
    with pytest.raises(grpc.aio.AioRpcError) as ended:
        await ask(node, restored, seconds=1.0, prompt="On", max_new_tokens=4000, ignore_eos=True)

    assert ended.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED
    await idle(node, restored)


async def test_stop_strings_and_stop_tokens_end_an_answer_and_are_not_part_of_it(
    node: NodeUnderTest, restored: str
) -> None:
    [whole] = await ask(node, restored, messages=[QUESTION], max_new_tokens=40)
    [by_text] = await ask(node, restored, messages=[QUESTION], max_new_tokens=40, stop=["Paris"])
    [by_token] = await ask(
        node, restored, messages=[QUESTION], max_new_tokens=40, stop_token_ids=[whole.tokens[3]]
    )

    assert by_text.text == whole.text.partition("Paris")[0]
    assert by_token.tokens == whole.tokens[:3]
    assert {by_text.finish.reason, by_token.finish.reason} == {inference_pb2.FINISH_REASON_STOP}


async def test_a_seed_repeats_an_answer_and_each_of_n_is_another(node: NodeUnderTest, restored: str) -> None:
    fields: dict[str, Any] = {"prompt": "The sea is", "max_new_tokens": 12, "temperature": 1.0}
    several = await ask(node, restored, seed=3, n=3, **fields)
    again = await ask(node, restored, seed=3, n=3, **fields)
    [second_alone] = await ask(node, restored, seed=4, **fields)

    assert [answer.tokens for answer in several] == [answer.tokens for answer in again]
    assert len({tuple(answer.tokens) for answer in several}) == 3
    assert second_alone.tokens == several[1].tokens


async def test_every_sampling_field_has_its_effect(node: NodeUnderTest, restored: str) -> None:
    prompt: dict[str, Any] = {"prompt": "The sea is", "max_new_tokens": 4, "ignore_eos": True}
    [plain] = await ask(node, restored, logprobs=2, **prompt)
    banned = plain.tokens[0]
    [biased] = await ask(node, restored, logit_bias={banned: -100.0}, **prompt)
    [narrow] = await ask(node, restored, temperature=2.0, top_k=1, **prompt)
    [nucleus] = await ask(node, restored, temperature=2.0, top_p=1e-6, **prompt)
    [likely] = await ask(node, restored, temperature=2.0, min_p=1.0, **prompt)
    [varied] = await ask(
        node, restored, repetition_penalty=2.0, presence_penalty=2.0, frequency_penalty=2.0, **prompt
    )
    first = plain.tokens[0]
    [least] = await ask(node, restored, stop_token_ids=[first], min_new_tokens=4, **prompt)

    assert len(plain.logprobs) == 4
    assert all(value <= 0 for value in plain.logprobs)
    assert biased.tokens[0] != banned
    assert narrow.tokens == nucleus.tokens == likely.tokens == plain.tokens
    assert len(set(varied.tokens)) == 4
    assert first not in least.tokens


async def test_a_prompt_that_began_before_is_not_computed_again(node: NodeUnderTest, restored: str) -> None:
    prompt = "All of this is said twice. " * 60
    [first] = await ask(node, restored, prompt=prompt, max_new_tokens=2)
    [second] = await ask(node, restored, prompt=prompt, max_new_tokens=2)

    assert first.finish.usage.cached_prompt_tokens == 0
    assert second.finish.usage.cached_prompt_tokens > 0
    assert second.tokens == first.tokens


async def test_a_prompt_that_is_too_long_is_refused_by_name(node: NodeUnderTest, restored: str) -> None:
    with pytest.raises(grpc.aio.AioRpcError) as failed:
        await ask(node, restored, prompt="again and " * 5000)

    failure = from_rpc_error(failed.value)
    assert failure.reason == "PROMPT_TOO_LONG"
    assert await node.generate(restored) == node.answer


async def test_a_process_that_is_killed_in_mid_answer_leaves_nothing(
    node: NodeUnderTest, snapshot: Snapshot
) -> None:
    await node.restore("victim", snapshot)
    host = node.instances._record("victim").host
    assert host is not None

    async def follow() -> None:
        async with node.model_host("victim") as stub:
            request = pb2.GenerateRequest(prompt="On", max_new_tokens=4000, ignore_eos=True)
            async for _ in stub.Generate(request):
                with contextlib.suppress(ProcessLookupError):
                    os.kill(host.pid, signal.SIGKILL)

    with pytest.raises(grpc.aio.AioRpcError) as ended:
        await follow()

    assert ended.value.code() is grpc.StatusCode.UNAVAILABLE
    await node.instances.stop("victim")
    assert not (node.state_dir / "instances" / "victim").exists()


async def test_an_option_that_vllm_refuses_is_named(
    criu: Path, vllm: Path, instruct_model: Path, tmp_path: Path
) -> None:
    made = under_test(tmp_path, instruct_model, vllm, quantization="modelopt_fp4")
    try:
        failure = await refused(made.start("refused"))
    finally:
        await made.close()

    assert (failure.reason, failure.field) == ("OPTION_REFUSED", "engine_options")


async def test_a_kv_cache_without_room_for_one_prompt_is_refused(
    criu: Path, vllm: Path, instruct_model: Path, tmp_path: Path
) -> None:
    made = under_test(tmp_path, instruct_model, vllm, kv_cache_memory_bytes=4 << 20, max_model_len=8192)
    try:
        failure = await refused(made.start("refused"))
    finally:
        await made.close()

    assert failure.reason == "ENGINE_MEMORY"


async def test_embeddings_are_the_same_after_a_restore_and_those_of_the_other_engine(
    criu: Path, vllm: Path, embedding_model: Path, tmp_path: Path
) -> None:
    texts = ("A dog barks.", "A hound makes a noise, and somebody writes about it at length.", "Taxes")
    made = under_test(tmp_path, embedding_model, vllm)
    try:
        await made.start("source")
        captured = await made.instances.capture("source", "vectors")
        before = await embed(made, "source", *texts)
        await made.instances.stop("source")

        await made.restore("back", captured)
        after = await embed(made, "back", *texts)

        made.engine, made.engine_options = "", {}
        await made.start("ours")
        ours = await embed(made, "ours", *texts)
    finally:
        await made.close()

    assert after == before
    for vector, other in zip(before, ours, strict=True):
        assert sum(a * b for a, b in zip(vector, other, strict=True)) > 0.99


async def test_an_adapter_takes_part_in_every_answer_and_comes_back(
    node: NodeUnderTest, restored: str, vllm: Path, instruct_model: Path, tmp_path: Path
) -> None:
    adapter = write_adapter(instruct_model, tmp_path / "adapter")
    made = under_test(
        tmp_path / "node", instruct_model, vllm, lora_modules={"mine": str(adapter)}, max_lora_rank=RANK
    )
    try:
        await made.start("source")
        captured = await made.instances.capture("source", "adapted")
        adapted = await ask(made, "source", prompt="The sea is", max_new_tokens=4, logprobs=0)
        await made.instances.stop("source")

        await made.restore("back", captured)
        back = await ask(made, "back", prompt="The sea is", max_new_tokens=4, logprobs=0)
    finally:
        await made.close()
    plain = await ask(node, restored, prompt="The sea is", max_new_tokens=4, logprobs=0)

    assert back == adapted
    assert abs(plain[0].logprobs[0] - adapted[0].logprobs[0]) > 0.1
