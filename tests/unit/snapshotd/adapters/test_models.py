"""A model is found and found whole, or refused with the file and the field named."""

from __future__ import annotations

import contextlib
import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from huggingface_hub import HfApi, ModelInfo
from safetensors.numpy import save_file

from dumont.errors import (
    DumontError,
    FailedPrecondition,
    InvalidArgument,
    NotFound,
    ResourceExhausted,
    Unavailable,
)
from snapshotd.adapters.models import NodeModels
from snapshotd.model import Model, Unservable


@pytest.fixture
def models(tmp_path: Path) -> NodeModels:
    (tmp_path / "models").mkdir()
    return NodeModels(tmp_path / "models")


def write_model(models: NodeModels, name: str, architecture: str = "LlamaForCausalLM") -> Path:
    directory = models.directory / name
    directory.mkdir(parents=True)
    kind = architecture.removesuffix("Model").lower()
    config = {"architectures": [architecture], "model_type": kind, "max_position_embeddings": 512}
    (directory / "config.json").write_text(json.dumps(config))
    save_file({"weight": np.arange(1000, dtype=np.float32)}, directory / "model.safetensors")
    return directory


async def test_a_model_is_found_by_its_id_and_by_its_path(models: NodeModels) -> None:
    directory = write_model(models, "org/name")
    for name in ("org/name", str(directory)):
        found = await models.resolve(name)
        assert found.directory == directory
        assert found.engine == "causal_lm"
        assert found.context_length == 512
        assert found.weights_bytes == (directory / "model.safetensors").stat().st_size
        assert await models.fetch(found) == found


@pytest.mark.parametrize("name", ["org/none", "/no/such/directory"])
async def test_what_is_not_here_is_not_found_and_no_hub_is_asked(models: NodeModels, name: str) -> None:
    assert await models.find(name) is None


async def test_the_engine_follows_from_the_model_unless_it_is_named(models: NodeModels) -> None:
    write_model(models, "org/bert", "BertModel")
    sentence = write_model(models, "org/sentence")
    (sentence / "modules.json").write_text("[]")
    assert (await models.resolve("org/bert")).engine == "embedding"
    assert (await models.resolve("org/sentence")).engine == "embedding"
    assert (await models.resolve("org/sentence", "causal_lm")).engine == "causal_lm"


async def test_what_no_engine_runs_is_refused_when_it_is_resolved(models: NodeModels) -> None:
    write_model(models, "org/reranker", "BertForSequenceClassification")

    with pytest.raises(FailedPrecondition, match="rerankers") as refusal:
        await models.resolve("org/reranker")

    assert (refusal.value.reason, refusal.value.field) == ("MODEL_UNSUPPORTED", "model")
    assert refusal.value.metadata["architecture"] == "BertForSequenceClassification"


async def test_what_its_generation_config_asks_for_is_refused_when_it_is_resolved(models: NodeModels) -> None:
    directory = write_model(models, "org/name")
    (directory / "generation_config.json").write_text('{"no_repeat_ngram_size": 3}')

    with pytest.raises(FailedPrecondition, match="no_repeat_ngram_size") as refusal:
        await models.resolve("org/name")

    assert refusal.value.reason == "MODEL_UNSUPPORTED"
    assert (await models.resolve("org/name", "embedding")).engine == "embedding"


@pytest.mark.parametrize(
    ("file", "words"), [("model.Q4_K_M.gguf", "llama.cpp"), ("adapter_config.json", "is an adapter")]
)
async def test_a_format_that_has_no_config_json_is_named(models: NodeModels, file: str, words: str) -> None:
    directory = models.directory / "org/name"
    directory.mkdir(parents=True)
    (directory / file).write_text("{}")

    with pytest.raises(FailedPrecondition, match=words) as refusal:
        await models.resolve("org/name")

    assert refusal.value.reason == "MODEL_UNSUPPORTED"


