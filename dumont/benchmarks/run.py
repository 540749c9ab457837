"""A benchmark of starts: which models, which cases, how often, and in which order."""

from __future__ import annotations

import os
import shutil
import socket
import tempfile
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Final

from dumont.benchmarks import configs, plain, results
from dumont.benchmarks.machine import Gpus, has_gpu, memory_available
from dumont.benchmarks.product import Product
from dumont.benchmarks.programs import find_criu
from dumont.benchmarks.results import CASES, PLAIN, PRODUCT, Costs, Row, Sample
from dumont.benchmarks.stock import Stock
from dumont.doctor import models_dir
from dumont.engines import check_engine, check_options
from dumont.errors import FailedPrecondition, Internal, InvalidArgument, NotFound

PROMPT: Final = "The capital of France is"
MAX_NEW_TOKENS: Final = 8
MEMORY_FILE_SYSTEM: Final = Path("/dev/shm")
# In addition to four times the weights (the model, two images, the weight cache): processes, and the rest of
# the images.
ROOM_BYTES: Final = 4 << 30
READ_BYTES: Final = 16 << 20

Say = Callable[[str], None]


@dataclass(frozen=True)
class Subject:
    """A model to measure: a directory, or the configuration to generate one from."""

    name: str
    weights_bytes: int
    directory: Path | None = None


@dataclass(frozen=True)
class Plan:
    """What to measure, checked before anything begins.

    Args:
        cases: of ``results.CASES``.
        rounds: how often each of them.
        criu, cuda_checkpoint: for the case ``stock``; the latter only where there is a GPU.
        engine, engine_options: what Dumont runs the models with; empty: what their architectures call for.
    """

    subjects: tuple[Subject, ...]
    cases: tuple[str, ...]
    rounds: int
    gpus: Gpus = field(default_factory=Gpus)
    criu: Path | None = None
    cuda_checkpoint: Path | None = None
    engine: str = ""
    engine_options: Mapping[str, Any] = field(default_factory=dict)


def plan(
    models: Sequence[str],
    config_names: Sequence[str],
    cases: Sequence[str],
    rounds: int,
    cuda_checkpoint: Path | None = None,
    engine: str = "",
    engine_options: Mapping[str, Any] | None = None,
) -> Plan:
    """Decide what to measure.

    Args:
        models: directories, or names in this machine's model cache.
        config_names: architectures of ``configs.CONFIGS``.
        cases: none: all.
        rounds: at least one.
        cuda_checkpoint: the command; None: the one on the PATH.
        engine, engine_options: what Dumont runs the models with; empty: what their architectures call for.

    Raises:
        InvalidArgument: UNKNOWN_CASE, UNKNOWN_CONFIG, or what ``check_engine`` and ``check_options`` say.
        NotFound: MODEL_NOT_FOUND.
        FailedPrecondition: NOT_ROOT, CRIU_NOT_FOUND, CUDA_CHECKPOINT_NOT_FOUND.
    """
    for case in cases:
        if case not in CASES:
            raise InvalidArgument(
                "UNKNOWN_CASE",
                f"there is no case {case!r}; choose among {', '.join(CASES)}",
                field="cases",
                metadata={"case": case},
            )
    chosen = tuple(case for case in CASES if not cases or case in cases)
    measured = subjects(models, config_names)
    if os.geteuid() != 0 and not set(chosen) <= set(PLAIN):
        raise FailedPrecondition(
            "NOT_ROOT",
            "CRIU and snapshotd need root; run it with sudo --preserve-env, or measure plain cases",
        )
    criu = find_criu() if not set(chosen) <= set(PLAIN) else None
    command = _cuda_checkpoint(cuda_checkpoint) if "stock" in chosen and has_gpu() else None
    check_engine(engine)
    options = check_options(engine, engine_options or {})
    return Plan(measured, chosen, rounds, Gpus.open(), criu, command, engine, options)


def subjects(models: Sequence[str], config_names: Sequence[str]) -> tuple[Subject, ...]:
    """The models to measure.

    Args:
        models: directories, or names in this machine's model cache.
        config_names: architectures of ``configs.CONFIGS``.

    Raises:
        InvalidArgument: UNKNOWN_CONFIG.
        NotFound: MODEL_NOT_FOUND.
    """
    return (*map(_given, models), *map(_configured, config_names))


def _given(model: str) -> Subject:
    directory = next((path for path in (Path(model), models_dir() / model) if path.is_dir()), None)
    if directory is None:
        raise NotFound(
            "MODEL_NOT_FOUND",
            f"{model} is neither a directory nor a model in {models_dir()}; put it there, or take a --config",
            field="model",
            metadata={"model": model},
        )
    size = sum(path.stat().st_size for path in directory.glob("*.safetensors"))
    return Subject(model.rstrip("/").rpartition("/")[2], size, directory.absolute())


def _configured(name: str) -> Subject:
    return Subject(name, configs.weights_bytes(configs.settings_of(name)))


def _cuda_checkpoint(given: Path | None) -> Path:
    found = shutil.which(given or "cuda-checkpoint")
    if found is None:
        raise FailedPrecondition(
            "CUDA_CHECKPOINT_NOT_FOUND",
            f"{given or 'cuda-checkpoint'} is no command here, and the case stock needs it; name it with "
            "--cuda-checkpoint, or leave the case out with --cases",
        )
    return Path(found).absolute()


