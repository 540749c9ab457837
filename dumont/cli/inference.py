"""``dumont generate`` and ``embed``."""

from __future__ import annotations

import sys
from typing import Annotated, Any

import typer

from dumont import sync
from dumont.arguments import GenerateOptions
from dumont.cli import completion
from dumont.cli.durations import parse_duration
from dumont.cli.output import Endpoint, Json, command, own_line, print_json, span
from dumont.cli.waiting import start_shown
from dumont.errors import InvalidArgument
from dumont.types import Piece, StartInfo

Timeout = Annotated[
    float | None,
    typer.Option(parser=parse_duration, metavar="DURATION", help="For the whole answer, including a start."),
]


@command
def generate(
    deployment: Annotated[str, typer.Argument(help="The deployment.", autocompletion=completion.deployments)],
    prompt: Annotated[
        str | None,
        typer.Argument(
            help="Text to continue, or the last turn of a conversation; "
            "standard input is read if this is left out or -."
        ),
    ] = None,
    system: Annotated[str | None, typer.Option(help="Begin a conversation with this instruction.")] = None,
    message: Annotated[
        list[str] | None,
        typer.Option(help="A turn of a conversation: the user's, the assistant's, and so on in turn."),
    ] = None,
    max_new_tokens: Annotated[int | None, typer.Option(help="The most tokens to write.")] = None,
    temperature: Annotated[float | None, typer.Option(help="0: always the likeliest token.")] = None,
    top_p: Annotated[float | None, typer.Option(help="Sample from the likeliest tokens only.")] = None,
    seed: Annotated[int | None, typer.Option(help="Makes sampling repeatable.")] = None,
    stop: Annotated[list[str] | None, typer.Option(help="End before this text; may be repeated.")] = None,
    top_k: Annotated[
        int | None, typer.Option(help="Draw from this many of the likeliest tokens; 0: from all.")
    ] = None,
    min_p: Annotated[
        float | None, typer.Option(help="Draw from tokens this fraction as likely as the likeliest.")
    ] = None,
    repetition_penalty: Annotated[
        float | None, typer.Option(help="Above 1: tokens of the prompt and the answer come less.")
    ] = None,
    presence_penalty: Annotated[
        float | None, typer.Option(help="Above 0: tokens of the answer come less.")
    ] = None,
    frequency_penalty: Annotated[
        float | None, typer.Option(help="Above 0: tokens come less the more often they came.")
    ] = None,
    logit_bias: Annotated[
        list[str] | None,
        typer.Option(metavar="TOKEN=BIAS", help="Make a token likelier or, to -100, rule it out."),
    ] = None,
    stop_token_id: Annotated[
        list[int] | None, typer.Option(help="End before this token; may be repeated.")
    ] = None,
    ignore_eos: Annotated[
        bool, typer.Option("--ignore-eos", help="Write on where the model would end.")
    ] = False,
    min_new_tokens: Annotated[int | None, typer.Option(help="The fewest tokens to write.")] = None,
    logprobs: Annotated[
        int | None, typer.Option(help="With --json: how likely each token was, and so many others.")
    ] = None,
    n: Annotated[int | None, typer.Option("-n", "--n", help="How many answers.")] = None,
    timeout: Timeout = None,
    json: Json = False,
    endpoint: Endpoint = None,
) -> None:
    """Print an answer as it is written, and on standard error how the model was started."""
    # A conversation that the options complete already needs nothing of standard input.
    if prompt == "-" or (prompt is None and len(message or ()) % 2 == 0):
        prompt = read_input("a prompt", asked=prompt == "-")
    options: GenerateOptions = {
        "max_new_tokens": max_new_tokens,
        "temperature": temperature,
        "top_p": top_p,
        "seed": seed,
        "stop": stop,
        "top_k": top_k,
        "min_p": min_p,
        "repetition_penalty": repetition_penalty,
        "presence_penalty": presence_penalty,
        "frequency_penalty": frequency_penalty,
        "logit_bias": dict(map(bias, logit_bias or ())),
        "stop_token_ids": stop_token_id,
        "ignore_eos": ignore_eos,
        "min_new_tokens": min_new_tokens,
        "logprobs": logprobs,
        "n": n,
        "timeout": timeout,
    }
    if system is not None or message:
        options["messages"] = conversation(system, [*(message or []), *([prompt] if prompt else [])])
        prompt = None
    with sync.Client(endpoint) as client:
        with start_shown(as_json=json) as options["progress"]:
            stream = client.deployments.get(deployment).stream(prompt, **options)
            start = stream.start
        if json:
            print_json({"start": start})
        else:
            sys.stderr.write(f"{describe_start(start)}\n")
        _write(stream, as_json=json, several=(n or 1) > 1)


