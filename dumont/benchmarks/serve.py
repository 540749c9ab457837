"""How many callers are served at once, and how fast: Dumont through its services and directly, and beside it
what transformers and vLLM do with the same prompts on the same machine.
"""

from __future__ import annotations

import json
import os
import random
import select
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final, Self

from dumont import sync
from dumont.benchmarks import configs
from dumont.benchmarks.programs import environment, interrupts_held, run, script, tail
from dumont.benchmarks.run import Subject, label
from dumont.benchmarks.serving import DIRECT, ENGINES, SERVICES, Case, Row, Stream, Wave, row
from dumont.engines import check_engine, check_options
from dumont.errors import DeadlineExceeded, FailedPrecondition, Internal, InvalidArgument

DEPLOYMENT: Final = "bench"
START_SECONDS: Final = 900.0
STOP_SECONDS: Final = 60.0
WAVE_SECONDS: Final = 1800.0
# Seconds between the order and the moment at which all generators send.
HEAD_START: Final = 0.1
STREAMS_PER_GENERATOR: Final = 16
WORDS: Final = ("the", "of", "and", "to", "in", "is", "was", "for", "on", "that", "by", "with", "as", "at")

Say = Callable[[str], None]


@dataclass(frozen=True)
class Plan:
    """What to measure.

    Args:
        cases: every load, for each engine.
        wakes: loads that a sleeping deployment is met with; its instance is stopped before each.
        rounds: how often each load, after one that does not count.
        engines: of ``serving.ENGINES``.
        vllm_site: a directory with vLLM in it, put before the path of its process; None: none.
        vllm_arguments: further ones of vLLM's engine, where it runs beside Dumont.
        engine, engine_options: what Dumont runs the models with; empty: what their architectures call for.
    """

    subjects: tuple[Subject, ...]
    cases: tuple[Case, ...]
    wakes: tuple[Case, ...]
    rounds: int
    engines: tuple[str, ...]
    vllm_site: Path | None = None
    vllm_arguments: Mapping[str, Any] = field(default_factory=dict)
    engine: str = ""
    engine_options: Mapping[str, Any] = field(default_factory=dict)


def plan(
    subjects: Sequence[Subject],
    *,
    streams: Sequence[int],
    wakes: Sequence[int],
    prompt_tokens: Sequence[int],
    answer_tokens: Sequence[int],
    rounds: int,
    engines: Sequence[str],
    vllm_site: Path | None,
    vllm_arguments: Mapping[str, Any],
    engine: str = "",
    engine_options: Mapping[str, Any] | None = None,
) -> Plan:
    """Decide what to measure; without ``engines``, every engine that this machine has.

    Raises:
        InvalidArgument: UNKNOWN_ENGINE, or what ``check_engine`` and ``check_options`` say.
        FailedPrecondition: VLLM_NOT_INSTALLED, it was asked for by name.
    """
    check_engine(engine)
    options = check_options(engine, engine_options or {})
    for compared in engines:
        if compared not in ENGINES:
            raise InvalidArgument(
                "UNKNOWN_ENGINE",
                f"there is no engine {compared!r} to compare; choose among {', '.join(ENGINES)}",
                field="engines",
                metadata={"engine": compared},
            )
    chosen = tuple(one for one in ENGINES if not engines or one in engines)
    if "vllm" in chosen and not _has_vllm(vllm_site):
        if "vllm" in engines:
            raise FailedPrecondition(
                "VLLM_NOT_INSTALLED",
                "vllm cannot be imported; name a directory that has it with --vllm-site, or leave it out "
                "with --engines",
            )
        chosen = tuple(one for one in chosen if one != "vllm")
    lengths = [(prompt, answer) for prompt in prompt_tokens for answer in answer_tokens]
    return Plan(
        tuple(subjects),
        tuple(Case(count, *length) for length in lengths for count in streams),
        tuple(Case(count, *lengths[0]) for count in wakes),
        rounds,
        chosen,
        vllm_site,
        vllm_arguments,
        engine,
        options,
    )


