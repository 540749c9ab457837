"""The life of a model host, command by command, in a world made of memory."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from dumont.errors import DumontError, Unavailable
from model_host.engine import WeightsPlace
from model_host.host import Host
from model_host.lifecycle import State
from tests.unit.model_host.fake_world import FakeWorld

Json = dict[str, Any]
SOCKET = "/run/dumont/host.sock"
SEED = "ab" * 32


@pytest.fixture
def world() -> FakeWorld:
    return FakeWorld()


@pytest.fixture
def host(world: FakeWorld) -> Iterator[Host]:
    made = Host(world)
    yield made
    if made.state is not State.STOPPED:
        made.run("stop", {})


def load(host: Host, **arguments: Any) -> Json:
    return host.run("load", {"model_dir": "/models/m", **arguments})


def serving(host: Host) -> Host:
    load(host)
    host.run("serve", {"socket": SOCKET, "instance": "i-1"})
    return host


def refusal(host: Host, command: str, **arguments: Any) -> DumontError:
    with pytest.raises(DumontError) as refused:
        host.run(command, arguments)
    return refused.value


def test_load_warms_up_and_records_the_canary(host: Host, world: FakeWorld) -> None:
    answer = load(host, device="cpu", max_new_tokens_limit=9, engine="causal_lm", threads=None)

    assert answer["engine"] == "fake"
    assert answer["device"] == "cpu"
    assert answer["context_length"] == 16
    assert answer["capacity"] == {"sequences": 4, "kv_tokens": None, "unbatched_reason": ""}
    assert answer["canary"]["tokens"] == [1, 2, 3]
    assert answer["canary"]["logprob"] == -0.5
    assert [name for name, _ in answer["phases"]] == ["import_grpc", "warm_up", "canary"]
    assert world.engine.log == ["warm_up", "canary", "settle"]
    assert world.loaded is not None
    folder, engine, settings = world.loaded
    assert (folder, engine, settings.max_new_tokens_limit) == (Path("/models/m"), "causal_lm", 9)


@pytest.mark.parametrize(
    "arguments",
    [
        {"model_dir": 5},
        {"model_dir": "/m", "max_queue": 0},
        {"model_dir": "/m", "max_queue": "8"},
        {"model_dir": "/m", "max_new_tokens_limit": True},
        {"model_dir": "/m", "threads": -1},
        {"model_dir": "/m", "weight_files": ["/cache/abc"]},
        {"model_dir": "/m", "weight_files": {"model.safetensors": 5}},
        {},
    ],
)
def test_load_refuses_arguments_of_the_wrong_kind(host: Host, arguments: Json) -> None:
    assert refusal(host, "load", **arguments).reason == "BAD_CONTROL_MESSAGE"
    assert host.state is State.NEW


def test_load_is_told_where_the_weights_are_and_where_they_go(host: Host, world: FakeWorld) -> None:
    load(host, weights="included", weight_files={"model.safetensors": "/cache/abc"})

    assert world.loaded is not None
    settings = world.loaded[2]
    assert settings.weights is WeightsPlace.INCLUDED
    assert settings.weight_files == {"model.safetensors": Path("/cache/abc")}


def test_weights_go_nowhere_else(host: Host) -> None:
    assert refusal(host, "load", model_dir="/m", weights="half").reason == "INVALID_WEIGHTS"


@pytest.mark.parametrize("step", ["warm_up", "canary"])
def test_a_load_that_fails_leaves_a_host_that_can_load(host: Host, world: FakeWorld, step: str) -> None:
    world.engine.fail = step
    assert refusal(host, "load", model_dir="/models/m").reason == f"{step.upper()}_FAILED"
    assert host.state is State.NEW

    world.engine.fail = ""

    assert load(host)["engine"] == "fake"


def test_a_bad_model_is_refused(host: Host) -> None:
    assert refusal(host, "load", model_dir="/models/bad").reason == "MODEL_INVALID"
    assert host.state is State.NEW


def test_an_unknown_command_changes_nothing(host: Host) -> None:
    assert refusal(host, "dance").reason == "UNKNOWN_COMMAND"
    assert host.state is State.NEW


def test_an_illegal_command_changes_nothing(host: Host, world: FakeWorld) -> None:
    serving(host)

    assert refusal(host, "quiesce").reason == "ILLEGAL_TRANSITION"

    assert host.state is State.SERVING
    assert world.socket.socket == Path(SOCKET)


def test_serve_opens_the_socket_and_the_gate(host: Host, world: FakeWorld) -> None:
    serving(host)

    assert world.socket.socket == Path(SOCKET)
    assert world.gate is not None
    assert world.gate.open
    assert host.run("status", {}) == {
        "state": "SERVING",
        "instance": "i-1",
        "in_flight": 0,
        "queued": 0,
        "capacity": {"sequences": 4, "kv_tokens": None, "unbatched_reason": ""},
        "running": 0,
        "waiting": 0,
        "kv_tokens_used": 0,
        "served": False,
        "draining": False,
    }


def test_a_serve_that_fails_leaves_the_model_loaded(host: Host, world: FakeWorld) -> None:
    load(host)
    world.socket.fail = True

    assert refusal(host, "serve", socket=SOCKET, instance="i-1").reason == "SERVE_FAILED"

    assert host.state is State.LOADED
    assert world.gate is not None
    assert not world.gate.open


def test_a_drained_host_refuses_calls_until_it_accepts_again(host: Host, world: FakeWorld) -> None:
    serving(host)
    assert world.gate is not None

    host.run("drain", {})

    assert host.run("status", {})["draining"] is True
    with pytest.raises(Unavailable), world.gate.enter():
        raise AssertionError("entered")
    host.run("accept", {})
    with world.gate.enter():
        assert host.run("status", {})["in_flight"] == 1
    assert host.run("status", {})["served"] is True


def test_a_drain_that_takes_too_long_leaves_the_host_serving(host: Host, world: FakeWorld) -> None:
    serving(host)
    assert world.gate is not None

    with world.gate.enter():
        refused = refusal(host, "drain", deadline_seconds=0)

    assert refused.reason == "DRAIN_TIMEOUT"
    assert host.state is State.SERVING
    with world.gate.enter():
        assert world.gate.inside == 1


def test_a_paused_host_keeps_its_socket_and_goes_on(host: Host, world: FakeWorld) -> None:
    serving(host)
    world.engine.log.clear()
    host.run("pause", {})
    assert host.state is State.PAUSED
    assert world.socket.socket == Path(SOCKET)
    assert refusal(host, "drain").reason == "ILLEGAL_TRANSITION"
    host.run("continue", {})
    assert host.state is State.SERVING  # type: ignore[comparison-overlap]
    assert world.engine.log == ["pause", "resume"]


def test_an_engine_that_cannot_pause_serves_on(host: Host, world: FakeWorld) -> None:
    serving(host)
    world.engine.fail = "pause"
    assert refusal(host, "pause").reason == "PAUSE_FAILED"
    assert host.state is State.SERVING
    assert host.run("canary", {})["tokens"] == [1, 2, 3]


def test_quiesce_closes_everything_and_says_what_is_open(host: Host, world: FakeWorld) -> None:
    serving(host)
    host.run("drain", {})
    world.engine.log.clear()

    assert host.run("quiesce", {}) == {"open_fds": [0, 1, 2, 3, 4]}

    assert world.socket.socket is None
    assert world.engine.log == ["quiesce", "release_memory"]


def test_an_open_descriptor_is_named_and_the_host_is_as_before(host: Host, world: FakeWorld) -> None:
    serving(host)
    host.run("drain", {})
    world.descriptors[7] = "socket:[42]"

    refused = refusal(host, "quiesce")

    assert refused.reason == "QUIESCE_DIRTY"
    assert "7 (socket:[42])" in refused.message
    assert host.state is State.DRAINED
    assert world.engine.log[-1] == "wake"
    assert world.socket.socket == Path(SOCKET)
    host.run("accept", {})
    assert host.state is State.SERVING  # type: ignore[comparison-overlap]


def test_an_engine_that_cannot_quiesce_leaves_the_host_as_before(host: Host, world: FakeWorld) -> None:
    load(host)
    world.engine.fail = "quiesce"

    assert refusal(host, "quiesce").reason == "QUIESCE_FAILED"

    assert host.state is State.LOADED
    assert world.socket.socket is None


def test_wake_gives_a_new_identity_and_fresh_randomness(host: Host, world: FakeWorld) -> None:
    serving(host)
    host.run("drain", {})
    host.run("quiesce", {})
    world.engine.log.clear()

    host.run("wake", {"instance": "i-2", "entropy": SEED})

    assert world.engine.log == ["regain_cpu", "wake"]
    assert world.seeds == [bytes.fromhex(SEED)]
    assert host.run("status", {})["instance"] == "i-2"
    assert host.run("canary", {})["tokens"] == [1, 2, 3]
    host.run("serve", {"socket": SOCKET, "instance": "i-2"})
    assert world.socket.socket == Path(SOCKET)


@pytest.mark.parametrize("entropy", ["", "ab", "zz" * 32, "ab" * 33])
def test_wake_refuses_anything_but_32_bytes_of_entropy(host: Host, world: FakeWorld, entropy: str) -> None:
    load(host)
    host.run("quiesce", {})

    assert refusal(host, "wake", instance="i-2", entropy=entropy).reason == "INVALID_ENTROPY"

    assert host.state is State.QUIESCED
    assert world.seeds == []


def test_a_wake_that_fails_can_be_tried_again(host: Host, world: FakeWorld) -> None:
    load(host)
    host.run("quiesce", {})
    world.engine.fail = "wake"
    assert refusal(host, "wake", instance="i-2", entropy=SEED).reason == "WAKE_FAILED"

    world.engine.fail = ""
    host.run("wake", {"instance": "i-2", "entropy": SEED})

    assert host.state is State.AWAKE


def test_a_host_can_be_captured_three_times_over(host: Host) -> None:
    load(host)

    for _ in range(3):
        host.run("quiesce", {})
        host.run("wake", {"instance": "i", "entropy": SEED})
        host.run("serve", {"socket": SOCKET, "instance": "i"})
        host.run("drain", {})

    assert host.state is State.DRAINED


def test_draws_come_from_the_world(host: Host) -> None:
    load(host)

    assert host.run("draws", {}) == {"python": 0.5}


def test_a_gpu_drivers_descriptors_are_the_models_own(host: Host, world: FakeWorld) -> None:
    world.engine.device = "cuda:0"
    world.descriptors[9] = "/dev/nvidia0"
    load(host)

    assert host.run("quiesce", {}) == {"open_fds": [0, 1, 2, 3, 4, 9]}


def test_stop_closes_the_socket_and_ends_it(host: Host, world: FakeWorld) -> None:
    serving(host)

    host.run("stop", {})

    assert world.socket.socket is None
    assert refusal(host, "status").reason == "ILLEGAL_TRANSITION"