async def test_a_single_file_of_weights_goes_before_an_index(models: NodeModels) -> None:
    directory = write_model(models, "org/name")
    (directory / "model.safetensors.index.json").write_text('{"weight_map": {"a": "old.safetensors"}}')

    assert (await models.resolve("org/name")).weights == (directory / "model.safetensors",)


def hub_model(config: object, files: dict[str, int]) -> ModelInfo:
    """What the hub says of a model."""
    siblings = [{"rfilename": file, "size": size} for file, size in files.items()]
    return ModelInfo(id="org/name", config=config, siblings=siblings)


@pytest.mark.parametrize(
    ("config", "files", "words"),
    [
        ({"architectures": ["LlamaForCausalLM"]}, {"model.Q4_K_M.gguf": 9}, "llama.cpp"),
        ({}, {"model.Q4_K_M.gguf": 9}, "llama.cpp"),
        ({}, {"adapter_config.json": 1, "adapter_model.safetensors": 9}, "is an adapter"),
        ({"architectures": ["LlamaForCausalLM"]}, {"pytorch_model.bin": 9}, "pickled"),
        ({"architectures": ["T5ForConditionalGeneration"]}, {"model.safetensors": 9}, "T5"),
        ({}, {"model.safetensors": 9}, "names no architectures"),
    ],
)
async def test_what_no_engine_runs_is_refused_before_it_is_downloaded(
    models: NodeModels,
    monkeypatch: pytest.MonkeyPatch,
    config: dict[str, object],
    files: dict[str, int],
    words: str,
) -> None:
    monkeypatch.setattr(HfApi, "model_info", lambda *_, **__: hub_model(config, files))

    with pytest.raises(FailedPrecondition, match=words) as refusal:
        await models.resolve("org/name")

    assert refusal.value.reason == "MODEL_UNSUPPORTED"


