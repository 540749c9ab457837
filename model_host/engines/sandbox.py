"""Runs a model's chat template, a program by whoever made the model, within limits of time and size.

Jinja's sandbox keeps a template from reaching anything else, but not from taking all time and memory: one
``'a' * 1500000000`` is enough. Here each operation that could make something large looks first at what it
would make, and the clock is read at every line of the template and at every call that it leads to. Whatever
is overlooked meets the memory limit of the process.
"""

from __future__ import annotations

import re
import sys
import threading
import time
from collections.abc import Callable, ItemsView, Iterable, Iterator, KeysView, Mapping, ValuesView
from contextlib import contextmanager
from functools import wraps
from itertools import chain
from typing import Any, Final

from jinja2 import nodes
from jinja2.compiler import CodeGenerator, Frame, operators
from jinja2.sandbox import ImmutableSandboxedEnvironment
from transformers.utils.chat_template_utils import _compile_jinja_template

# How large a rendering, and anything made on the way to it, may be: this many times its input, or this many
# characters if that is more.
GROWTH: Final = 4
LEAST_CHARACTERS: Final = 256 << 10
# How much may be made on the way altogether, in multiples of that: a template that adds n messages to one
# string, one by one, makes n/2 times what the string has in the end.
ALTOGETHER: Final = 256
# A long conversation takes milliseconds.
SECONDS: Final = 2.0
SOURCE_CHARACTERS: Final = 1 << 20
# No count of anything in a conversation is a longer number than this; multiplying may not make one.
LARGEST_BITS: Final = 256
LARGEST_INDENT: Final = 64
# Where a format string says how wide something is: after % in the old way, after a colon in the new one.
WIDTHS: Final = re.compile(r"%(?:\([^)]*\))?([-+ #0]*[\d.*]*)|\{[^{}]*:([^{}]*[{]?)")
FILE: Final = "<template>"


class LimitReached(Exception):
    """A template would take more time or room than it may; the message says which."""


class Sandbox:
    """One template, compiled.

    Args:
        source: in Jinja, as chat templates are written for transformers.
        seconds: that one rendering may take.

    Raises:
        jinja2.TemplateError: it is no template.
        LimitReached: it is too long, or one of its constants would be.
    """

    def __init__(self, source: str, seconds: float = SECONDS) -> None:
        if len(source) > SOURCE_CHARACTERS:
            raise LimitReached(f"it has {len(source)} characters, and at most {SOURCE_CHARACTERS} are read")
        self._seconds = seconds
        self._environment = _Environment.like_transformers()
        with _deadline(seconds):
            self._template = self._environment.from_string(source)

    def render(self, variables: Mapping[str, Any]) -> str:
        """What the template makes of these variables.

        Raises:
            jinja2.TemplateError: the template refuses these variables.
            LimitReached: it would take too long or make too much.
            Exception: it fails on them.
        """
        self._environment.budget.renew(variables)
        with _deadline(self._seconds):
            return self._template.render(variables)


class _Budget(threading.local):
    """What the rendering of this thread may still make.

    Attributes:
        characters: that anything may have.
        altogether: left for all that is still to be made.
    """

    characters = LEAST_CHARACTERS
    altogether = ALTOGETHER * LEAST_CHARACTERS

    def renew(self, given: Mapping[str, Any]) -> None:
        self.characters = max(LEAST_CHARACTERS, GROWTH * _written(list(given.values())))
        self.altogether = ALTOGETHER * self.characters

    def take(self, length: int) -> None:
        """Something of this length is about to be made."""
        self.altogether -= length
        if length > self.characters or self.altogether < 0:
            raise LimitReached(f"it would make more than {self.characters} characters")


class _Generator(CodeGenerator):
    """Lets the environment join what ``~`` joins, and weigh what is compared or hashed.

    Lists of lists may take no room and a life-time to compare, at one go that no clock interrupts.
    """

    def visit_Compare(self, node: nodes.Compare, frame: Frame) -> None:
        self.write("(")
        self._visit_weighed(node.expr, frame)
        for operand in node.ops:
            self.visit(operand, frame)
        self.write(")")

    def visit_Operand(self, node: nodes.Operand, frame: Frame) -> None:
        self.write(f" {operators[node.op]} ")
        self._visit_weighed(node.expr, frame)

    def visit_Dict(self, node: nodes.Dict, frame: Frame) -> None:
        self.write("{")
        for item in node.items:
            self._visit_weighed(item.key, frame)
            self.write(": ")
            self.visit(item.value, frame)
            self.write(", ")
        self.write("}")

    def _visit_weighed(self, node: nodes.Expr, frame: Frame) -> None:
        self.write("environment.weighed(")
        self.visit(node, frame)
        self.write(")")

    def visit_Concat(self, node: nodes.Concat, frame: Frame) -> None:
        self.write("environment.join((")
        for part in node.nodes:
            self.visit(part, frame)
            self.write(", ")
        self.write("))")


