"""``dumont deploy``, ``ls`` and ``rm``."""

from __future__ import annotations

from collections.abc import Iterable
from json import dumps, loads
from typing import Annotated, Any, Final

import typer

from dumont import sync
from dumont.arguments import DEFAULT_START_MODE, START_MODES, STORAGES, WEIGHTS, Checkpoint
from dumont.cli import completion
from dumont.cli.completion import choices
from dumont.cli.durations import parse_duration
from dumont.cli.output import (
    Columns,
    Endpoint,
    Json,
    age,
    command,
    each,
    print_facts,
    print_json,
    print_table,
    short,
    span,
)
from dumont.cli.waiting import start_shown
from dumont.errors import InvalidArgument
from dumont.types import DeploymentInfo


@command
def deploy(
    model: Annotated[str, typer.Argument(help="A Hugging Face id, or a directory on the nodes.")],
    name: Annotated[
        str | None, typer.Option(help="The deployment's id; by default derived from the model's.")
    ] = None,
    start_mode: Annotated[
        str | None,
        typer.Option(
            help=f"One of {', '.join(START_MODES)}; by default that of the deployment, if it exists, or "
            f"{DEFAULT_START_MODE}.",
            autocompletion=choices(START_MODES),
        ),
    ] = None,
    ttl: Annotated[
        float | None,
        typer.Option(
            parser=parse_duration,
            metavar="DURATION",
            help="How long an unused snapshot is kept; by default a day.",
        ),
    ] = None,
    storage: Annotated[
        str | None,
        typer.Option(
            help=f"Where snapshots are kept: {', '.join(STORAGES)}.", autocompletion=choices(STORAGES)
        ),
    ] = None,
    weights: Annotated[
        str | None,
        typer.Option(
            help=f"Whether snapshots carry the weights: {', '.join(WEIGHTS)}.",
            autocompletion=choices(WEIGHTS),
        ),
    ] = None,
    idle_timeout: Annotated[
        float | None,
        typer.Option(
            parser=parse_duration, metavar="DURATION", help="It parks after so long without a request."
        ),
    ] = None,
    park_timeout: Annotated[
        float | None,
        typer.Option(
            parser=parse_duration, metavar="DURATION", help="Its process ends after so long parked."
        ),
    ] = None,
    engine: Annotated[
        str | None,
        typer.Option(
            help="causal_lm or embedding, by default read from the model's configuration; or vllm, where it "
            "is installed."
        ),
    ] = None,
    engine_option: Annotated[
        list[str] | None,
        typer.Option(
            "--engine-option",
            "-o",
            metavar="NAME=VALUE",
            help="An argument of the engine vllm, such as max_model_len=4096; the value may be JSON. May be "
            "repeated.",
        ),
    ] = None,
    prewarm: Annotated[
        bool, typer.Option("--prewarm", help="Start, and capture, now instead of at the next request.")
    ] = False,
    wait: Annotated[
        bool, typer.Option("--wait", help="Wait until that start has ended; implies --prewarm.")
    ] = False,
    priority: Annotated[
        int | None,
        typer.Option(
            min=-1000, max=1000, help="A busy instance yields to a deployment of a higher one; by default 0."
        ),
    ] = None,
    min_instances: Annotated[
        int | None, typer.Option(min=0, help="Instances that serve without requests.")
    ] = None,
    max_instances: Annotated[
        int | None, typer.Option(min=1, help="Instances that may serve at a time; by default 1.")
    ] = None,
    json: Json = False,
    endpoint: Endpoint = None,
) -> None:
    """Serve a model, or change how it is served; what is left out then stays as it is."""
    if start_mode in ("cold", "warm") and (ttl is not None or storage is not None):
        option = "--ttl" if ttl is not None else "--storage"
        raise InvalidArgument(
            "NO_SNAPSHOTS",
            f"start mode {start_mode} makes no snapshots, so {option} would change nothing; leave it out, or "
            "use start mode checkpoint",
            field="checkpoint",
        )
    checkpoint: Checkpoint = {}
    if ttl is not None:
        checkpoint["ttl"] = ttl
    if storage is not None:
        checkpoint["storage"] = storage
    if weights is not None:
        checkpoint["weights"] = weights
    with sync.Client(endpoint) as client, start_shown(as_json=json or not wait) as progress:
        deployment = client.deploy(
            model,
            start_mode,
            checkpoint or None,
            name=name,
            engine=engine,
            engine_options=parse_options(engine_option or ()),
            idle_timeout=idle_timeout,
            park_timeout=park_timeout,
            prewarm=prewarm,
            wait=wait,
            progress=progress,
            priority=priority,
            min_instances=min_instances,
            max_instances=max_instances,
        )
    if json:
        print_json(deployment.info)
    else:
        print_facts(describe(deployment.info))


