"""Real models in a real model host: what they answer, what they hold, and their life."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest

from dumont.inference.v1 import inference_pb2
from dumont.model_host.v1 import model_host_service_pb2 as pb2
from dumont.model_host.v1 import model_host_service_pb2_grpc as pb2_grpc
from dumont.rpc.status import from_rpc_error
from tests.node.model_host_process import ModelHostProcess, Refused

pytestmark = pytest.mark.node

Stub = pb2_grpc.ModelHostServiceStub
FRANCE = "The capital of France is"
PROMPTS = [FRANCE, "Write a haiku about 東京 and 🗼:\n", "def fibonacci(n):"]
COUNT = 20


class Chat:
    """A served instruct model, and what it said when it was loaded."""

    def __init__(self, host: ModelHostProcess, loaded: dict[str, Any], socket: Path) -> None:
        self.host = host
        self.loaded = loaded
        self.socket = socket
        self.stub = host.serve(socket)


@pytest.fixture(scope="module")
def chat(instruct_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Chat]:
    folder = tmp_path_factory.mktemp("chat")
    with ModelHostProcess(folder / "log") as host:
        loaded = host.tell("load", model_dir=str(instruct_model), max_new_tokens_limit=500)
        yield Chat(host, loaded, folder / "host.sock")


@pytest.fixture(scope="module")
def expected(instruct_model: Path) -> dict[str, tuple[list[int], str]]:
    """What transformers itself generates for each prompt: tokens, without the end mark, and text."""
    script = (
        "import json, sys\n"
        "from transformers import AutoModelForCausalLM, AutoTokenizer\n"
        "tokenizer = AutoTokenizer.from_pretrained(sys.argv[1])\n"
        "model = AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype='auto').eval()\n"
        "answers = {}\n"
        "for prompt in json.loads(sys.argv[2]):\n"
        "    inputs = tokenizer(prompt, return_tensors='pt')\n"
        "    output = model.generate(**inputs, max_new_tokens=int(sys.argv[3]), do_sample=False)\n"
        "    tokens = output[0, inputs['input_ids'].shape[1]:].tolist()\n"
        "    tokens = [token for token in tokens if token != tokenizer.eos_token_id]\n"
        "    answers[prompt] = tokens, tokenizer.decode(tokens, skip_special_tokens=True)\n"
        "print(json.dumps(answers))\n"
    )
    output = subprocess.run(
        [sys.executable, "-c", script, str(instruct_model), json.dumps(PROMPTS), str(COUNT)],
        env={**os.environ, "GOMP_SPINCOUNT": "2000", "CUDA_VISIBLE_DEVICES": ""},
        stdout=subprocess.PIPE,
        check=True,
    ).stdout
    answers: dict[str, tuple[list[int], str]] = json.loads(output)
    return answers


def answer(stub: Stub, **request: Any) -> tuple[list[inference_pb2.TextChunk], inference_pb2.Finish]:
    responses = list(stub.Generate(pb2.GenerateRequest(**request)))
    return [response.chunk for response in responses[:-1]], responses[-1].finish


def text(stub: Stub, **request: Any) -> str:
    return "".join(chunk.text for chunk in answer(stub, **request)[0])


def refusal(stub: Stub, **request: Any) -> tuple[str, str, str | None]:
    with pytest.raises(grpc.RpcError) as failed:
        answer(stub, **request)
    error = from_rpc_error(failed.value)
    return error.code, error.reason, error.field


def test_load_tells_what_was_loaded_and_how_long_it_took(chat: Chat) -> None:
    assert chat.loaded["engine"] == "causal_lm"
    assert chat.loaded["device"] == "cpu"
    assert chat.loaded["context_length"] == 8192
    assert chat.loaded["capacity"]["sequences"] > 1
    assert chat.loaded["capacity"]["kv_tokens"] > 8192
    assert len(chat.loaded["canary"]["tokens"]) == 5
    assert chat.loaded["canary"]["logprob"] < 0
    assert [name for name, _ in chat.loaded["phases"]] == [
        "import_torch", "load_tokenizer", "import_model", "load_weights", "check_batching", "import_grpc",
        "warm_up", "canary",
    ]  # fmt: skip
    assert {"python", "torch", "transformers"} <= chat.loaded["versions"].keys()


def test_streams_have_a_gap_while_it_is_paused_and_lose_nothing(chat: Chat) -> None:
    # given: what an answer is without a pause
    request: dict[str, Any] = {"prompt": "1, 2, 3, 4, 5, 6, 7, 8,", "max_new_tokens": 60, "ignore_eos": True}
    whole = [token for chunk in answer(chat.stub, **request)[0] for token in chunk.token_ids]

    # when: it is paused in the middle of one, and another arrives meanwhile
    running = chat.stub.Generate(pb2.GenerateRequest(**request))
    tokens = [*next(running).chunk.token_ids]
    chat.host.tell("pause")
    assert chat.host.tell("status")["state"] == "PAUSED"
    late = chat.stub.Generate(pb2.GenerateRequest(**request))
    chat.host.tell("continue")

    # then
    tokens += [token for response in running for token in response.chunk.token_ids]
    assert tokens == whole
    assert [token for response in late for token in response.chunk.token_ids] == whole


def test_it_knows_the_capital_of_france(chat: Chat) -> None:
    assert "Paris" in text(chat.stub, prompt=FRANCE, max_new_tokens=8)


def test_a_conversation_goes_through_the_chat_template(chat: Chat) -> None:
    question = inference_pb2.ChatMessage(role="user", content="What is the capital of France?")

    chunks, finish = answer(chat.stub, messages=[question], max_new_tokens=40)

    said = "".join(chunk.text for chunk in chunks)
    assert "Paris" in said
    assert "<|im_end|>" not in said
    assert finish.reason == inference_pb2.FINISH_REASON_END
    assert finish.usage.prompt_tokens > 20


@pytest.mark.parametrize("prompt", PROMPTS)
def test_greedy_answers_are_those_of_transformers(
    chat: Chat, expected: dict[str, tuple[list[int], str]], prompt: str
) -> None:
    chunks, finish = answer(chat.stub, prompt=prompt, max_new_tokens=COUNT)

    tokens, whole = expected[prompt]
    assert [token for chunk in chunks for token in chunk.token_ids] == tokens
    assert finish.usage.output_tokens == len(tokens)
    said = "".join(chunk.text for chunk in chunks)
    assert said == whole.rstrip("\ufffd")


def test_pieces_come_as_they_are_computed(chat: Chat) -> None:
    chunks, finish = answer(chat.stub, prompt=FRANCE, max_new_tokens=60, ignore_eos=True)

    # Tokens that are ready together share a message.
    assert len(chunks) > 3
    assert sum(len(chunk.token_ids) for chunk in chunks) == 60
    assert finish.reason == inference_pb2.FINISH_REASON_LENGTH
    assert finish.usage.output_tokens == 60


def test_a_seed_makes_draws_repeatable(chat: Chat) -> None:
    drawn = [
        text(chat.stub, prompt="Once upon a time", max_new_tokens=12, temperature=1.2, top_p=0.95, seed=seed)
        for seed in (-7, -7, 8)
    ]

    assert drawn[0] == drawn[1]
    assert drawn[0] != drawn[2]


def test_without_a_seed_draws_differ(chat: Chat) -> None:
    drawn = {text(chat.stub, prompt="Once", max_new_tokens=12, temperature=1.5) for _ in range(2)}

    assert len(drawn) == 2


def test_text_ends_before_a_stop_string(chat: Chat) -> None:
    free = text(chat.stub, prompt=FRANCE, max_new_tokens=12)
    stop = free[4:9]  # crosses borders between tokens

    chunks, finish = answer(chat.stub, prompt=FRANCE, max_new_tokens=12, stop=[stop])

    assert "".join(chunk.text for chunk in chunks) == free[: free.index(stop)]
    assert finish.reason == inference_pb2.FINISH_REASON_STOP
    assert finish.usage.output_tokens == sum(len(chunk.token_ids) for chunk in chunks)


@pytest.mark.parametrize(
    ("request_fields", "reason", "field"),
    [
        ({}, "EMPTY_PROMPT", "prompt"),
        ({"prompt": "word " * 9000}, "PROMPT_TOO_LONG", "prompt"),
        ({"prompt": "a", "max_new_tokens": 501}, "INVALID_MAX_NEW_TOKENS", "max_new_tokens"),
        ({"prompt": "a", "max_new_tokens": -1}, "INVALID_MAX_NEW_TOKENS", "max_new_tokens"),
        ({"prompt": "a", "temperature": -0.5}, "INVALID_TEMPERATURE", "temperature"),
        ({"prompt": "a", "temperature": float("nan")}, "INVALID_TEMPERATURE", "temperature"),
        ({"prompt": "a", "top_p": 0.0}, "INVALID_TOP_P", "top_p"),
        ({"prompt": "a", "top_p": 1.5}, "INVALID_TOP_P", "top_p"),
        ({"prompt": "a", "stop": [""]}, "INVALID_STOP", "stop[0]"),
        ({"prompt": "a", "stop": ["x"] * 17}, "TOO_MANY_STOPS", "stop"),
        (
            {"prompt": "a", "messages": [inference_pb2.ChatMessage(role="user", content="b")]},
            "PROMPT_AND_MESSAGES",
            "prompt",
        ),
    ],
)
def test_a_wrong_request_is_refused_and_its_field_named(
    chat: Chat, request_fields: dict[str, Any], reason: str, field: str
) -> None:
    assert refusal(chat.stub, **request_fields) == ("INVALID_ARGUMENT", reason, field)


def test_it_does_not_embed(chat: Chat) -> None:
    with pytest.raises(grpc.RpcError) as failed:
        chat.stub.Embed(pb2.EmbedRequest(inputs=["a"]))

    error = from_rpc_error(failed.value)
    assert (error.code, error.reason) == ("FAILED_PRECONDITION", "ENGINE_CANNOT_EMBED")


def test_a_caller_who_hangs_up_frees_the_host(chat: Chat) -> None:
    call = chat.stub.Generate(pb2.GenerateRequest(prompt=FRANCE, max_new_tokens=500, temperature=1.0, seed=1))
    assert next(call).chunk.text
    assert chat.host.tell("status")["in_flight"] == 1

    call.cancel()

    # 500 tokens take many seconds; a drain that succeeds at once shows that they are not computed
    chat.host.tell("drain", deadline_seconds=2)
    assert chat.host.tell("status")["in_flight"] == 0
    chat.host.tell("accept")


def test_a_deadline_frees_the_host(chat: Chat) -> None:
    with pytest.raises(grpc.RpcError) as failed:
        list(chat.stub.Generate(pb2.GenerateRequest(prompt=FRANCE, max_new_tokens=500), timeout=0.3))

    assert failed.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED
    chat.host.tell("drain", deadline_seconds=2)
    chat.host.tell("accept")


def test_a_drain_that_takes_too_long_leaves_it_serving(chat: Chat) -> None:
    call = chat.stub.Generate(pb2.GenerateRequest(prompt=FRANCE, max_new_tokens=500, temperature=1.0, seed=1))
    next(call)

    with pytest.raises(Refused) as refused:
        chat.host.tell("drain", deadline_seconds=0.01)

    assert refused.value.reason == "DRAIN_TIMEOUT"
    call.cancel()
    assert text(chat.stub, prompt=FRANCE, max_new_tokens=1) == " Paris"


def test_weights_stay_in_their_file_and_little_else_is_held(chat: Chat, instruct_model: Path) -> None:
    text(chat.stub, prompt=FRANCE, max_new_tokens=2)  # every weight was touched

    weights = chat.host.memory("model.safetensors")

    size = (instruct_model / "model.safetensors").stat().st_size // 1024
    assert weights["Rss"] > 0.9 * size
    assert weights["Private_Dirty"] < 0.01 * size
    assert chat.host.memory()["Anonymous"] < 260 * 1024


def test_frozen_and_woken_it_is_another_that_says_the_same(chat: Chat) -> None:
    # given a host that has drawn
    draws = [chat.host.tell("draws")]
    chat.host.tell("drain")
    assert refusal(chat.stub, prompt="a")[:2] == ("UNAVAILABLE", "INSTANCE_DRAINING")

    for instance in ("i-2", "i-3"):
        # when it is quiesced, nothing is open but its standard streams and control pipes
        assert chat.host.tell("quiesce") == {"open_fds": [0, 1, 2, 3, 4]}
        assert not chat.socket.exists()
        opened = Path(f"/proc/{chat.host.process.pid}/fd").iterdir()
        assert sorted(int(entry.name) for entry in opened) == [0, 1, 2, 3, 4]

        # and when it wakes, it says what it said when it was loaded
        chat.host.tell("wake", instance=instance, entropy=os.urandom(32).hex())
        canary = chat.host.tell("canary")
        assert canary["tokens"] == chat.loaded["canary"]["tokens"]
        assert canary["logprob"] == chat.loaded["canary"]["logprob"]
        draws.append(chat.host.tell("draws"))

        # and serves
        chat.stub = chat.host.serve(chat.socket, instance)
        assert text(chat.stub, prompt=FRANCE, max_new_tokens=1) == " Paris"
        assert chat.host.tell("status")["instance"] == instance
        chat.host.tell("drain")

    # but draws other numbers each time
    for generator in ("python", "numpy", "torch", "urandom", "openssl", "tempfile"):
        assert len({draw[generator] for draw in draws}) == 3
    chat.host.tell("accept")


def test_an_embedding_model_after_models_that_could_not_be_loaded(
    embedding_model: Path, instruct_model: Path, tmp_path: Path
) -> None:
    with ModelHostProcess(tmp_path / "log") as host:
        # given control messages that are none
        host.write(b"nonsense\n")
        assert host.read()["error"]["reason"] == "BAD_CONTROL_MESSAGE"
        with pytest.raises(Refused, match="no command"):
            host.tell("dance")

        # and a model whose weights were cut short
        broken = tmp_path / "broken"
        shutil.copytree(embedding_model, broken, copy_function=os.link)
        (broken / "model.safetensors").unlink()
        (broken / "model.safetensors").write_bytes(
            (embedding_model / "model.safetensors").read_bytes()[:50_000]
        )
        with pytest.raises(Refused) as refused:
            host.tell("load", model_dir=str(broken))
        assert refused.value.reason == "MODEL_INVALID"
        assert refused.value.error["metadata"] == {"file": str(broken / "model.safetensors")}

        # when a sound one is loaded
        loaded = host.tell("load", model_dir=str(embedding_model))
        stub = host.serve(tmp_path / "host.sock")
        response = stub.Embed(
            pb2.EmbedRequest(
                inputs=["A cat sits on the mat.", "A kitten rests on a rug.", "Interest rates rose again."]
            )
        )

        # then it embeds: what means the same is near
        assert (loaded["engine"], len(loaded["canary"]["tokens"])) == ("embedding", 8)
        cat, kitten, rates = (list(embedding.values) for embedding in response.embeddings)
        assert sum(value * value for value in cat) == pytest.approx(1)
        assert similarity(cat, kitten) > similarity(cat, rates) + 0.3
        assert response.usage.prompt_tokens > 15
        alone = stub.Embed(pb2.EmbedRequest(inputs=["A cat sits on the mat."])).embeddings[0].values
        assert similarity(cat, list(alone)) == pytest.approx(1)

        # and refuses what it cannot do
        assert refusal(stub, prompt="a")[:2] == ("FAILED_PRECONDITION", "ENGINE_CANNOT_GENERATE")
        for inputs, reason in (
            ([], "EMPTY_INPUTS"),
            (["a", ""], "EMPTY_INPUT"),
            (["x " * 600], "PROMPT_TOO_LONG"),
        ):
            with pytest.raises(grpc.RpcError) as failed:
                stub.Embed(pb2.EmbedRequest(inputs=inputs))
            assert from_rpc_error(failed.value).reason == reason
            assert str(from_rpc_error(failed.value).field).startswith("inputs")

        # and says the same after a freeze
        host.tell("drain")
        host.tell("quiesce")
        host.tell("wake", instance="i-2", entropy="00" * 32)
        assert host.tell("canary")["tokens"] == loaded["canary"]["tokens"]

        # and ends when it is told to
        host.tell("stop")
        assert host.process.wait(10) == 0


def similarity(one: list[float], other: list[float]) -> float:
    return sum(left * right for left, right in zip(one, other, strict=True))


def test_it_ends_when_nobody_holds_its_control_pipe(tmp_path: Path) -> None:
    with ModelHostProcess(tmp_path / "log") as host:
        assert host.tell("status")["state"] == "NEW"

        host.close_control()

        assert host.process.wait(10) == 0
