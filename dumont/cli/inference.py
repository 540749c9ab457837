"""``dumont generate`` and ``embed``."""

from __future__ import annotations

import sys
from typing import Annotated

import typer

from dumont import sync
from dumont.arguments import GenerateOptions
from dumont.cli.durations import parse_duration
from dumont.cli.output import Endpoint, Json, command, print_json, span
from dumont.types import StartInfo

Timeout = Annotated[
    float | None,
    typer.Option(parser=parse_duration, metavar="DURATION", help="For the whole answer, a start included."),
]


@command
def generate(
    deployment: Annotated[str, typer.Argument(help="The deployment.")],
    prompt: Annotated[
        str | None,
        typer.Argument(help="Text to continue, or the last turn of a conversation; - reads standard input."),
    ] = None,
    system: Annotated[str | None, typer.Option(help="Begin a conversation with this instruction.")] = None,
    message: Annotated[
        list[str] | None,
        typer.Option(help="A turn of a conversation: the user's, the assistant's, and so on in turn."),
    ] = None,
    max_new_tokens: Annotated[int | None, typer.Option(help="The most tokens to write.")] = None,
    temperature: Annotated[float | None, typer.Option(help="0: always the likeliest token.")] = None,
    top_p: Annotated[float | None, typer.Option(help="Draw from the likeliest tokens only.")] = None,
    seed: Annotated[int | None, typer.Option(help="Makes drawing repeatable.")] = None,
    stop: Annotated[list[str] | None, typer.Option(help="End before this text; may be repeated.")] = None,
    timeout: Timeout = None,
    json: Json = False,
    endpoint: Endpoint = None,
) -> None:
    """Write an answer as it comes; where the model was woken from goes to standard error."""
    if prompt == "-":
        prompt = sys.stdin.read()
    options: GenerateOptions = {
        "max_new_tokens": max_new_tokens,
        "temperature": temperature,
        "top_p": top_p,
        "seed": seed,
        "stop": stop,
        "timeout": timeout,
    }
    if system is not None or message:
        options["messages"] = conversation(system, [*(message or []), *([prompt] if prompt else [])])
        prompt = None
    with sync.Client(endpoint) as client:
        stream = client.deployments.get(deployment).stream(prompt, **options)
        if json:
            print_json({"start": stream.start})
        else:
            sys.stderr.write(f"{describe_start(stream.start)}\n")
        for piece in stream:
            if json:
                print_json({"text": piece})
            else:
                sys.stdout.write(piece)
                sys.stdout.flush()
        generation = stream.generation
    if json and generation:
        print_json(
            {
                "finish_reason": generation.finish_reason,
                "usage": generation.usage,
                "first_token_seconds": generation.first_token_seconds,
            }
        )
    elif not json:
        sys.stdout.write("\n")


@command
def embed(
    deployment: Annotated[str, typer.Argument(help="The deployment.")],
    texts: Annotated[list[str], typer.Argument(help="One or several texts.")],
    timeout: Timeout = None,
    json: Json = False,
    endpoint: Endpoint = None,
) -> None:
    """Print one vector for each text."""
    with sync.Client(endpoint) as client:
        vectors = client.deployments.get(deployment).embed(texts, timeout=timeout)
    if json:
        print_json(vectors)
        return
    for vector in vectors:
        sys.stdout.write(" ".join(f"{value:.6g}" for value in vector) + "\n")


def conversation(system: str | None, turns: list[str]) -> list[dict[str, str]]:
    """Messages of turns that alternate, the user's first and last.

    Raises:
        typer.BadParameter: the last turn is not the user's.
    """
    if len(turns) % 2 == 0:
        raise typer.BadParameter(
            "a conversation ends with a turn of the user's: give an odd number of turns, the prompt included"
        )
    roles = ("user", "assistant")
    messages = [{"role": roles[index % 2], "content": turn} for index, turn in enumerate(turns)]
    return [{"role": "system", "content": system}, *messages] if system is not None else messages


def describe_start(start: StartInfo) -> str:
    """``local in 0.25s: no instance is serving``."""
    return f"{start.tier} in {span(start.seconds)}: {'; '.join(start.reasons)}"