def _has_vllm(site: Path | None) -> bool:
    command = [
        sys.executable,
        "-c",
        "import importlib.util, sys; sys.exit(not importlib.util.find_spec('vllm'))",
    ]
    return run(command, env=_with_site(site)).returncode == 0


def _with_site(site: Path | None) -> dict[str, str]:
    if site is None:
        return environment()
    known = os.environ.get("PYTHONPATH", "")
    return environment() | {"PYTHONPATH": os.pathsep.join(filter(None, (str(site.absolute()), known)))}


def measure(plan: Plan, directory: Path, say: Say) -> Iterator[list[Row]]:
    """The rows of one engine of one model after the other.

    Args:
        directory: an empty one, for models that are made and the services' state.
        say: told what is being done.

    Raises:
        Internal: a program of the bench failed.
        DumontError: what the services say.
    """
    for subject in plan.subjects:
        place = directory / subject.name
        place.mkdir()
        model = subject.directory or place / "model"
        if subject.directory is None:
            say(f"{subject.name}: making the model")
            configs.build(subject.name, model)
        prompts = Prompts(model)
        for engine in plan.engines:
            ways = {"dumont": _dumont, "generate": _generate, "vllm": _vllm}
            yield from ways[engine](plan, subject.name, model, prompts, place, say)
        shutil.rmtree(place)


class Prompts:
    """Texts of a given number of tokens, each used only once.

    Args:
        model: the directory of the model that reads them.
    """

    def __init__(self, model: Path) -> None:
        from tokenizers import Tokenizer

        self._tokenizer = Tokenizer.from_file(str(model / "tokenizer.json"))
        self._random = random.Random(0)

    def take(self, count: int, tokens: int) -> list[str]:
        """So many new texts, each of so many tokens."""
        return [self._one(tokens) for _ in range(count)]

    def ids(self, text: str) -> list[int]:
        """The tokens of a text, as the model reads them."""
        ids: list[int] = self._tokenizer.encode(text).ids
        return ids

    def _one(self, tokens: int) -> str:
        for _ in range(100):
            text = ""
            while (length := len(self.ids(text))) < tokens:
                text += f"{self._random.choice(WORDS)} "
            while length > tokens:
                text = text[:-1]
                length = len(self.ids(text))
            if length == tokens:
                return text
        raise Internal("NO_PROMPT", f"no text of exactly {tokens} tokens was found for this tokenizer")


# Dumont


def _dumont(
    plan: Plan, model_name: str, model: Path, prompts: Prompts, place: Path, say: Say
) -> Iterator[list[Row]]:
    model_name = label(model_name, plan.engine)
    mode = "checkpoint" if plan.wakes else "warm"
    say(f"{model_name}: starting the services and loading")
    with Services(place / "node") as services, sync.Client(services.controller) as client:
        deployment = client.deploy(
            str(model), mode, name=DEPLOYMENT, idle_timeout=86400,
            engine=plan.engine or None, engine_options=plan.engine_options or None,
        )  # fmt: skip
        deployment.generate(prompts.take(1, 4)[0], max_new_tokens=1)
        (instance,) = client.instances.find(DEPLOYMENT)
        directory = services.socket(instance.name).parent
        ways = {
            SERVICES: ((services.controller, f"deployments/{DEPLOYMENT}"), None),
            DIRECT: (("unix:host.sock", ""), directory),
        }
        for path, (arguments, cwd) in ways.items():
            with Generators(arguments, _generators(plan.cases), cwd) as generators:
                rows = []
                for case in plan.cases:
                    waves = _waves(plan.rounds, case, prompts, generators.wave)
                    rows.append(row(model_name, "dumont", path, case, waves))
                    say(_line(rows[-1]))
            yield rows
        if plan.wakes:
            arguments, cwd = ways[SERVICES]
            with Generators(arguments, _generators(plan.wakes), cwd) as generators:
                rows = []
                for case in plan.wakes:
                    waves = []
                    for _ in range(plan.rounds):
                        for found in client.instances.find(DEPLOYMENT):
                            client.instances.stop(found.name)
                        waves.append(
                            generators.wave(
                                prompts.take(case.streams, case.prompt_tokens), case.answer_tokens
                            )
                        )
                    rows.append(row(model_name, "dumont", SERVICES, case, waves))
                    say(_line(rows[-1]))
            yield rows


