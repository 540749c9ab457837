"""The Models port: models in directories of this node, or to be downloaded from the hub."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable, Mapping
from collections.abc import Set as AbstractSet
from functools import partial
from pathlib import Path
from typing import Any

import structlog
from blake3 import blake3
from huggingface_hub import HfApi, snapshot_download
from huggingface_hub.errors import (
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
)
from safetensors import SafetensorError, safe_open

from dumont import generation_config, model_directory, models
from dumont.engines import EMBEDDING, check_engine
from dumont.errors import (
    DumontError,
    FailedPrecondition,
    InvalidArgument,
    NotFound,
    ResourceExhausted,
    Unavailable,
)
from dumont.model_directory import Unusable
from dumont.names import did_you_mean
from snapshotd.eviction import Candidate, choose
from snapshotd.model import Model, Unservable
from snapshotd.system.threads import PatientThreads

log = structlog.get_logger(__name__)

# The files that a model host reads. Others, such as other formats and pictures, are not downloaded.
WANTED = ("*.json", "*.safetensors", "*.jinja", "*.txt", "*.model")
# What a LoRA adapter is made of.
ADAPTER_CONFIG = "adapter_config.json"
ADAPTER_WEIGHTS = "adapter_model.safetensors"
HUB_TIMEOUT = 5.0
# Downloads at the same time, and the seconds that one may take. Callers usually give up earlier.
FETCHES = 4
FETCH_SECONDS = 6 * 3600.0
HUB_ID = re.compile(r"[\w.-]+(/[\w.-]+)?")


class NodeModels:
    """Models at ``<models>/<organisation>/<name>``, in the hub's cache beside them, or by path.

    Models that were fetched from the hub may be evicted when others need their space. Models that somebody
    has put here stay.

    Args:
        directory: holds the models.
        limit: bytes that fetched models may take; 0 for no limit.
        in_use: finds the names of models that instances run, which are not evicted.
    """

    def __init__(
        self, directory: Path, limit: int = 0, in_use: Callable[[], AbstractSet[str]] = frozenset
    ) -> None:
        self.directory = directory
        self.hub_cache = directory / "hub"
        self.limit = limit
        self.in_use = in_use
        self._fetched = self.hub_cache / ".fetched"
        self._reading = PatientThreads("reading the model's files")
        self._asking = PatientThreads("the hub")
        self._fetching = PatientThreads("the download of the model", FETCHES)
        # Digests of files that were read before, by what the file system says of them.
        self._digests: dict[Path, tuple[tuple[int, ...], str]] = {}

    async def resolve(self, name: str, engine: str = "") -> Model:
        check_engine(engine)
        if not name:
            raise InvalidArgument(
                "MODEL_REQUIRED", "model must name a Hugging Face id or a directory", field="model"
            )
        found = await self._reading.run(partial(self._look, name, engine), subject=name)
        if found is None:
            found = await self._asking.run(partial(self._ask_hub, name, engine))
        return found

    async def held(self) -> list[Model | Unservable]:
        return await self._reading.run(self._held)

    def _held(self) -> list[Model | Unservable]:
        held: list[Model | Unservable] = []
        for name in sorted(self._names()):
            try:
                # Being listed is no use of a model, and must not keep it from being evicted.
                found = self._look(name, "", used=False)
            except DumontError as error:
                held.append(Unservable(name, error.message))
            else:
                held += [found] if found is not None else []
        return held

    def _names(self) -> set[str]:
        """The names of the models that lie here, as a deployment would name them."""
        found = {
            folder.name.removeprefix("models--").replace("--", "/")
            for folder in self.hub_cache.glob("models--*")
        }
        for config in (*self.directory.glob("*/config.json"), *self.directory.glob("*/*/config.json")):
            found.add(config.parent.relative_to(self.directory).as_posix())
        return {name for name in found if HUB_ID.fullmatch(name)}

    def _not_found(self, name: str, why: str) -> NotFound:
        # A directory that does not answer must not keep the caller waiting for a suggestion.
        try:
            near = did_you_mean(name, self._names())
        except OSError:
            near = ""
        return _not_found(name, why, near)

    async def find(self, name: str, engine: str = "") -> Model | None:
        try:
            return await self._reading.run(partial(self._look, name, engine), subject=name)
        except NotFound:
            # A directory; no hub has it.
            return None

    def _look(self, name: str, engine: str, used: bool = True) -> Model | None:
        found = self._find(name, used)
        return None if found is None else _describe(name, found, engine)

    async def adapter(self, directory: str) -> Model:
        return await self._reading.run(partial(_describe_adapter, Path(directory)), subject=directory)

    async def digests(self, model: Model) -> Mapping[str, str]:
        return await self._reading.run(partial(self._digest_all, model), subject=model.name)

    def _digest_all(self, model: Model) -> Mapping[str, str]:
        folder = model.directory
        if folder is None:
            return {}
        try:
            files = model_directory.files(folder)
            return {path.relative_to(folder).as_posix(): self._digest(folder, path) for path in files}
        except Unusable as error:
            raise _invalid(model.name, f"{error.file.name} {error}") from None
        except OSError as error:
            raise _invalid(model.name, f"its files cannot be read: {error.strerror}") from None

    def _digest(self, folder: Path, path: Path) -> str:
        try:
            status = path.stat()
        except FileNotFoundError:  # a link that leads nowhere
            return ""
        identity = (status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns)
        known = self._digests.get(path)
        if known is None or known[0] != identity:
            digest = blake3(model_directory.read(folder, path)).hexdigest()
            known = self._digests[path] = (identity, digest)
        return known[1]

    async def fetch(self, model: Model) -> Model:
        if model.directory is not None:
            return model
        await self._reading.run(partial(self._make_room, model))
        log.info("model_download_started", model=model.name, bytes=model.weights_bytes)
        try:
            download = partial(
                snapshot_download, model.name, cache_dir=self.hub_cache, allow_patterns=list(WANTED)
            )
            # Before it is there: what a download leaves that breaks off takes room, too.
            await self._reading.run(partial(self._note_fetched, model.name))
            folder = await self._fetching.run(download, FETCH_SECONDS)
        except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
            raise Unavailable("MODEL_FETCH_FAILED", f"{model.name} could not be fetched: {error}") from error
        describe = partial(_describe, model.name, Path(folder), model.engine)
        return await self._reading.run(describe, subject=model.name)

    def _note(self, name: str) -> Path:
        """A file that marks a model as fetched; its time is that of the last use."""
        return self._fetched / name.replace("/", "--")

    def _note_fetched(self, name: str) -> None:
        self._fetched.mkdir(mode=0o700, parents=True, exist_ok=True)
        self._note(name).write_text(name)

    def _make_room(self, model: Model) -> None:
        """Evict the least recently used fetched models until this one fits.

        Raises:
            ResourceExhausted: MODELS_FULL, it does not fit even without them.
        """
        if not self.limit:
            return
        in_use = self.in_use()
        notes = {note.read_text(): note for note in self._fetched.glob("*")} if self._fetched.is_dir() else {}
        held = [
            Candidate(name, _size(self._hub_folder(name)), note.stat().st_mtime, name not in in_use)
            for name, note in notes.items()
            # A download that broke off goes on.
            if name != model.name
        ]
        leaving, excess = choose(held, self.limit, model.weights_bytes)
        if excess:
            raise ResourceExhausted(
                "MODELS_FULL",
                f"{model.name} takes {model.weights_bytes} bytes; fetched models may take {self.limit}, and "
                f"those in use leave {excess} too few; raise --models-bytes, or stop instances",
                metadata={"needed": str(model.weights_bytes), "limit": str(self.limit)},
            )
        for name in leaving:
            log.info("model_evicted", model=name)
            # Mapped files stay until the process that maps them ends.
            shutil.rmtree(self._hub_folder(name), ignore_errors=True)
            notes[name].unlink(missing_ok=True)

    def _hub_folder(self, name: str) -> Path:
        return self.hub_cache / f"models--{name.replace('/', '--')}"

    def _find(self, name: str, used: bool) -> Path | None:
        if name.startswith("/"):
            path = Path(name)
            if not path.is_dir():
                raise self._not_found(name, "it is not a directory on this node")
            return path
        if not HUB_ID.fullmatch(name) or ".." in name:
            raise InvalidArgument(
                "INVALID_MODEL",
                "model must be a Hugging Face id like organisation/name or an absolute path; "
                f"got {name[:120]!r}",
                field="model",
                metadata={"model": name[:120]},
            )
        if (self.directory / name).is_dir():
            return self.directory / name
        try:
            found = Path(snapshot_download(name, cache_dir=self.hub_cache, local_files_only=True))
            if used and (note := self._note(name)).exists():
                note.touch()
            return found
        except (LocalEntryNotFoundError, HFValidationError, FileNotFoundError):
            return None

    def _ask_hub(self, name: str, engine: str) -> Model:
        try:
            info = HfApi().model_info(name, files_metadata=True, timeout=HUB_TIMEOUT)
        except (RepositoryNotFoundError, HFValidationError):
            raise self._not_found(name, "neither this node nor the hub has it") from None
        except Exception as error:
            # The hub may not be reachable, or a proxy may answer in its place.
            raise self._not_found(
                name, f"this node does not have it and the hub did not answer ({type(error).__name__})"
            ) from error
        config = info.config or {}
        sizes = {file.rfilename: file.size or 0 for file in info.siblings or []}
        # As for a directory, the format of the weights comes first.
        if not sizes.keys() & {models.WEIGHTS, models.INDEX}:
            models.weight_files(name, sizes.keys(), dict)
            raise _invalid(name, "it has no safetensors weights")
        kind = models.engine_of(name, config, sizes.keys(), engine)
        weights = sum(size for file, size in sizes.items() if file.endswith(".safetensors"))
        return Model(name, kind, None, (), weights, 0)


def _size(folder: Path) -> int:
    # The hub's cache links each file to its one blob.
    return sum(path.lstat().st_size for path in folder.rglob("*") if path.is_file() and not path.is_symlink())


def _weight_files(name: str, directory: Path, files: AbstractSet[str]) -> list[str]:
    index = directory / models.INDEX
    try:
        return models.weight_files(name, files, lambda: json.loads(_read(name, directory, index)))
    except (ValueError, RecursionError) as error:
        why = "has no weight_map" if isinstance(error, json.JSONDecodeError | RecursionError) else error
        raise _invalid(name, f"{index.name} {why}") from None


def _describe(name: str, directory: Path, engine: str) -> Model:
    try:
        files = model_directory.names(directory)
    except Unusable as error:
        raise _invalid(name, f"{error.file.name} {error}") from None
    except OSError as error:
        raise _invalid(name, f"its files cannot be read: {error.strerror}") from None
    # Before the configuration, which adapters and GGUF do not have.
    weights = tuple(directory / file for file in _weight_files(name, directory, files))
    config = _json(name, directory, "config.json")
    for path in weights:
        _check_weights(name, path)
    kind = models.engine_of(name, config, files, engine)
    if kind != EMBEDDING:
        asked = generation_config.FILE in files
        generation_config.read(
            name, config, _json(name, directory, generation_config.FILE) if asked else None
        )
    return Model(
        name=name,
        engine=kind,
        directory=directory,
        weights=weights,
        weights_bytes=sum(path.stat().st_size for path in weights),
        context_length=length if isinstance(length := config.get("max_position_embeddings"), int) else 0,
    )


def _json(name: str, directory: Path, file: str) -> dict[str, Any]:
    try:
        content = json.loads(_read(name, directory, directory / file))
    except (ValueError, RecursionError) as error:
        raise _invalid(name, f"{file} is not JSON: {error}") from None
    if not isinstance(content, dict):
        raise _invalid(name, f"{file} is no JSON object")
    return content


def _describe_adapter(directory: Path) -> Model:
    name = str(directory)
    _read(name, directory, directory / ADAPTER_CONFIG)
    # Of its other formats, some run code when they are read.
    weights = directory / ADAPTER_WEIGHTS
    _check_weights(name, weights)
    return Model(name, "", directory, (weights,), weights.stat().st_size, 0)


def _read(name: str, directory: Path, path: Path) -> bytes:
    try:
        return model_directory.read(directory, path)
    except FileNotFoundError:
        raise _invalid(name, f"{path.name} is missing") from None
    except Unusable as error:
        raise _invalid(name, f"{path.name} {error}") from None
    except OSError as error:
        raise _invalid(name, f"{path.name} cannot be read: {error.strerror}") from None


def _check_weights(name: str, path: Path) -> None:
    """Refuse a file that is missing, cut short or no safetensors file, from its header and length."""
    try:
        model_directory.check_weights(path)
        with safe_open(path, framework="np"):
            pass
    except FileNotFoundError:
        raise _invalid(name, f"{path.name} is missing") from None
    except Unusable as error:
        raise _invalid(name, f"{path.name} {error}") from None
    except SafetensorError as error:
        raise _invalid(name, f"{path.name} is damaged or cut short: {error}") from None
    except OSError as error:
        raise _invalid(name, f"{path.name} cannot be read: {error.strerror or error}") from None


def _not_found(name: str, why: str, near: str) -> NotFound:
    advice = "; put it into the node's model directory, or check its id: `dumont models` lists what there is"
    return NotFound(
        "MODEL_NOT_FOUND",
        f"there is no model {name[:120]!r}: {why}{near or advice}",
        field="model",
        metadata={"model": name[:120]},
    )


def _invalid(name: str, why: str) -> FailedPrecondition:
    return FailedPrecondition(
        "MODEL_INVALID",
        f"the model {name[:120]!r} cannot be loaded: {why}",
        field="model",
        metadata={"model": name[:120]},
    )
