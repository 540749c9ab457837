"""``dumont bench``."""

from __future__ import annotations

import json as json_codec
import signal
import socket
import sys
from collections.abc import Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from dumont.cli.output import Json, command, console, print_facts, print_json, size, table

if TYPE_CHECKING:
    from dumont.benchmarks.results import Row
    from dumont.benchmarks.run import Plan, Subject
    from dumont.benchmarks.serve import Plan as ServePlan

MODEL = "HuggingFaceTB/SmolLM2-135M-Instruct"


@command
def bench(
    store: Annotated[bool, typer.Option("--store", help="Measure the object store, not the starts.")] = False,
    serve: Annotated[
        bool, typer.Option("--serve", help="Measure tokens for many callers at once, not the starts.")
    ] = False,
    model: Annotated[
        list[str] | None,
        typer.Option(
            help="In the model cache of this machine, or a directory. May be repeated.", show_default=MODEL
        ),
    ] = None,
    config: Annotated[
        list[str] | None,
        typer.Option(
            help="An architecture to make a random model of: qwen3-0.6b, qwen2-7.6b, qwen3-tiny. "
            "May be repeated."
        ),
    ] = None,
    cases: Annotated[
        str,
        typer.Option(
            help="Some of plain_cold, plain_cold_after_imports, cold, parked, local, stock, by comma.",
            show_default="all",
        ),
    ] = "",
    rounds: Annotated[int, typer.Option(min=1, help="How often each case is measured.")] = 3,
    cuda_checkpoint: Annotated[
        Path | None,
        typer.Option(help="For the case stock on a GPU.", show_default="cuda-checkpoint on the PATH"),
    ] = None,
    relay: Annotated[
        bool,
        typer.Option(
            "--relay", help="Measure what passing a token through the services costs, not the starts."
        ),
    ] = False,
    mixed: Annotated[
        bool,
        typer.Option(
            "--mixed", help="Watch the memory under requests of every kind, parks and captures; no speeds."
        ),
    ] = False,
    minutes: Annotated[float, typer.Option(min=0.1, help="With --mixed: how long.")] = 60.0,
    streams: Annotated[
        str,
        typer.Option(
            help="With --serve and --relay: how many answers at once, by comma; with --mixed, the largest."
        ),
    ] = "1,8,32",
    prompt_tokens: Annotated[str, typer.Option(help="With --serve: tokens of a prompt, by comma.")] = "32",
    answer_tokens: Annotated[str, typer.Option(help="With --serve: tokens of an answer, by comma.")] = "128",
    wake: Annotated[
        str, typer.Option(help="With --serve: how many requests meet a sleeping deployment, by comma.")
    ] = "",
    engines: Annotated[
        str,
        typer.Option(
            help="With --serve: some of dumont, generate, vllm, by comma.", show_default="all available"
        ),
    ] = "",
    engine: Annotated[
        str,
        typer.Option(
            help="What Dumont runs the models with: causal_lm, embedding or vllm.",
            show_default="what their architectures call for",
        ),
    ] = "",
    engine_options: Annotated[str, typer.Option(help="With --engine: its options, as a JSON object.")] = "{}",
    vllm_site: Annotated[
        Path | None,
        typer.Option(
            envvar="DUMONT_BENCH_VLLM_SITE",
            help="With --serve: a directory with vLLM in it, where it is not installed.",
        ),
    ] = None,
    vllm_arguments: Annotated[
        str, typer.Option(help="With --serve: further arguments of vLLM's engine, as a JSON object.")
    ] = "{}",
    directory: Annotated[
        Path | None,
        typer.Option(
            help="For snapshots and generated models; by default memory, if there is room, or a "
            "temporary directory."
        ),
    ] = None,
    plot: Annotated[Path | None, typer.Option(help="Draw the phases of all starts into this PNG.")] = None,
    output: Annotated[Path | None, typer.Option(help="Write the JSON into this file as well.")] = None,
    json: Json = False,
) -> None:
    """Measure this machine, with services started for it. Needs root, and an idle machine for valid figures.

    Measured are the ways to a first token, of plain scripts, of Dumont and of the stock tools; with --store,
    the store that DUMONT_SNAPSHOTD_STORE_URL and S3_* in the environment name; with --serve, how fast many
    callers are answered at once, by Dumont and by other engines; with --relay, how many messages the services
    carry and what they cost, whatever the model; with --mixed, whether memory stays flat.
    """
    from dumont.up import check_installed

    check_installed()
    kinds = {"--store": store, "--serve": serve, "--relay": relay, "--mixed": mixed}
    if sum(kinds.values()) > 1:
        given = " and ".join(name for name, asked in kinds.items() if asked)
        raise typer.BadParameter(f"{given} are different benchmarks; run one after the other")
    if mixed and len([*(model or []), *(config or [])]) > 1:
        raise typer.BadParameter("--mixed takes one model")
    for file in (plot, output):
        if file:
            # Now rather than after hours of measuring.
            try:
                file.absolute().parent.mkdir(parents=True, exist_ok=True)
            except OSError as error:
                raise typer.BadParameter(f"{file} cannot be written: {error}") from error
    # A benchmark that is ended must end what it has started, frozen processes included.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    if store:
        _store((model or [MODEL])[0], directory, as_json=json)
        return
    if relay:
        _relay(_counts(streams, "--streams"), directory, output, as_json=json)
        return
    from dumont.benchmarks import run

    if plot:
        run.check_plot()
    chosen = [case.strip() for case in cases.split(",") if case.strip()]
    models = model or ([] if config else [MODEL])
    if mixed:
        _mixed(
            run.subjects(models, config or [])[0], max(_counts(streams, "--streams")), minutes * 60,
            directory, output, as_json=json,
        )  # fmt: skip
        return
    if serve:
        from dumont.benchmarks import serve as serving

        serve_plan = serving.plan(
            run.subjects(models, config or []),
            streams=_counts(streams, "--streams"),
            wakes=_counts(wake, "--wake") if wake else [],
            prompt_tokens=_counts(prompt_tokens, "--prompt-tokens"),
            answer_tokens=_counts(answer_tokens, "--answer-tokens"),
            rounds=rounds,
            engines=[name.strip() for name in engines.split(",") if name.strip()],
            vllm_site=vllm_site,
            vllm_arguments=_object(vllm_arguments, "--vllm-arguments"),
            engine=engine,
            engine_options=_object(engine_options, "--engine-options"),
        )
        _serve(serve_plan, directory, plot, output, as_json=json)
        return
    options = _object(engine_options, "--engine-options")
    plan = run.plan(models, config or [], chosen, rounds, cuda_checkpoint, engine, options)
    _starts(plan, directory, plot, output, as_json=json)