def _generators(cases: Sequence[Case]) -> int:
    """As many generators as needed, while the services and the model have cores left."""
    most = max(case.streams for case in cases)
    cores = len(os.sched_getaffinity(0))
    return max(1, min(cores // 4, most // STREAMS_PER_GENERATOR))


def _waves(rounds: int, case: Case, prompts: Prompts, wave: Callable[[list[str], int], Wave]) -> list[Wave]:
    """Measure one round that does not count, and then the rounds."""
    taken = [
        wave(prompts.take(case.streams, case.prompt_tokens), case.answer_tokens) for _ in range(rounds + 1)
    ]
    return taken[1:]


class Services:
    """A controller and a snapshotd that run while this is entered, as ``dumont up`` runs them.

    Args:
        directory: for their state and logs.

    Raises:
        FailedPrecondition: SERVICE_ENDED, they do not serve.
    """

    def __init__(self, directory: Path) -> None:
        self._state = directory

    def __enter__(self) -> Self:
        ports = [_free_port(), _free_port()]
        self.controller = f"127.0.0.1:{ports[0]}"
        arguments = [
            "--state-dir", str(self._state), "--controller-port", str(ports[0]),
            "--snapshotd-port", str(ports[1]), "--json",
        ]  # fmt: skip
        self._process = Program(
            [sys.executable, "-m", "dumont.cli.main", "up", *arguments], self._state / "up.log"
        )
        self._process.__enter__()
        return self

    def __exit__(self, *_: object) -> None:
        self._process.__exit__()

    def pids(self) -> dict[str, int]:
        """The processes of the services, by name."""
        children = Path(f"/proc/{self._process.pid}/task/{self._process.pid}/children").read_text().split()
        lines = {int(pid): Path(f"/proc/{pid}/cmdline").read_text() for pid in children}
        modules = {"controller": "controller.main", "snapshotd": "snapshotd.main"}
        return {
            name: next(pid for pid, line in lines.items() if module in line)
            for name, module in modules.items()
        }

    def socket(self, instance: str) -> Path:
        """The address of an instance's model host."""
        return next(self._state.glob(f"**/{instance.removeprefix('instances/')}/host.sock"))


class Generators:
    """Load generators of the same target, which send at the same moment.

    Args:
        arguments: of ``dumont.benchmarks.load``.
        count: how many.
        cwd: where they run; None: here.
    """

    def __init__(self, arguments: tuple[str, str], count: int, cwd: Path | None) -> None:
        command = [sys.executable, "-m", "dumont.benchmarks.load", *arguments]
        self._programs = [Program(command, cwd=cwd) for _ in range(count)]

    def __enter__(self) -> Self:
        with ExitStack() as stack:
            for program in self._programs:
                stack.enter_context(program)
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def pids(self) -> list[int]:
        """The process ids of the generators."""
        return [program.pid for program in self._programs]

    def wave(self, prompts: list[str], answer_tokens: int, head_start: float = HEAD_START) -> Wave:
        """Send a request for each prompt, all at once, and wait for every answer."""
        at = time.monotonic() + head_start
        used = self._programs[: len(prompts)]
        for number, program in enumerate(used):
            share = prompts[number :: len(used)]
            program.tell({"at": at, "prompts": share, "answer_tokens": answer_tokens})
        told = [program.hear(WAVE_SECONDS) for program in used]
        streams = tuple(Stream.of(stream) for one in told for stream in one["streams"])
        return Wave(streams, max(one["client_load"] for one in told))


# Beside it


def _generate(
    plan: Plan, model_name: str, model: Path, prompts: Prompts, place: Path, say: Say
) -> Iterator[list[Row]]:
    say(f"{model_name}: loading with transformers")
    command = [sys.executable, str(script("static_batch")), str(model)]
    yield _compared(plan, "generate", model_name, prompts, Program(command, place / "generate.log"), say)


def _vllm(
    plan: Plan, model_name: str, model: Path, prompts: Prompts, place: Path, say: Say
) -> Iterator[list[Row]]:
    say(f"{model_name}: loading with vLLM")
    most = max(case.streams for case in plan.cases)
    tokens = max(case.prompt_tokens + case.answer_tokens for case in plan.cases)
    command = [
        sys.executable, str(script("vllm_batch")), str(model), str(most), str(tokens),
        json.dumps(dict(plan.vllm_arguments)),
    ]  # fmt: skip
    program = Program(command, place / "vllm.log", env=_with_site(plan.vllm_site))
    yield _compared(plan, "vllm", model_name, prompts, program, say)


def _compared(
    plan: Plan, engine: str, model_name: str, prompts: Prompts, program: Program, say: Say
) -> list[Row]:
    def wave(texts: list[str], answer_tokens: int) -> Wave:
        ids = [prompts.ids(text) for text in texts]
        program.tell({"prompts": ids, "answer_tokens": answer_tokens})
        return Wave(tuple(map(Stream.of, program.hear(WAVE_SECONDS)["streams"])))

    rows = []
    with program:
        for case in plan.cases:
            rows.append(row(model_name, engine, DIRECT, case, _waves(plan.rounds, case, prompts, wave)))
            say(_line(rows[-1]))
    return rows


class Program:
    """A program that prints a line of JSON when it is ready, and another after each line that it reads.

    Args:
        command: it and its arguments.
        log: where its standard error goes; None: nowhere.
        cwd: where it runs; None: here.
        env: its environment; None: that of ``programs.environment``.

    Raises:
        FailedPrecondition: SERVICE_ENDED, it ended.
        DeadlineExceeded: STEP_TIMEOUT, it said nothing for too long.
    """

    def __init__(
        self,
        command: Sequence[str],
        log: Path | None = None,
        cwd: Path | None = None,
        env: Mapping[str, str] | None = None,
    ) -> None:
        self._command = command
        self._log = log
        self._cwd = cwd
        self._env = env
        self._said = b""

    def __enter__(self) -> Self:
        if self._log is not None:
            self._log.parent.mkdir(parents=True, exist_ok=True)
        with Path(self._log or os.devnull).open("ab") as log, interrupts_held():
            self._process = subprocess.Popen(
                self._command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                cwd=self._cwd,
                env=environment() if self._env is None else self._env,
                start_new_session=True,
            )
        try:
            self.hear(START_SECONDS)
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        process = self._process
        process.terminate()
        try:
            process.wait(STOP_SECONDS)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        for pipe in (process.stdin, process.stdout):
            if pipe is not None:
                pipe.close()

    @property
    def pid(self) -> int:
        """The process id."""
        return self._process.pid

    def tell(self, message: Mapping[str, Any]) -> None:
        """Send the program a message as a line of JSON."""
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(message).encode() + b"\n")
        self._process.stdin.flush()

    def hear(self, seconds: float) -> Any:
        """The next line that the program prints."""
        assert self._process.stdout is not None
        output = self._process.stdout.fileno()
        deadline = time.monotonic() + seconds
        while b"\n" not in self._said:
            if not select.select([output], [], [], max(0.0, deadline - time.monotonic()))[0]:
                raise DeadlineExceeded(
                    "STEP_TIMEOUT", f"{self._name} said nothing for {seconds:.0f} seconds; {self._ending}"
                )
            if not (said := os.read(output, 1 << 20)):
                raise FailedPrecondition("SERVICE_ENDED", f"{self._name} ended; {self._ending}")
            self._said += said
        line, _, self._said = self._said.partition(b"\n")
        return json.loads(line)

    @property
    def _name(self) -> str:
        return " ".join(self._command[1:4])

    @property
    def _ending(self) -> str:
        return f"its log ends: {tail(self._log)}" if self._log else "it keeps no log"


def _line(found: Row) -> str:
    first = f", first token {found.first_token.p50:.3f} s" if found.first_token else ""
    case = found.case
    load = f"{case.streams} streams of {case.prompt_tokens}+{case.answer_tokens} tokens"
    return f"{found.model}: {found.engine} ({found.path}), {load}: {found.tokens_per_s:,.0f} tokens/s{first}"


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
