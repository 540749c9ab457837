"""A model directory, read and checked before anything heavy begins."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dumont import generation_config, model_directory, models
from dumont.errors import FailedPrecondition
from dumont.model_directory import Unusable

Json = dict[str, Any]


@dataclass(frozen=True)
class ModelFiles:
    """The parts of a model directory that engines read.

    Args:
        config, tokenizer_config: contents of the files so named; empty where there is none.
        generation: the contents of generation_config.json; None: there is none.
        shards: the safetensors files, in the folder or wherever else they are to be mapped from.
        chat_template: a Jinja template, if the model has one.
        names: paths of all files, relative to the folder.
    """

    folder: Path
    config: Json
    generation: Json | None
    tokenizer_config: Json
    shards: tuple[Path, ...]
    chat_template: str | None
    names: frozenset[str] = frozenset()

    @property
    def tokenizer(self) -> Path:
        return self.folder / "tokenizer.json"

    def read_tokenizer(self) -> bytes | None:
        """The contents of ``tokenizer``; None: there is no such file.

        Raises:
            FailedPrecondition: MODEL_INVALID.
        """
        return _read(self.folder, self.tokenizer) if self.tokenizer.exists() else None

    def json(self, name: str, kind: type = dict) -> Any:
        """The contents of a file, which must be a JSON value of this ``kind``.

        Raises:
            FailedPrecondition: MODEL_INVALID.
        """
        return _json(self.folder, name, kind=kind)

    @property
    def normalize(self) -> bool:
        """Whether ``modules.json`` scales vectors to length one."""
        modules = self.json(models.MODULES, kind=list) if models.MODULES in self.names else []
        return any(str(module.get("type", "")).endswith(".Normalize") for module in modules)

    @property
    def architecture(self) -> str:
        return models.architecture_of(self.config)


def read(folder: Path, weight_files: Mapping[str, Path] | None = None) -> ModelFiles:
    """Read a model directory.

    Args:
        weight_files: where a safetensors file is to be mapped from, by its name.

    Raises:
        FailedPrecondition: MODEL_INVALID; a file is missing or not what it should be, and is named.
    """
    try:
        # Also those that only a library reads.
        model_directory.check(folder)
        names = model_directory.names(folder)
    except Unusable as error:
        raise invalid(error.file, str(error)) from error
    except OSError as error:
        raise invalid(folder / "config.json", f"cannot be read: {error}") from error
    # Before the configuration, which adapters and GGUF do not have.
    shards = _shards(folder, names, weight_files or {})
    config = _json(folder, "config.json")
    tokenizer_config = _json(folder, "tokenizer_config.json", optional=True)
    return ModelFiles(
        folder=folder,
        config=config,
        generation=_json(folder, generation_config.FILE) if generation_config.FILE in names else None,
        tokenizer_config=tokenizer_config,
        shards=shards,
        names=names,
        chat_template=_chat_template(folder, tokenizer_config),
    )


def invalid(file: Path, why: str, advice: str = "Fetch the model again.") -> FailedPrecondition:
    """The error for a model file that cannot be used.

    Args:
        why: continues a sentence that begins with the file's name.
        advice: whole sentences.
    """
    return FailedPrecondition(
        "MODEL_INVALID",
        f"{file.name} in {file.parent} {why}. {advice}",
        field="model",
        metadata={"file": str(file)},
    )


def _shards(folder: Path, names: frozenset[str], elsewhere: Mapping[str, Path]) -> tuple[Path, ...]:
    try:
        needed = models.weight_files(
            str(folder), names | elsewhere.keys(), lambda: _json(folder, models.INDEX)
        )
    except ValueError as error:
        raise invalid(folder / models.INDEX, str(error)) from None
    shards = []
    for name in needed:
        shard = elsewhere.get(name, folder / name)
        try:
            model_directory.check_weights(shard)
        except FileNotFoundError:
            raise invalid(shard, "is missing") from None
        except (Unusable, OSError) as error:
            raise invalid(shard, str(error)) from error
        shards.append(shard)
    return tuple(shards)


def _chat_template(folder: Path, tokenizer_config: Json) -> str | None:
    file = folder / "chat_template.jinja"
    if file.exists():
        return _read(folder, file).decode(errors="replace")
    template = tokenizer_config.get("chat_template")
    if isinstance(template, list):  # several, by name
        template = next((entry["template"] for entry in template if entry.get("name") == "default"), None)
    return template if isinstance(template, str) else None


def _json(folder: Path, name: str, *, optional: bool = False, kind: type = dict) -> Any:
    file = folder / name
    if optional and not file.exists():
        return kind()
    try:
        content = json.loads(_read(folder, file))
    except (ValueError, RecursionError) as error:
        raise invalid(file, f"cannot be read: {error}") from error
    if not isinstance(content, kind):
        raise invalid(file, "is not what it should be")
    return content


def _read(folder: Path, file: Path) -> bytes:
    try:
        return model_directory.read(folder, file)
    except FileNotFoundError:
        raise invalid(file, "is missing") from None
    except Unusable as error:
        raise invalid(file, str(error)) from error
    except OSError as error:
        raise invalid(file, f"cannot be read: {error}") from error
