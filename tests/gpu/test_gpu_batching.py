"""Many callers of one model on a GPU: each is answered as if alone, whatever becomes of the process."""

from __future__ import annotations

import asyncio
import os
import random
from dataclasses import dataclass, field
from typing import Any

import grpc
import pytest

from dumont.model_host.v1 import model_host_service_pb2 as pb2
from dumont.model_host.v1 import model_host_service_pb2_grpc as pb2_grpc
from snapshotd.model import Snapshot, State
from tests.gpu.gpu_node import GpuNode, comes_back_to

pytestmark = [pytest.mark.gpu, pytest.mark.node, pytest.mark.asyncio(loop_scope="module")]

SEED = 20261128
REQUESTS = 64
# Natural logarithm: tokens that are so nearly equally likely may change places when rounding differs. This
# model's logits are bfloat16 and up to 32 large: two neighbouring ones are 0.125 apart.
NEARLY = 0.125


@dataclass
class Answer:
    """Tokens, and at the place of each its log-probability and those of the likeliest."""

    tokens: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    tops: list[dict[int, float]] = field(default_factory=list)
    status: grpc.StatusCode | None = None


async def ask(node: GpuNode, instance: str, timeout: float | None = None, **fields: Any) -> Answer:
    """One caller, on its own connection to the model host."""
    answer = Answer()
    directory = os.open(node.node.instance_directory(instance), os.O_PATH)
    try:
        async with grpc.aio.insecure_channel(f"unix:/proc/self/fd/{directory}/host.sock") as channel:
            stub: pb2_grpc.ModelHostServiceAsyncStub = pb2_grpc.ModelHostServiceStub(channel)
            async for message in stub.Generate(pb2.GenerateRequest(**fields), timeout=timeout):
                answer.tokens += message.chunk.token_ids
                for token in message.chunk.logprobs:
                    answer.logprobs.append(token.logprob)
                    answer.tops.append({top.token_id: top.logprob for top in token.top})
    except grpc.aio.AioRpcError as error:
        answer.status = error.code()
    finally:
        os.close(directory)
    return answer


def requests() -> list[dict[str, Any]]:
    """Prompts of 1 to some hundred tokens, answers of 1 to 64."""
    chance = random.Random(SEED)
    made = []
    for number in range(REQUESTS):
        length = round(1 + (chance.random() ** 3) * 300)
        prompt = f"{number} " + "".join(chance.choice("abcdefgh ") for _ in range(length))
        made.append({"prompt": prompt, "max_new_tokens": chance.randint(1, 64), "ignore_eos": True})
    return made


async def all_at_once(node: GpuNode, instance: str, asked: list[dict[str, Any]]) -> list[Answer]:
    """All requests together, among others that are cancelled, expire or stop."""
    noise = [
        asyncio.ensure_future(
            ask(node, instance, timeout=0.001 * number + 0.002, max_new_tokens=400, prompt="n")
        )
        for number in range(16)
    ]
    for number, task in enumerate(noise[::2]):
        asyncio.get_running_loop().call_later(0.004 * number, task.cancel)
    answers = await asyncio.gather(*(ask(node, instance, **fields) for fields in asked))
    await asyncio.gather(*noise, return_exceptions=True)
    return list(answers)


def check_same(alone: list[Answer], together: list[Answer]) -> int:
    """Assert that answers are equal up to a first difference that rounding explains; how many differ."""
    differ = 0
    for one, other in zip(alone, together, strict=True):
        assert other.status is None
        assert len(one.tokens) == len(other.tokens)
        for place, (expected, token) in enumerate(zip(one.tokens, other.tokens, strict=True)):
            if expected != token:
                differ += 1
                assert token in one.tops[place], f"token {token} is not among the likeliest"
                assert one.tops[place][expected] - one.tops[place][token] <= NEARLY
                break
    return differ


async def test_many_at_once_are_answered_as_each_alone_through_every_sleep(
    node: GpuNode, snapshot: Snapshot, memory: list[int]
) -> None:
    # given what each is answered alone
    await node.restore("busy", snapshot)
    asked = requests()
    alone = [await ask(node, "busy", logprobs=20, **fields) for fields in asked]
    assert all(answer.status is None for answer in alone)

    # when all ask at once, then park and resume in the middle of it, three times
    for _ in range(3):
        check_same(alone, await all_at_once(node, "busy", asked))
        await node.instances.park("busy")
        await node.instances.resume("busy")
        assert node.instances.get("busy").state is State.SERVING
    check_same(alone, await all_at_once(node, "busy", asked))

    # and when another process is restored from the same snapshot and both are busy
    await node.restore("twin", snapshot, gpu="0")
    both = await asyncio.gather(all_at_once(node, "busy", asked), all_at_once(node, "twin", asked))
    for answers in both:
        check_same(alone, answers)
    await node.instances.stop("busy")
    await node.instances.stop("twin")
    await comes_back_to(memory)