def _starts(
    plan: Plan, directory: Path | None, plot: Path | None, output: Path | None, *, as_json: bool
) -> None:
    from dumont.benchmarks import machine, report, run

    progress = console(stderr=True)
    facts = machine.facts(plan.gpus, plan.criu)
    began = datetime.now(UTC).isoformat(timespec="seconds")
    found: list[Row] = []

    def document() -> dict[str, Any]:
        return report.document(
            facts, found, date=began, command=["dumont", *sys.argv[1:]], prompt=run.PROMPT, rounds=plan.rounds
        )

    shown = progress if as_json else console()
    # After each model, so that a failure with the next one loses nothing.
    try:
        with run.workspace(directory, plan.subjects) as place:
            progress.print(f"in {place}")
            for rows in run.measure(plan, place, progress.print):
                found += rows
                _save(found, document(), facts, plot, output)
    finally:
        if found:
            shown.print(table(report.HEADERS, map(report.cells, found)))
        for row in found:
            shown.print(report.phase_line(row), soft_wrap=True)
    if as_json:
        print_json(document())


def _serve(
    plan: ServePlan, directory: Path | None, plot: Path | None, output: Path | None, *, as_json: bool
) -> None:
    from dumont.benchmarks import machine, run, serve, serving

    progress = console(stderr=True)
    facts = machine.facts(machine.Gpus.open(), None)
    began = datetime.now(UTC).isoformat(timespec="seconds")
    found: list[serving.Row] = []

    def document() -> dict[str, Any]:
        return {
            "machine": facts,
            "date": began,
            "command": ["dumont", *sys.argv[1:]],
            "rows": [serving.document(row) for row in found],
        }

    # After each engine, so that a failure with the next one loses nothing.
    try:
        with run.workspace(directory, plan.subjects) as place:
            progress.print(f"in {place}")
            for rows in serve.measure(plan, place, progress.print):
                found += rows
                if output:
                    output.write_text(json_codec.dumps(document(), indent=2) + "\n")
                if plot:
                    from dumont.benchmarks.plot import draw_serving

                    draw_serving(plot, found, facts)
    finally:
        if found:
            shown = progress if as_json else console()
            shown.print(table(serving.HEADERS, map(serving.cells, found)))
    if as_json:
        print_json(document())


