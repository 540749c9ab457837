"""Many callers of one model on a GPU: each is answered as if alone, whatever becomes of the process."""

from __future__ import annotations

import asyncio
from typing import Any

import grpc
import pytest

from snapshotd.model import Snapshot, State
from tests.gpu.gpu_node import GpuNode, comes_back_to
from tests.node.crowd import MARKER, all_at_once, ask, check_same, requests
from tests.node.markers import readable

pytestmark = [pytest.mark.gpu, pytest.mark.node, pytest.mark.asyncio(loop_scope="module")]


async def test_many_at_once_are_answered_as_each_alone_through_every_sleep(
    node: GpuNode, snapshot: Snapshot, memory: list[int]
) -> None:
    # given what each is answered alone
    await node.restore("busy", snapshot)
    asked = requests()
    alone = [await ask(node, "busy", logprobs=20, **fields) for fields in asked]
    assert all(answer.status is None for answer in alone)

    # when all ask at once and the instance is parked and resumed in the middle of it, three times
    for _ in range(3):
        busy = asyncio.ensure_future(all_at_once(node, "busy", asked))
        await asyncio.sleep(0.1)
        await node.instances.park("busy")
        await node.instances.resume("busy")
        assert node.instances.get("busy").state is State.SERVING
        check_same(alone, await busy)

    # and when another that has served nobody is captured meanwhile, and comes back three times
    await node.restore("pristine", snapshot, gpu="0")
    busy = asyncio.ensure_future(all_at_once(node, "busy", asked))
    captured = await node.instances.capture("pristine", "in-the-middle")
    check_same(alone, await busy)
    await node.instances.stop("pristine")
    for number in range(3):
        await node.restore(f"twin-{number}", captured, gpu="0")
        both = await asyncio.gather(
            all_at_once(node, "busy", asked), all_at_once(node, f"twin-{number}", asked)
        )
        for answers in both:
            check_same(alone, answers)
        await node.instances.stop(f"twin-{number}")

    # then nothing of a prompt is in any snapshot, and the memory is back
    assert not readable(node.state_dir / "snapshots", MARKER.encode())
    await node.instances.stop("busy")
    await comes_back_to(memory)


async def test_who_is_paused_for_lack_of_room_is_answered_as_alone(
    node: GpuNode, snapshot: Snapshot, memory: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    # given room for 16,000 tokens of this model, and answers that have four times as many
    monkeypatch.setattr(node, "engine", "causal_lm")
    monkeypatch.setattr(node, "engine_options", {"kv_cache_memory_bytes": 16_000 * 16_384})
    await node.start("tight", gpu="0")
    asked: list[dict[str, Any]] = [
        {"prompt": f"p{number}", "max_new_tokens": 1000, "ignore_eos": True} for number in range(64)
    ]
    alone = await asyncio.gather(*(ask(node, "tight", logprobs=20, **fields) for fields in asked[:4]))

    together = await asyncio.gather(*(ask(node, "tight", **fields) for fields in asked))

    assert all(answer.status is None and len(answer.tokens) == 1000 for answer in together)
    check_same(list(alone), together[:4])
    await node.instances.stop("tight")


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
