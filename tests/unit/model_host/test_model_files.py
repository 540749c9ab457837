"""A model directory is checked before anything heavy begins, and what is wrong with it is named."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from dumont import models
from dumont.errors import DumontError, FailedPrecondition, InvalidArgument
from model_host import model_files
from model_host.engines import choice


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write(tmp_path / "config.json", {"architectures": ["LlamaForCausalLM"], "model_type": "llama"})
    (tmp_path / "model.safetensors").write_bytes(b"weights")
    return tmp_path


def write(file: Path, content: object) -> None:
    file.parent.mkdir(exist_ok=True)
    file.write_text(json.dumps(content))


def refusal(folder: Path) -> DumontError:
    with pytest.raises(FailedPrecondition) as refused:
        model_files.read(folder)
    assert refused.value.reason == "MODEL_INVALID"
    return refused.value


def test_the_least_that_makes_a_model(folder: Path) -> None:
    files = model_files.read(folder)

    assert files.architecture == "LlamaForCausalLM"
    assert files.shards == (folder / "model.safetensors",)
    assert files.chat_template is None


def test_weights_may_lie_elsewhere(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    cached = tmp_path_factory.mktemp("cache") / "abc"
    cached.write_bytes(b"weights")
    (folder / "model.safetensors").unlink()

    files = model_files.read(folder, {"model.safetensors": cached, "other.safetensors": folder})

    assert files.shards == (cached,)


@pytest.mark.parametrize(
    ("file", "words"), [("model.Q4_K_M.gguf", "llama.cpp"), ("adapter_config.json", "is an adapter")]
)
def test_a_format_that_has_no_config_json_is_named(folder: Path, file: str, words: str) -> None:
    for name in ("config.json", "model.safetensors"):
        (folder / name).unlink()
    (folder / file).write_text("{}")

    with pytest.raises(FailedPrecondition, match=words) as refused:
        model_files.read(folder)
    assert refused.value.reason == "MODEL_UNSUPPORTED"


@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
def test_a_missing_file_is_named(folder: Path, name: str) -> None:
    (folder / name).unlink()

    error = refusal(folder)

    assert error.metadata == {"file": str(folder / name)}
    assert f"{name} in" in error.message


@pytest.mark.parametrize("name", ["config.json", "tokenizer_config.json", "model.safetensors.index.json"])
@pytest.mark.parametrize("content", ["", "{", "[]", "\x00"])
def test_a_corrupt_file_is_named(folder: Path, name: str, content: str) -> None:
    if name == models.INDEX:
        (folder / models.WEIGHTS).unlink()
    (folder / name).write_text(content)

    assert refusal(folder).metadata == {"file": str(folder / name)}


def test_shards_come_from_the_index(folder: Path) -> None:
    (folder / models.WEIGHTS).unlink()
    write(folder / models.INDEX, {"weight_map": {"a": "2.safetensors", "b": "1.safetensors"}})
    for name in ("1.safetensors", "2.safetensors"):
        (folder / name).touch()

    assert [shard.name for shard in model_files.read(folder).shards] == ["1.safetensors", "2.safetensors"]


def test_a_single_file_goes_before_an_index_as_in_transformers(folder: Path) -> None:
    # given a model that was saved again in one file, beside the index and the shards of before
    write(folder / models.INDEX, {"weight_map": {"a": "old.safetensors"}})
    (folder / "old.safetensors").touch()

    assert model_files.read(folder).shards == (folder / models.WEIGHTS,)


def test_a_missing_shard_is_named(folder: Path) -> None:
    (folder / models.WEIGHTS).unlink()
    write(folder / models.INDEX, {"weight_map": {"a": "gone.safetensors"}})

    assert refusal(folder).metadata == {"file": str(folder / "gone.safetensors")}


@pytest.mark.parametrize("name", ["../model.safetensors", "/etc/passwd", "sub/model.safetensors"])
def test_an_index_cannot_point_outside_the_model(folder: Path, name: str) -> None:
    (folder / models.WEIGHTS).unlink()
    write(folder / models.INDEX, {"weight_map": {"a": name}})

    assert "outside" in refusal(folder).message


@pytest.mark.parametrize(
    ("template", "found"),
    [
        ("text", "text"),
        ([{"name": "rag", "template": "r"}, {"name": "default", "template": "d"}], "d"),
        ([], None),
    ],
)
def test_a_chat_template_may_be_in_the_tokenizers_config(
    folder: Path, template: object, found: object
) -> None:
    write(folder / "tokenizer_config.json", {"chat_template": template})

    assert model_files.read(folder).chat_template == found


def test_a_template_file_goes_first(folder: Path) -> None:
    write(folder / "tokenizer_config.json", {"chat_template": "old"})
    (folder / "chat_template.jinja").write_text("new")

    assert model_files.read(folder).chat_template == "new"


@pytest.mark.parametrize(
    "name", ["config.json", "tokenizer.json", "vocab.txt", "chat_template.jinja", "1_Pooling/config.json"]
)
def test_a_pipe_is_refused_and_not_waited_for(folder: Path, name: str) -> None:
    pipe = folder / name
    pipe.parent.mkdir(exist_ok=True)
    pipe.unlink(missing_ok=True)
    os.mkfifo(pipe)

    error = refusal(folder)

    assert error.metadata == {"file": str(pipe)}
    assert "regular" in error.message


def test_weights_that_are_a_pipe_are_refused(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    os.mkfifo(folder / "model.safetensors")

    assert "regular" in refusal(folder).message


@pytest.mark.parametrize("name", ["chat_template.jinja", "tokenizer.json", "generation_config.json"])
def test_a_link_out_of_the_model_is_refused(
    folder: Path, name: str, tmp_path_factory: pytest.TempPathFactory
) -> None:
    secret = tmp_path_factory.mktemp("node") / "secret"
    secret.write_text("{}")
    (folder / name).symlink_to(secret)

    assert f"to {secret}" in refusal(folder).message


def test_a_link_inside_the_model_is_followed(folder: Path) -> None:
    (folder / "template.txt").write_text("linked")
    (folder / "chat_template.jinja").symlink_to("template.txt")

    assert model_files.read(folder).chat_template == "linked"


def test_weights_may_be_a_link_to_another_disk(
    folder: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    elsewhere = tmp_path_factory.mktemp("disk") / "weights"
    elsewhere.write_bytes(b"weights")
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors").symlink_to(elsewhere)

    assert model_files.read(folder).shards == (folder / "model.safetensors",)


def test_a_hubs_cache_is_made_of_links_to_its_own_blobs(tmp_path: Path) -> None:
    # Given a model as the hub's client lays it out
    home = tmp_path / "models--org--name"
    revision = home / "snapshots" / "abc"
    revision.mkdir(parents=True)
    (home / "blobs").mkdir()
    write(home / "blobs" / "1", {"architectures": ["LlamaForCausalLM"]})
    (home / "blobs" / "2").write_bytes(b"weights")
    for name, blob in {"config.json": "1", "model.safetensors": "2"}.items():
        (revision / name).symlink_to(f"../../blobs/{blob}")

    # Then it is read, also by way of a link to it
    assert model_files.read(revision).architecture == "LlamaForCausalLM"
    (tmp_path / "latest").symlink_to(revision)
    assert model_files.read(tmp_path / "latest").architecture == "LlamaForCausalLM"

    # But not what lies outside the model's own blobs
    write(tmp_path / "other", {})
    (revision / "generation_config.json").symlink_to(tmp_path / "other")
    assert "leads out" in refusal(revision).message


@pytest.mark.parametrize(
    ("config", "engine"),
    [
        ({"architectures": ["LlamaForCausalLM"]}, "causal_lm"),
        ({"architectures": ["BertModel"], "model_type": "bert"}, "embedding"),
    ],
)
def test_the_architecture_chooses_the_engine(folder: Path, config: object, engine: str) -> None:
    write(folder / "config.json", config)
    files = model_files.read(folder)

    assert choice.choose("", files) == engine
    assert choice.choose("embedding", files) == "embedding"


def test_an_unknown_engine_is_refused(folder: Path) -> None:
    with pytest.raises(InvalidArgument) as refused:
        choice.choose("llama.cpp", model_files.read(folder))
    assert refused.value.reason == "UNKNOWN_ENGINE"
    assert refused.value.field == "engine"


@pytest.mark.parametrize(
    "config", [{}, {"architectures": ["ViTForImageClassification"]}, {"architectures": None}]
)
def test_an_architecture_without_an_engine_is_refused(folder: Path, config: object) -> None:
    write(folder / "config.json", config)

    with pytest.raises(FailedPrecondition) as refused:
        choice.choose("", model_files.read(folder))
    assert refused.value.reason == "MODEL_UNSUPPORTED"
