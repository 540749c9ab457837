"""Many callers of one model host at once, and whether each is answered as if it were alone."""

from __future__ import annotations

import asyncio
import os
import random
from dataclasses import dataclass, field
from typing import Any

import grpc

from dumont.model_host.v1 import model_host_service_pb2 as pb2
from dumont.model_host.v1 import model_host_service_pb2_grpc as pb2_grpc
from tests.node.node_under_test import NodeUnderTest

SEED = 20261128
REQUESTS = 64
LONGEST = 3900
# Every prompt begins with it.
MARKER = "zq-marker-7f3a"
# Natural logarithm: tokens that are so nearly equally likely may change places when rounding differs. The
# models' logits are bfloat16 and up to 32 large: two neighbouring ones are 0.125 apart.
NEARLY = 0.125
# Seconds for which a caller asks again while the instance sleeps, as the controller does for its callers.
PATIENCE = 60.0


@dataclass
class Answer:
    """Tokens, and at the place of each its log-probability and those of the likeliest."""

    tokens: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    tops: list[dict[int, float]] = field(default_factory=list)
    status: grpc.StatusCode | None = None


async def ask(node: NodeUnderTest, instance: str, timeout: float | None = None, **fields: Any) -> Answer:
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


async def ask_until_it_serves(node: NodeUnderTest, instance: str, **fields: Any) -> Answer:
    """The same, again as long as the instance is away and nothing has come."""
    end = asyncio.get_running_loop().time() + PATIENCE
    while True:
        answer = await ask(node, instance, **fields)
        away = answer.status is grpc.StatusCode.UNAVAILABLE and not answer.tokens
        if not away or asyncio.get_running_loop().time() > end:
            return answer
        await asyncio.sleep(0.05)


def requests(count: int = REQUESTS, longest: int = LONGEST) -> list[dict[str, Any]]:
    """Prompts of a few to ``longest`` tokens, one for each byte, most of them short; answers of 1 to 64. Some
    have a stop token that comes up sooner or later.
    """
    chance = random.Random(SEED)
    made: list[dict[str, Any]] = []
    for number in range(count):
        length = round(1 + (chance.random() ** 4) * (longest - 20))
        prompt = f"{MARKER}{number} " + "".join(chance.choice("abcdefgh ") for _ in range(length))
        asked = {"prompt": prompt, "max_new_tokens": chance.randint(1, 64), "ignore_eos": True}
        if number % 8 == 1:
            asked["stop_token_ids"] = chance.sample(range(2048), 32)
        made.append(asked)
    made[0]["prompt"] = "x"
    return made


async def all_at_once(node: NodeUnderTest, instance: str, asked: list[dict[str, Any]]) -> list[Answer]:
    """All requests together, among others that are cancelled, expire or are refused."""
    noise = [
        asyncio.ensure_future(
            ask(node, instance, timeout=0.001 * number + 0.002, max_new_tokens=400, prompt="n")
        )
        for number in range(16)
    ]
    for number, task in enumerate(noise[::2]):
        asyncio.get_running_loop().call_later(0.004 * number, task.cancel)
    noise += [asyncio.ensure_future(ask(node, instance, prompt="y" * 100_000)) for _ in range(2)]
    answers = await asyncio.gather(*(ask_until_it_serves(node, instance, **fields) for fields in asked))
    await asyncio.gather(*noise, return_exceptions=True)
    return list(answers)


def check_same(alone: list[Answer], together: list[Answer]) -> int:
    """Assert that answers are equal up to a first difference that rounding explains; how many differ."""
    differ = 0
    for one, other in zip(alone, together, strict=True):
        assert other.status is None
        places = zip(one.tokens, other.tokens, strict=False)
        first = next((place for place, (a, b) in enumerate(places) if a != b), None)
        if first is None:
            # A token that ends the answer may itself be one of two that are nearly equally likely.
            differ += len(one.tokens) != len(other.tokens)
            continue
        differ += 1
        expected, token = one.tokens[first], other.tokens[first]
        assert token in one.tops[first], f"token {token} is not among the likeliest"
        assert one.tops[first][expected] - one.tops[first][token] <= NEARLY
    return differ