def check_plot() -> None:
    """Raise before anything is measured if the picture could not be drawn afterwards.

    Raises:
        FailedPrecondition: MATPLOTLIB_NOT_INSTALLED.
    """
    if find_spec("matplotlib") is None:
        raise FailedPrecondition(
            "MATPLOTLIB_NOT_INSTALLED",
            "a picture needs matplotlib; install 'dumont-services[bench]', or omit --plot",
        )


@contextmanager
def workspace(chosen: Path | None, subjects: Sequence[Subject] = ()) -> Iterator[Path]:
    """A directory for models, images and state, which is removed afterwards.

    It is below ``chosen``, else in memory if there is room, else where temporary files go.

    Args:
        subjects: whose weights are in the images, or are made.

    Raises:
        InvalidArgument: INVALID_DIRECTORY.
    """
    needed = 4 * max((subject.weights_bytes for subject in subjects), default=0) + ROOM_BYTES
    if chosen is None and MEMORY_FILE_SYSTEM.is_dir():
        free = min(shutil.disk_usage(MEMORY_FILE_SYSTEM).free, memory_available())
        chosen = MEMORY_FILE_SYSTEM if free >= needed else None
    try:
        if chosen is not None:
            chosen.mkdir(parents=True, exist_ok=True)
        made = tempfile.TemporaryDirectory(prefix="dumont-bench-", dir=chosen)
    except OSError as error:
        raise InvalidArgument(
            "INVALID_DIRECTORY",
            f"nothing can be written in {error.filename}: {error.strerror}; choose another with --directory",
            field="directory",
        ) from error
    with made as directory:
        yield Path(directory)


def measure(plan: Plan, directory: Path, say: Say) -> Iterator[list[Row]]:
    """Measure one model after the other, and yield the rows of each.

    Args:
        directory: an empty one, best in memory.
        say: told what is being done.

    Raises:
        Internal: ANSWERS_DIFFER, or a program of the bench failed.
        DumontError: what snapshotd says.
    """
    warm = False
    for subject in plan.subjects:
        place = directory / subject.name
        place.mkdir()
        model = _model(subject, place, say)
        if not warm and set(PLAIN) & set(plan.cases):
            say("one plain run that does not count, so that Python's files are in memory and compiled")
            plain.measure(model, PROMPT, MAX_NEW_TOKENS)
            warm = True
        yield _rows(plan, subject, model, place, say)
        shutil.rmtree(place)


def _model(subject: Subject, place: Path, say: Say) -> Path:
    if subject.directory is None:
        say(f"{subject.name}: making the model")
        configs.build(subject.name, place / "model")
        return place / "model"
    # The model's files are in the page cache for every case, including the first.
    buffer = bytearray(READ_BYTES)
    for path in subject.directory.glob("*.safetensors"):
        with path.open("rb", buffering=0) as file:
            while file.readinto(buffer):
                pass
    return subject.directory


def _rows(plan: Plan, subject: Subject, model: Path, place: Path, say: Say) -> list[Row]:
    samples: dict[str, list[Sample]] = defaultdict(list)
    costs: dict[str, Costs] = {}
    with ExitStack() as stack:
        stock = product = None
        if "stock" in plan.cases:
            assert plan.criu is not None
            say(f"{subject.name}: loading it and dumping it as the stock tools do")
            stock = stack.enter_context(
                Stock(model, place / "stock", plan.criu, plan.cuda_checkpoint, PROMPT, MAX_NEW_TOKENS)
            )
            costs["stock"] = stock.costs()
        if set(PRODUCT) & set(plan.cases):
            say(f"{subject.name}: starting snapshotd, loading and capturing")
            product = stack.enter_context(
                Product(
                    model, place / "node", f"127.0.0.1:{_free_port()}", PROMPT, MAX_NEW_TOKENS, plan.rounds,
                    "local" in plan.cases, plan.gpus, plan.engine, plan.engine_options,
                )
            )  # fmt: skip
        for number in range(1, plan.rounds + 1):
            taken: dict[str, Sample] = {}
            if set(PLAIN) & set(plan.cases):
                run = plain.measure(model, PROMPT, MAX_NEW_TOKENS).sample
                taken |= {"plain_cold": run, "plain_cold_after_imports": results.after_imports(run)}
            if stock is not None:
                taken["stock"] = stock.measure()
            if product is not None:
                taken |= product.measure(number)
            told = ", ".join(f"{case} {one.seconds:.2f} s" for case, one in taken.items())
            say(f"{subject.name}: round {number} of {plan.rounds}: {told}")
            for case, one in taken.items():
                samples[case].append(one)
        if product is not None:
            costs |= product.costs()
    if different := results.different_answers(samples):
        raise Internal(
            "ANSWERS_DIFFER", f"answers of {subject.name} that must be the same differ: {different}"
        )
    return results.rows(label(subject.name, plan.engine), samples, costs, plan.cases)


def label(model: str, engine: str) -> str:
    """A model's name in the results, with the engine if one was chosen for it."""
    return f"{model} ({engine})" if engine else model


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