class _Environment(ImmutableSandboxedEnvironment):
    code_generator_class = _Generator
    intercepted_binops = frozenset({"+", "*", "**", "%"})
    budget: _Budget

    @classmethod
    def like_transformers(cls) -> _Environment:
        """One with the tags, filters and names that transformers gives to chat templates."""
        model = _compile_jinja_template("").environment
        made = cls(
            trim_blocks=model.trim_blocks,
            lstrip_blocks=model.lstrip_blocks,
            extensions=[type(extension) for extension in model.extensions.values()],
        )
        made.budget = _Budget()
        made.finalize = made.weighed
        made.globals.update(model.globals)
        del made.globals["lipsum"]  # filler text, which no chat template needs
        made.filters.update({name: made._limited(name, filter) for name, filter in model.filters.items()})
        made.tests.update({name: made._weighing(test) for name, test in model.tests.items()})
        return made

    def concat(self, parts: Iterable[str]) -> str:
        """What templates, blocks and macros write is joined here, piece by piece as it comes."""
        return "".join(self._within(parts))

    def join(self, parts: Iterable[Any]) -> str:
        parts = tuple(parts)
        self.budget.take(self._weigh(parts))
        return "".join(map(str, parts))

    def getitem(self, obj: Any, argument: Any) -> Any:
        return super().getitem(obj, self.weighed(argument))

    def weighed(self, value: Any) -> Any:
        """``value``, if it can be written out."""
        self._weigh((value,))
        return value

    def _weigh(self, values: Iterable[Any]) -> int:
        """Characters that they take when they are written out."""
        length = sum(_written(value, self.budget.characters) for value in values)
        if length > self.budget.characters:
            self.budget.take(length)
        return length

    def _within(self, parts: Iterable[str]) -> Iterator[str]:
        length = 0
        for part in parts:
            length += len(part)
            if length > self.budget.characters:
                self.budget.take(length)
            yield part

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        if operator == "**" and _bits(left) * max(1, _magnitude(right)) > LARGEST_BITS:
            raise LimitReached("it would compute a number too large")
        if operator == "*":
            if _bits(left) + _bits(right) > LARGEST_BITS:
                raise LimitReached("it would compute a number too large")
            for sequence, times in ((left, right), (right, left)):
                if isinstance(sequence, str | bytes | list | tuple) and isinstance(times, int):
                    self.budget.take(len(sequence) * times)
        elif operator == "+":
            self.budget.take(_length(left) + _length(right))
        elif operator == "%" and isinstance(left, str | bytes):
            self._check_arguments((left, *(right if isinstance(right, tuple) else (right,))))
            self._check_widths(left)
        return super().call_binop(context, operator, left, right)

    def call(__self, __context: Any, __obj: Any, *args: Any, **kwargs: Any) -> Any:
        __self._check_arguments((*args, *kwargs.values()))
        owner = getattr(__obj, "__self__", None)
        if isinstance(owner, str):
            args = __self._check_method(owner, __obj.__name__, args)
        return __self._small(super().call(__context, __obj, *args, **kwargs))

    def _check_method(self, text: str, name: str, args: tuple[Any, ...]) -> tuple[Any, ...]:
        """Check a call of a string's method. Returns the arguments to call it with."""
        if name == "replace":
            self._check_replace(text, *args)
        elif name == "join" and args:
            return (self._joinable(text, args[0]), *args[1:])
        elif name == "translate":
            raise LimitReached("it calls translate, whose result cannot be foreseen")
        return args

    def wrap_str_format(self, value: Any) -> Callable[..., str] | None:
        wrapped = super().wrap_str_format(value)
        if wrapped is not None:
            self._check_widths(value.__self__)
        return wrapped

    def _limited(self, name: str, filter: Callable[..., Any]) -> Callable[..., Any]:
        # Some filters take an argument of Jinja's own first.
        extra = 1 if hasattr(filter, "jinja_pass_arg") else 0

        @wraps(filter)
        def limited(*args: Any, **kwargs: Any) -> Any:
            before, (value, *rest) = args[:extra], args[extra:]
            self._check_arguments((value, *rest, *kwargs.values()))
            if name == "replace":
                self._check_replace(str(value), *map(str, rest[:2]))
            elif name == "join":
                separator = rest[0] if rest else kwargs.get("d", "")
                value = self._joinable(str(separator), value)
            elif name == "indent":
                width = rest[0] if rest else kwargs.get("width", 4)
                self.budget.take(len(str(value)) + str(value).count("\n") * _length_or_number(width))
            elif name == "tojson" and _length_or_number(kwargs.get("indent")) > LARGEST_INDENT:
                raise LimitReached(f"it indents by more than {LARGEST_INDENT}")
            elif name == "format":
                self._check_widths(str(value))
            elif name == "sum" and _length(kwargs.get("start", rest[1] if len(rest) > 1 else 0)):
                raise LimitReached("it sums up sequences")
            return self._small(filter(*before, value, *rest, **kwargs))

        return limited

    def _weighing(self, test: Callable[..., Any]) -> Callable[..., Any]:
        @wraps(test)
        def weighing(*args: Any) -> Any:
            self._weigh(args)
            return test(*args)

        return weighing

    def _check_replace(self, text: str, old: str = "", new: str = "", *_: Any) -> None:
        self.budget.take(len(text) + text.count(old) * len(new))

    def _joinable(self, separator: str, parts: Iterable[Any]) -> list[Any]:
        """``parts``, if they may be joined, as a list: some can be iterated over only once."""
        kept, length = [], 0
        for part in parts:
            length += len(separator) + self._weigh((part,))
            if length > self.budget.characters:
                break
            kept.append(part)
        self.budget.take(length)
        return kept

    def _check_arguments(self, values: Iterable[Any]) -> None:
        """Check before a call that its arguments can be written out and no number is too large."""
        values = tuple(values)
        self._weigh(values)
        for value in values:
            if isinstance(value, int) and abs(value) > self.budget.characters:
                raise LimitReached(f"it passes a number above {self.budget.characters}")

    def _check_widths(self, text: str | bytes) -> None:
        """Check the widths in a format string before it is used; then its arguments do not matter."""
        found = WIDTHS.findall(text if isinstance(text, str) else text.decode("latin-1"))
        widths = "|".join(chain.from_iterable(found))
        if "*" in widths or "{" in widths:
            raise LimitReached("it formats to a width that is computed")
        self.budget.take(sum(map(int, re.findall(r"\d+", widths))))

    def _small(self, value: Any) -> Any:
        self.budget.take(_length(value))
        return value