def _relay(streams: list[int], directory: Path | None, output: Path | None, *, as_json: bool) -> None:
    from dumont.benchmarks import machine, relay, run

    progress = console(stderr=True)
    with run.workspace(directory) as place:
        found = list(relay.measure(streams, place, progress.print))
    document = {
        "machine": machine.facts(machine.Gpus.open(), None),
        "rows": [relay.document(row) for row in found],
    }
    (progress if as_json else console()).print(table(relay.HEADERS, map(relay.cells, found)))
    if output:
        output.write_text(json_codec.dumps(document, indent=2) + "\n")
    if as_json:
        print_json(document)


def _mixed(
    subject: Subject, streams: int, seconds: float, directory: Path | None, output: Path | None, *,
    as_json: bool,
) -> None:  # fmt: skip
    from dumont.benchmarks import machine, mixed, run

    progress = console(stderr=True)
    with run.workspace(directory, [subject]) as place:
        found = mixed.measure(subject, streams, seconds, place, progress.print)
    document = {
        "machine": machine.facts(machine.Gpus.open(), None),
        "command": ["dumont", *sys.argv[1:]],
        "model": subject.name,
        **mixed.document(found, streams, seconds),
    }
    shown = progress if as_json else console()
    shown.print(table(mixed.HEADERS, mixed.rows(found)))
    for name, value in mixed.told(found).items():
        shown.print(f"{name}: {value}", soft_wrap=True)
    if output:
        output.write_text(json_codec.dumps(document, indent=2) + "\n")
    if as_json:
        print_json(document)


def _counts(text: str, option: str) -> list[int]:
    """The numbers of a list by comma."""
    try:
        counts = [int(part) for part in text.split(",")]
    except ValueError:
        counts = []
    if not counts or min(counts) < 1:
        raise typer.BadParameter(f"{option} takes whole numbers from 1, by comma, like 1,8,32; got {text!r}")
    return counts


def _object(text: str, option: str) -> dict[str, Any]:
    try:
        value = json_codec.loads(text)
    except ValueError:
        value = None
    if not isinstance(value, dict):
        raise typer.BadParameter(f'{option} takes a JSON object, like {{"max_num_seqs": 64}}; got {text!r}')
    return value


def _save(
    rows: Sequence[Row],
    document: dict[str, Any],
    facts: dict[str, Any],
    plot: Path | None,
    output: Path | None,
) -> None:
    if output:
        output.write_text(json_codec.dumps(document, indent=2) + "\n")
    if plot:
        from dumont.benchmarks.plot import draw

        draw(plot, rows, facts)


def _store(model: str, directory: Path | None, *, as_json: bool) -> None:
    from dumont.benchmarks import run, store

    with run.workspace(directory) as state, console(stderr=True).status("starting") as status:
        found = store.run(model, state, _free_port(), status.update)
    if as_json:
        print_json(found)
        return
    speeds = {
        "upload": found.upload_mb_per_s,
        "store's own write": found.raw_write_mb_per_s,
        "store's own read": found.raw_read_mb_per_s,
    }
    seconds = {
        "restore from the node": found.local_restore_seconds,
        "restore from the store": found.cold_cache_restore_seconds,
        "restore from the store on a new node": found.new_node_restore_seconds,
        "may take, for the stored bytes": found.cold_cache_limit_seconds,
        "may take, for the image's bytes": found.cold_cache_limit_image_seconds,
    }
    sizes = {name.removesuffix("_bytes"): value for name, value in asdict(found).items() if "bytes" in name}
    print_facts(
        {
            **{name: f"{value:.0f} MB/s" for name, value in speeds.items()},
            **{name: f"{value:.3f} s" for name, value in seconds.items()},
            **{name.replace("_", " "): size(value) for name, value in sizes.items()},
            "snapshotd's memory": f"{found.peak_rss_mb:.0f} MB at most",
        }
    )


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
