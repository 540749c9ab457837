"""``dumont run``: from a model's name to its answer, or to a conversation with it."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable
from typing import Annotated, Final

import typer

from dumont import sync
from dumont.arguments import GenerateOptions
from dumont.cli import completion
from dumont.cli.inference import Timeout, at_terminal, describe_start, read_input
from dumont.cli.output import Endpoint, command, own_line, show
from dumont.cli.waiting import start_shown
from dumont.errors import DumontError, NotFound
from dumont.names import LABEL

PROMPT: Final = "> "
NO_TEMPLATE: Final = "NO_CHAT_TEMPLATE"

Messages = list[dict[str, str]]


@command
def run(
    model: Annotated[
        str,
        typer.Argument(
            help="A Hugging Face id, a directory on the nodes, or a deployment.",
            autocompletion=completion.deployments,
        ),
    ],
    prompt: Annotated[
        str | None,
        typer.Argument(help="What to ask; by default what is piped in or, at a terminal, a conversation."),
    ] = None,
    name: Annotated[
        str | None, typer.Option(help="The deployment's id; by default derived from the model's.")
    ] = None,
    system: Annotated[str | None, typer.Option(help="Begin with this instruction.")] = None,
    max_new_tokens: Annotated[int | None, typer.Option(help="The most tokens of an answer.")] = None,
    temperature: Annotated[float | None, typer.Option(help="0: always the likeliest token.")] = None,
    top_p: Annotated[float | None, typer.Option(help="Sample from the likeliest tokens only.")] = None,
    seed: Annotated[int | None, typer.Option(help="Makes sampling repeatable.")] = None,
    timeout: Timeout = None,
    endpoint: Endpoint = None,
) -> None:
    """Ask a model, or talk with it. It is deployed if it is not yet, and stays deployed.

    In a conversation, Ctrl-C ends an answer and Ctrl-D the conversation.
    """
    # Read before anything is deployed for it.
    if prompt == "-" or (prompt is None and not at_terminal()):
        prompt = read_input("a prompt", asked=True)
    options: GenerateOptions = {
        "max_new_tokens": max_new_tokens,
        "temperature": temperature,
        "top_p": top_p,
        "seed": seed,
        "timeout": timeout,
    }
    with sync.Client(endpoint) as client:
        talk = Conversation(deployed(client, model, name), system, options)
        if prompt is None:
            converse(talk.say, read_line)
        else:
            talk.say(prompt)


def deployed(client: sync.Client, model: str, name: str | None) -> sync.Deployment:
    """The deployment of this name, else one of this model, made if there is none."""
    if name is None and LABEL.fullmatch(model):
        with contextlib.suppress(NotFound):
            return client.deployments.get(model)
    return client.deploy(model, name=name)


class Conversation:
    """What was said so far, and the model that goes on with it.

    Args:
        deployment: what answers.
        system: the instruction to begin with, if any.
        options: of every request.
    """

    def __init__(self, deployment: sync.Deployment, system: str | None, options: GenerateOptions) -> None:
        self.messages: Messages = [{"role": "system", "content": system}] if system else []
        self._deployment = deployment
        self._options = options
        self._chats = True

    def say(self, text: str) -> None:
        """Print the answer to ``text``, and keep both; of an answer that is interrupted, what has come.

        Raises:
            DumontError: there is no answer; nothing is kept.
        """
        answer = ""

        def keep(piece: str) -> None:
            nonlocal answer
            answer += piece

        turn = [*self.messages, {"role": "user", "content": text}]
        try:
            self._answer(turn, text, keep)
        finally:
            if answer:
                self.messages = [*turn, {"role": "assistant", "content": answer}]

    def _answer(self, turn: Messages, text: str, keep: Callable[[str], None]) -> None:
        try:
            if self._chats:
                self._print({"messages": turn}, None, keep)
                return
        except DumontError as error:
            if error.reason != NO_TEMPLATE:
                raise
            self._chats = False
            sys.stderr.write("this model has no chat format, so it goes on with what you write\n")
        self._print({}, text, keep)

    def _print(self, given: GenerateOptions, prompt: str | None, keep: Callable[[str], None]) -> None:
        with start_shown(as_json=False) as progress:
            options: GenerateOptions = {**self._options, **given, "progress": progress}
            stream = self._deployment.stream(prompt, **options)
            start = stream.start
        if start.tier != "resident":
            sys.stderr.write(f"{describe_start(start)}\n")
        with own_line() as line:
            for piece in stream:
                keep(piece)
                line.write(piece)
        if stream.generation and stream.generation.finish_reason == "length":
            tokens = stream.generation.usage.output_tokens
            sys.stderr.write(f"(cut after {tokens} tokens; --max-new-tokens allows more)\n")


def read_line() -> str:
    """A line that a person types, with the editing and the history of a shell."""
    # Without it, input() has neither; not every Python has it.
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401
    return input(PROMPT)


def converse(say: Callable[[str], None], read: Callable[[], str]) -> None:
    """Answer line after line until there are no more. An error is shown, and the conversation goes on.

    Args:
        say: prints the answer to a line.
        read: the next line. EOFError: there is none; KeyboardInterrupt: forget what was typed.
    """
    sys.stderr.write("Ctrl-C ends an answer, Ctrl-D the conversation.\n")
    while True:
        try:
            text = read().strip()
            if text:
                say(text)
        except EOFError:
            sys.stderr.write("\n")
            return
        except KeyboardInterrupt:
            sys.stderr.write("\n")
        except DumontError as error:
            show(error, as_json=False)
