"""How commands print: tables for people, JSON for programs, errors on one line."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import json as json_codec
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Annotated, Any, Final, ParamSpec

import typer
from rich.cells import cell_len
from rich.console import Console
from rich.table import Table
from rich.text import Text

from dumont.errors import DumontError, describe_error

Json = Annotated[bool, typer.Option("--json", help="Print JSON: one document, or one object per line.")]
Endpoint = Annotated[
    str | None,
    typer.Option(envvar="DUMONT_ENDPOINT", help="The controller.", show_default="localhost:7070"),
]

# A pipe has no width, so nothing is cut there.
PIPE_WIDTH: Final = 10_000
# Characters between two columns, and of a column whose cells are folded, at least.
GAP: Final = 2
FOLDED_WIDTH: Final = 16
UNITS: Final = ("B", "KiB", "MiB", "GiB", "TiB")

P = ParamSpec("P")


def console(*, stderr: bool = False) -> Console:
    """A console for tables, on standard output or standard error."""
    stream = sys.stderr if stderr else sys.stdout
    width = None if stream.isatty() else PIPE_WIDTH
    return Console(file=stream, width=width, highlight=False, markup=False)


def command(function: Callable[P, None]) -> Callable[P, None]:
    """Have a command that fails print the reason and end with exit status 1."""

    @functools.wraps(function)
    def guarded(*args: P.args, **kwargs: P.kwargs) -> None:
        try:
            function(*args, **kwargs)
        except DumontError as error:
            fail(error, as_json=bool(kwargs.get("json")))

    return guarded


def each(names: Sequence[str], work: Callable[[str], None], *, as_json: bool) -> None:
    """Do ``work`` for each name, for the rest also where it fails for one; the status is then 1."""
    failed = False
    for name in names:
        try:
            work(name)
        except DumontError as error:
            show(error, as_json=as_json)
            failed = True
    if failed:
        raise typer.Exit(1)


def fail(error: DumontError, *, as_json: bool) -> None:
    """Print an error and end the command with exit status 1."""
    show(error, as_json=as_json)
    raise typer.Exit(1)


def show(error: DumontError, *, as_json: bool) -> None:
    """Print an error."""
    if as_json:
        print_json({"error": describe_error(error)})
    else:
        message = " ".join(error.message.split())
        sys.stderr.write(f"error: {message} [{error.reason}]\n")


class Line:
    """Text on standard output that comes in pieces."""

    def __init__(self) -> None:
        self.text = ""

    def write(self, piece: str) -> None:
        """Print another piece at once."""
        sys.stdout.write(piece)
        sys.stdout.flush()
        self.text += piece


@contextlib.contextmanager
def own_line() -> Iterator[Line]:
    """End the line of what is printed within, however that ends: an error that follows has one of its own."""
    line = Line()
    try:
        yield line
    except BaseException:
        if line.text:
            with contextlib.suppress(OSError):
                print(flush=True)
        raise
    else:
        print(flush=True)


def print_json(value: Any) -> None:
    """One line of JSON; dataclasses become objects and times ISO 8601."""
    sys.stdout.write(json_codec.dumps(value, default=_plain) + "\n")
    sys.stdout.flush()


def _plain(value: Any) -> Any:
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}
    if isinstance(value, datetime):
        return value.isoformat()
    raise TypeError(f"{type(value).__name__} is not JSON")


@dataclass(frozen=True)
class Columns:
    """The columns of a table, and what becomes of them where it is wider than the terminal.

    Args:
        headers: of the columns, from left to right.
        drop: those that may be left out, the first of these first. What a table is read for, such as a name
            or a state, is not among them.
        fold: those whose cells may take several lines.
    """

    headers: tuple[str, ...]
    drop: tuple[str, ...] = ()
    fold: tuple[str, ...] = ()

    def shown(self, rows: Sequence[Sequence[str]], width: int) -> tuple[list[int], bool]:
        """The columns that a table of ``rows`` shows in ``width`` characters, by their numbers.

        Returns:
            The columns, and whether they fit without folding others than ``fold``.
        """
        shown = list(range(len(self.headers)))
        sizes = [max(map(cell_len, cells)) for cells in zip(self.headers, *rows, strict=True)]
        for index, header in enumerate(self.headers):
            if header in self.fold:
                sizes[index] = min(sizes[index], FOLDED_WIDTH)

        def fits() -> bool:
            return sum(sizes[index] + GAP for index in shown) - GAP <= width

        for header in self.drop:
            if fits():
                break
            shown.remove(self.headers.index(header))
        return shown, fits()


def table(columns: Columns | Sequence[str], rows: Iterable[Sequence[str]], width: int = PIPE_WIDTH) -> Table:
    """A table without lines, whose cells are text and never markup.

    Args:
        columns: of the table.
        rows: a cell for each column.
        width: characters that a line may have.
    """
    columns = columns if isinstance(columns, Columns) else Columns(tuple(columns))
    rows = [tuple(row) for row in rows]
    shown, fits = columns.shown(rows, width)
    result = Table(box=None, pad_edge=False, padding=(0, GAP, 0, 0), header_style="bold")
    for index in shown:
        # Where even what must stay is too wide, the names in the first column are folded, but not cut.
        folds = columns.headers[index] in columns.fold or (not fits and index == 0)
        result.add_column(columns.headers[index], no_wrap=not folds, overflow="fold")
    for row in rows:
        result.add_row(*(Text(row[index]) for index in shown))
    return result


def print_table(columns: Columns | Sequence[str], rows: Iterable[Sequence[str]]) -> None:
    """Print a table on standard output, as wide as that is."""
    screen = console()
    screen.print(table(columns, rows, screen.width))


def print_facts(facts: Mapping[str, str]) -> None:
    """Print names and values, one pair per line, without the empty ones."""
    result = Table(box=None, pad_edge=False, show_header=False)
    result.add_column(style="bold", no_wrap=True)
    result.add_column(overflow="fold")
    for name, value in facts.items():
        if value:
            result.add_row(Text(name), Text(value))
    console().print(result)


def short(name: str) -> str:
    """The id in a resource name."""
    return name.rpartition("/")[2]


def size(count: int) -> str:
    """Bytes as text for people: ``1.5 GiB``."""
    value = float(count)
    for unit in UNITS:
        if value < 1024 or unit == UNITS[-1]:
            return f"{value:.0f} {unit}" if unit == "B" or value >= 100 else f"{value:.1f} {unit}"
        value /= 1024
    raise AssertionError("unreachable: the last unit returns")


def span(seconds: float | None) -> str:
    """Seconds as text for people: ``45s``, ``5m``, ``2h 5m``, ``3d``; empty for None."""
    if seconds is None:
        return ""
    if 0 < seconds < 10:
        return f"{seconds:.3g}s"
    whole = round(seconds)
    for limit, unit, smaller, letters in ((60, 1, 0, "s"), (3600, 60, 1, "ms"), (86400, 3600, 60, "hm")):
        if whole < limit:
            rest = whole % unit // smaller if smaller else 0
            return f"{whole // unit}{letters[0]}" + (f" {rest}{letters[1]}" if rest else "")
    days, rest = divmod(whole, 86400)
    return f"{days}d" + (f" {rest // 3600}h" if rest >= 3600 else "")


def age(time: datetime | None) -> str:
    """How long ago a time was, as text for people; empty for None."""
    return "" if time is None else span(max(0.0, round((datetime.now(UTC) - time).total_seconds())))