def _write(stream: sync.TextStream, *, as_json: bool, several: bool) -> None:
    """The answer as it comes, or several of them when they are complete."""
    if as_json or several:
        for piece in stream.pieces():
            if as_json:
                print_json(_described(piece))
    else:
        with own_line() as line:
            for piece in stream.pieces():
                line.write(piece.text)
    generation = stream.generation
    if as_json and generation:
        for index, answer in enumerate(generation.answers):
            print_json(
                {
                    **({"index": index} if several else {}),
                    "finish_reason": answer.finish_reason,
                    "usage": answer.usage,
                    "first_token_seconds": generation.first_token_seconds,
                }
            )
    elif several and generation:
        for index, answer in enumerate(generation.answers, start=1):
            sys.stdout.write(f"--- {index} ---\n{answer.text}\n")


def _described(piece: Piece) -> dict[str, Any]:
    """A piece as JSON; its tokens only where their probabilities were asked for."""
    described: dict[str, Any] = {"text": piece.text}
    if piece.index:
        described["index"] = piece.index
    if piece.logprobs:
        described["logprobs"] = piece.logprobs
    return described


def bias(text: str) -> tuple[int, float]:
    """``50256=-100`` as a token and what is added to its logit.

    Raises:
        typer.BadParameter: it is something else.
    """
    token, equals, value = text.partition("=")
    try:
        if not equals:
            raise ValueError
        return int(token), float(value)
    except ValueError:
        raise typer.BadParameter(
            f"--logit-bias takes a token id and a number, like 50256=-100; got {text!r}"
        ) from None


@command
def embed(
    deployment: Annotated[str, typer.Argument(help="The deployment.", autocompletion=completion.deployments)],
    texts: Annotated[
        list[str] | None,
        typer.Argument(
            help="One or several texts; if this is left out or -, each line of standard input is one."
        ),
    ] = None,
    timeout: Timeout = None,
    json: Json = False,
    endpoint: Endpoint = None,
) -> None:
    """Print one vector for each text."""
    if not texts or texts == ["-"]:
        texts = [line for line in read_input("a text", asked=bool(texts)).splitlines() if line.strip()]
    with sync.Client(endpoint) as client, start_shown(as_json=json) as progress:
        vectors = client.deployments.get(deployment).embed(texts, timeout=timeout, progress=progress)
    if json:
        print_json(vectors)
        return
    for vector in vectors:
        sys.stdout.write(" ".join(f"{value:.6g}" for value in vector) + "\n")


def at_terminal() -> bool:
    """Whether a person types what standard input gives."""
    return sys.stdin.isatty()


def read_input(what: str, *, asked: bool) -> str:
    """The text of standard input, without the newlines at its end.

    Args:
        what: is read, in words.
        asked: the caller asked for it; else a terminal is not read, at which nobody expects to type.

    Raises:
        InvalidArgument: NO_INPUT, NOT_UTF8.
    """
    if not asked and at_terminal():
        raise InvalidArgument(
            "NO_INPUT", f"give {what} as an argument, pipe it in, or type it after giving -", field="prompt"
        )
    try:
        text = sys.stdin.buffer.read().decode()
    except UnicodeDecodeError as error:
        raise InvalidArgument("NOT_UTF8", f"standard input is not text in UTF-8: {error}") from error
    if not text.strip():
        raise InvalidArgument(
            "NO_INPUT", f"standard input is empty; give {what} there, or as an argument", field="prompt"
        )
    return text.rstrip("\n")


def conversation(system: str | None, turns: list[str]) -> list[dict[str, str]]:
    """The messages of a conversation whose turns alternate, beginning and ending with the user's.

    Raises:
        typer.BadParameter: the last turn is not the user's.
    """
    if len(turns) % 2 == 0:
        raise typer.BadParameter(
            "a conversation ends with the user's turn: give an odd number of turns, counting the prompt"
        )
    roles = ("user", "assistant")
    messages = [{"role": roles[index % 2], "content": turn} for index, turn in enumerate(turns)]
    return [{"role": "system", "content": system}, *messages] if system is not None else messages


def describe_start(start: StartInfo) -> str:
    """``local in 0.25s: no instance is serving``."""
    return f"{start.tier} in {span(start.seconds)}: {'; '.join(start.reasons)}"