def _written(value: Any, most: int = sys.maxsize) -> int:
    """Characters that ``value`` takes when it is written out, without writing it; beyond ``most`` it does not
    go on counting.
    """
    if isinstance(value, str | bytes):
        return len(value)
    if isinstance(value, Mapping):
        return _written([*value.keys(), *value.values()], most)
    length = 1
    if isinstance(value, list | tuple | set | frozenset | KeysView | ValuesView | ItemsView):
        for part in value:
            length += 2 + _written(part, most - length)
            if length > most:
                break
    return length


def _length(value: Any) -> int:
    return len(value) if isinstance(value, str | bytes | list | tuple | Mapping) else 0


def _length_or_number(value: Any) -> int:
    return value if isinstance(value, int) else _length(value)


def _bits(value: Any) -> int:
    return value.bit_length() if isinstance(value, int) else 0


def _magnitude(value: Any) -> int:
    return abs(value) if isinstance(value, int) else 1


@contextmanager
def _deadline(seconds: float) -> Iterator[None]:
    """Raise in the Python code that this thread runs inside once its time is up."""
    end = time.monotonic() + seconds

    def check(frame: Any, event: str, argument: Any) -> Any:
        if time.monotonic() > end:
            raise LimitReached(f"it would take longer than {seconds:g} s")
        # The lines of other code are of no interest: only a template can be made to loop for ever.
        return check if frame.f_code.co_filename == FILE else None

    previous = sys.gettrace()
    sys.settrace(check)
    try:
        yield
    finally:
        sys.settrace(previous)