async def test_a_model_of_the_hub_has_its_engine_and_size(
    models: NodeModels, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = {
        "a-1.safetensors": 5,
        "a-2.safetensors": 4,
        "model.safetensors.index.json": 1,
        "tokenizer.json": 1,
    }
    monkeypatch.setattr(
        HfApi, "model_info", lambda *_, **__: hub_model({"architectures": ["GPT2LMHeadModel"]}, files)
    )

    found = await models.resolve("org/name")

    assert (found.engine, found.weights_bytes, found.directory) == ("causal_lm", 9, None)


@pytest.mark.parametrize(
    ("name", "engine", "error", "reason", "field"),
    [
        ("", "", InvalidArgument, "MODEL_REQUIRED", "model"),
        ("../up", "", InvalidArgument, "INVALID_MODEL", "model"),
        ("a/b/c", "", InvalidArgument, "INVALID_MODEL", "model"),
        ("/no/such/directory", "", NotFound, "MODEL_NOT_FOUND", "model"),
        ("org/name", "magic", InvalidArgument, "UNKNOWN_ENGINE", "engine"),
    ],
)
async def test_a_name_that_cannot_be_is_refused(
    models: NodeModels, name: str, engine: str, error: type[DumontError], reason: str, field: str
) -> None:
    with pytest.raises(error) as refusal:
        await models.resolve(name, engine)
    assert (refusal.value.reason, refusal.value.field) == (reason, field)


@pytest.mark.parametrize(
    "damage",
    [
        "truncated",
        "garbage",
        "empty",
        "no weights",
        "weights are a directory",
        "no config",
        "config is no JSON",
        "config is a list",
        "missing shard",
        "index is a list",
        "index leads outside",
    ],
)
async def test_a_damaged_model_is_refused_before_anything_is_started(models: NodeModels, damage: str) -> None:
    directory = write_model(models, "org/name")
    weights, config = directory / "model.safetensors", directory / "config.json"
    if damage == "truncated":
        os.truncate(weights, weights.stat().st_size - 100)
    elif damage == "garbage":
        weights.write_bytes(b"\xff" * 4096)
    elif damage == "empty":
        weights.write_bytes(b"")
    elif damage == "no weights":
        weights.unlink()
    elif damage == "no config":
        config.unlink()
    elif damage == "config is no JSON":
        config.write_text("{")
    elif damage == "weights are a directory":
        weights.unlink()
        weights.mkdir()
    elif damage == "config is a list":
        config.write_text("[]")
    else:
        index: object = {"weight_map": {"weight": "model-00001-of-00002.safetensors"}}
        if damage == "index is a list":
            index = []
        elif damage == "index leads outside":
            write_model(models, "other")
            index = {"weight_map": {"weight": "../../other/model.safetensors"}}
        weights.unlink()
        (directory / "model.safetensors.index.json").write_text(json.dumps(index))

    with pytest.raises(FailedPrecondition) as refusal:
        await models.resolve("org/name")
    assert refusal.value.reason == "MODEL_INVALID"
    assert refusal.value.field == "model"


async def test_a_pipe_in_place_of_a_file_is_refused_and_not_waited_for(models: NodeModels) -> None:
    for name in ("config.json", "model.safetensors"):
        directory = write_model(models, f"org/{name}")
        (directory / name).unlink()
        os.mkfifo(directory / name)

        with pytest.raises(FailedPrecondition, match=f"{name} is not a regular file") as refused:
            await models.resolve(f"org/{name}")
        assert refused.value.reason == "MODEL_INVALID"


async def test_a_link_out_of_the_model_is_refused(models: NodeModels, tmp_path: Path) -> None:
    directory = write_model(models, "org/name")
    (tmp_path / "secret").write_text("{}")
    (directory / "chat_template.jinja").symlink_to(tmp_path / "secret")

    with pytest.raises(FailedPrecondition, match="leads out"):
        await models.digests(await models.resolve("org/name"))


async def test_the_digests_are_of_what_a_model_host_reads_besides_weights(models: NodeModels) -> None:
    # Given a model with more than that
    directory = write_model(models, "org/name")
    (directory / "1_Pooling").mkdir()
    (directory / "1_Pooling" / "config.json").write_text("{}")
    (directory / "2_Dense").mkdir()
    (directory / "2_Dense" / "model.safetensors").write_text("weights of a module")
    (directory / "tokenizer.json").write_text("{}")
    (directory / "README.md").write_text("read me")
    (directory / ".cache").mkdir()
    (directory / ".cache" / "state.json").write_text("{}")
    model = await models.resolve("org/name")

    before = await models.digests(model)
    assert sorted(before) == [
        "1_Pooling/config.json", "2_Dense/model.safetensors", "config.json", "tokenizer.json"
    ]  # fmt: skip

    # When one of them changes, and another one comes
    (directory / "tokenizer.json").write_text("[]")
    (directory / "2_Dense" / "model.safetensors").write_text("others")
    (directory / "chat_template.jinja").write_text("{{ messages }}")
    after = await models.digests(model)

    # Then that shows
    assert {name for name in after if after.get(name) != before.get(name)} == {
        "2_Dense/model.safetensors",
        "tokenizer.json",
        "chat_template.jinja",
    }


# The room of fetched models


def fetched(models: NodeModels, name: str, size: int, used: float) -> Path:
    """A model as a fetch leaves it."""
    folder = models.hub_cache / f"models--{name.replace('/', '--')}" / "blobs"
    folder.mkdir(parents=True)
    (folder / "weights").write_bytes(b"x" * size)
    models._note_fetched(name)
    os.utime(models._note(name), (used, used))
    return folder


@pytest.fixture
def downloads(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Downloads that fail when all room has been made."""
    asked: list[str] = []

    def download(name: str, **_: Any) -> str:
        asked.append(name)
        raise OSError("no route to the hub")

    monkeypatch.setattr("snapshotd.adapters.models.snapshot_download", download)
    return asked


async def test_models_used_longest_ago_make_room_for_a_fetched_one(
    tmp_path: Path, downloads: list[str]
) -> None:
    models = NodeModels(tmp_path, limit=100, in_use=lambda: {"org/running"})
    running, old, recent = (
        fetched(models, "org/running", 30, 1.0),
        fetched(models, "org/old", 30, 2.0),
        fetched(models, "org/recent", 30, 3.0),
    )
    by_hand = tmp_path / "hub" / "models--org--mine" / "blobs"
    by_hand.mkdir(parents=True)
    with pytest.raises(Unavailable):
        await models.fetch(Model("org/new", "causal_lm", None, (), 40, 0))
    assert downloads == ["org/new"]
    assert [folder.exists() for folder in (running, old, recent, by_hand)] == [True, False, True, True]


async def test_what_a_download_left_that_broke_off_makes_room_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # given: a download of which only a part has come
    models = NodeModels(tmp_path, limit=100)
    part = tmp_path / "hub/models--org--broken/blobs/part.incomplete"

    def download(name: str, **_: Any) -> str:
        if name == "org/broken":
            part.parent.mkdir(parents=True, exist_ok=True)
            part.write_bytes(b"x" * 80)
        raise OSError("no route to the hub")

    monkeypatch.setattr("snapshotd.adapters.models.snapshot_download", download)
    with pytest.raises(Unavailable):
        await models.fetch(Model("org/broken", "causal_lm", None, (), 90, 0))

    # then it does not stand in the way of itself,
    models.in_use = lambda: {"org/broken"}
    with pytest.raises(Unavailable):
        await models.fetch(Model("org/broken", "causal_lm", None, (), 90, 0))

    # and when another model needs its room
    models.in_use = frozenset
    with pytest.raises(Unavailable):
        await models.fetch(Model("org/new", "causal_lm", None, (), 40, 0))

    # then it goes
    assert not part.exists()


async def test_a_model_that_does_not_fit_is_refused_and_nothing_goes(
    tmp_path: Path, downloads: list[str]
) -> None:
    models = NodeModels(tmp_path, limit=100)
    kept = fetched(models, "org/old", 30, 1.0)
    with pytest.raises(ResourceExhausted) as refusal:
        await models.fetch(Model("org/huge", "causal_lm", None, (), 101, 0))
    assert refusal.value.reason == "MODELS_FULL"
    assert kept.exists()
    assert downloads == []


async def test_the_models_of_a_node_are_listed_with_what_is_wrong_with_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # given a model that nobody knows how to serve, and another one beside it
    for name in ("org/odd", "org/other"):
        (tmp_path / name).mkdir(parents=True)
        (tmp_path / name / "config.json").write_text('{"architectures": ["NobodyKnowsIt"]}')
    (tmp_path / "notes").mkdir()
    models = NodeModels(tmp_path)

    # when, then: both are listed, with the reason
    held = await models.held()
    assert [one.name for one in held] == ["org/odd", "org/other"]
    assert all(isinstance(one, Unservable) and one.problem for one in held)

    # and a name that is nearly one of them leads to it
    def unreachable(*_: object, **__: object) -> None:
        raise OSError("no route to the hub")

    monkeypatch.setattr("snapshotd.adapters.models.HfApi.model_info", unreachable)
    with pytest.raises(NotFound, match=r"did you mean org/odd\?"):
        await models.resolve("org/od")
    with pytest.raises(NotFound, match="dumont models"):
        await models.resolve("quite/different")


async def test_listing_the_models_does_not_count_as_using_them(tmp_path: Path) -> None:
    models = NodeModels(tmp_path, limit=100)
    folder = fetched(models, "org/old", 30, 1.0).parent
    (folder / "refs").mkdir()
    (folder / "refs" / "main").write_text("abc")
    (folder / "snapshots" / "abc").mkdir(parents=True)

    await models.held()
    assert models._note("org/old").stat().st_mtime == 1.0

    with contextlib.suppress(DumontError):
        await models.find("org/old")
    assert models._note("org/old").stat().st_mtime > 1.0