async def test_a_park_in_the_middle_of_answers_lets_them_end_first(
    node: GpuNode, snapshot: Snapshot, memory: list[int]
) -> None:
    await node.restore("drained", snapshot)
    asked: list[dict[str, Any]] = [
        {"prompt": f"p{number}", "max_new_tokens": 60, "ignore_eos": True} for number in range(32)
    ]
    alone = [await ask(node, "drained", logprobs=20, **fields) for fields in asked]
    busy = asyncio.ensure_future(asyncio.gather(*(ask(node, "drained", **fields) for fields in asked)))
    await asyncio.sleep(0.05)

    await node.instances.park("drained")

    answers = await busy
    whole = [(one, other) for one, other in zip(alone, answers, strict=True) if other.status is None]
    # Whoever came too late was told to come again; nobody was cut short.
    assert all(other.status in (None, grpc.StatusCode.UNAVAILABLE) for other in answers)
    assert whole
    check_same([one for one, _ in whole], [other for _, other in whole])
    await node.instances.resume("drained")
    assert await node.answers("drained")


async def test_draws_repeat_by_seed_beside_others_and_after_a_sleep(
    node: GpuNode, snapshot: Snapshot, memory: list[int]
) -> None:
    await node.restore("drawn", snapshot)
    fields: dict[str, Any] = {
        "prompt": "once",
        "max_new_tokens": 24,
        "temperature": 0.9,
        "top_p": 0.95,
        "ignore_eos": True,
    }
    first = await ask(node, "drawn", seed=7, **fields)
    again, other, unseeded = await asyncio.gather(
        ask(node, "drawn", seed=7, **fields),
        ask(node, "drawn", seed=8, **fields),
        ask(node, "drawn", **fields),
    )
    # Beside others the logits may round differently, so that later tokens may differ; the first few do not.
    assert again.tokens[:4] == first.tokens[:4]
    assert len({tuple(answer.tokens) for answer in (first, other, unseeded)}) == 3

    await node.instances.park("drawn")
    await node.instances.resume("drawn")
    assert (await ask(node, "drawn", seed=7, **fields)).tokens == first.tokens


async def test_every_way_to_choose_a_token_is_that_of_its_definition(
    node: GpuNode, snapshot: Snapshot, memory: list[int]
) -> None:
    await node.restore("choosy", snapshot)
    plain = await ask(node, "choosy", prompt="w", max_new_tokens=8, logprobs=5, ignore_eos=True)
    best = plain.tokens[0]
    second = sorted(plain.tops[0].items(), key=lambda item: -item[1])[1][0]

    async def first(**fields: Any) -> int:
        return (await ask(node, "choosy", prompt="w", max_new_tokens=1, ignore_eos=True, **fields)).tokens[0]

    # One token is left to draw from, however it is said.
    assert await first(temperature=1.0, top_k=1) == best
    assert await first(temperature=1.0, top_p=1e-6) == best
    assert await first(temperature=1.0, min_p=1.0) == best
    # A bias that is larger than all differences decides; so does one that takes a token away.
    assert await first(logit_bias={second: 100.0}) == second
    assert await first(logit_bias={best: -100.0}) == second
    # Drawn from two, both come up, and nothing else does.
    drawn = {await first(temperature=1.0, top_k=2, seed=number) for number in range(24)}
    assert drawn == {best, second}
    # A token that was given is hardly given again when that costs as much as may be asked.
    unlike = await ask(
        node, "choosy", prompt="w", max_new_tokens=16, ignore_eos=True,
        presence_penalty=2.0, frequency_penalty=2.0, repetition_penalty=10.0,
    )  # fmt: skip
    assert len(set(unlike.tokens)) >= 12
    # Log-probabilities are those of a distribution, and the chosen one's is that of the list.
    for place, token in enumerate(plain.tokens):
        assert plain.logprobs[place] == pytest.approx(plain.tops[place][token], abs=2e-2)
        assert all(logprob <= 0 for logprob in plain.tops[place].values())