@command
def ls(json: Json = False, endpoint: Endpoint = None) -> None:
    """List deployments."""
    with sync.Client(endpoint) as client:
        found = [deployment.info for deployment in client.deployments.list()]
    if json:
        print_json(found)
        return
    print_table(COLUMNS, map(cells, found))


COLUMNS: Final = Columns(
    ("DEPLOYMENT", "MODEL", "START", "STATE", "IDLE", "PARK", "TTL", "LAST USE"),
    drop=("PARK", "IDLE", "TTL", "LAST USE", "START", "MODEL"),
    fold=("MODEL",),
)


def cells(info: DeploymentInfo) -> tuple[str, ...]:
    """A row of the table of deployments."""
    return (
        short(info.name),
        info.model,
        info.start_mode,
        info.state,
        span(info.idle_timeout),
        span(info.park_timeout),
        span(info.checkpoint.ttl) if info.checkpoint.enabled else "",
        age(info.last_use_time),
    )


@command
def explain(
    deployment: Annotated[str, typer.Argument(help="The deployment.", autocompletion=completion.deployments)],
    json: Json = False,
    endpoint: Endpoint = None,
) -> None:
    """Say what a request to a deployment would do now, and why; nothing is started."""
    with sync.Client(endpoint) as client:
        found = client.deployments.get(deployment).explain()
    if json:
        print_json(found)
        return
    print_facts({"now": found.decision})
    print_table(
        Columns(
            ("TIER", "NODE", "FROM", "START", "ROOM", "BY", "WHAT YIELDS, OR WHY NOT"),
            drop=("BY", "FROM"),
            fold=("BY", "WHAT YIELDS, OR WHY NOT"),
        ),
        (
            (
                one.tier,
                short(one.node),
                short(one.instance or one.snapshot) or "the model",
                f"{one.start_seconds:.2f} s",
                f"{one.room_seconds:.2f} s" if one.yields else "",
                one.basis,
                one.why_not or "; ".join(one.yields),
            )
            for one in found.candidates
        ),
    )


@command
def rm(
    names: Annotated[
        list[str], typer.Argument(metavar="DEPLOYMENT...", autocompletion=completion.deployments)
    ],
    json: Json = False,
    endpoint: Endpoint = None,
) -> None:
    """Delete deployments, their instances and their snapshots."""

    def delete(name: str) -> None:
        client.deployments.delete(name)
        if json:
            print_json({"deleted": short(name)})

    with sync.Client(endpoint) as client:
        each(names, delete, as_json=json)


def describe(info: DeploymentInfo) -> dict[str, str]:
    """A deployment as names and values for people."""
    checkpoint = info.checkpoint
    kept = f", {span(checkpoint.ttl)} after its last use" if checkpoint.ttl is not None else ""
    kept += ", weights included" if checkpoint.weights == "included" else ""
    return {
        "deployment": short(info.name),
        "model": info.model,
        "engine": info.engine,
        **({"engine options": dumps(info.engine_options, sort_keys=True)} if info.engine_options else {}),
        "start mode": info.start_mode,
        "snapshots": f"{checkpoint.storage}{kept}" if checkpoint.enabled else "none",
        "idle timeout": span(info.idle_timeout),
        "park timeout": span(info.park_timeout),
        "priority": str(info.priority),
        "instances": f"{info.min_instances} to {info.max_instances}",
        "state": f"{info.state}: {info.state_message}" if info.state_message else info.state,
    }


def parse_options(given: Iterable[str]) -> dict[str, Any]:
    """Options of an engine, each given as ``NAME=VALUE``; a value that is not JSON is text.

    Raises:
        InvalidArgument: NOT_AN_OPTION, one is not of that form or names an option a second time.
    """
    options: dict[str, Any] = {}
    for text in given:
        name, equals, value = text.partition("=")
        name = name.strip().replace("-", "_")
        if not equals or not name or name in options:
            raise InvalidArgument(
                "NOT_AN_OPTION",
                f"--engine-option must be NAME=VALUE, each name once; got {text[:120]!r}",
                field="engine_options",
            )
        try:
            options[name] = loads(value)
        except ValueError:
            options[name] = value
    return options
