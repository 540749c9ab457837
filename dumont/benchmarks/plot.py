"""The picture: the cases of each model one below the other, with their phases in the same colours."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from dumont.benchmarks import serving
from dumont.benchmarks.results import Row

if TYPE_CHECKING:
    from matplotlib.axes import Axes

OTHER: Final = "other"
# In the order in which they happen, in Okabe and Ito's palette, which colour-blind readers tell apart.
GROUPS: Final = {
    "imports": "#E69F00",
    "load": "#56B4E9",
    "verify the image": "#CC79A7",
    "CRIU restore": "#0072B2",
    "CUDA restore": "#009E73",
    "wake, attach weights": "#D55E00",
    "warm-up, canary": "#F0E442",
    "first token": "#000000",
    OTHER: "#BBBBBB",
}
# The beginning of a phase's name, and the group that the phase is drawn in; the first that fits holds.
BEGINNINGS: Final = {
    "import": "imports",
    "load": "load",
    "warm_up": "warm-up, canary",
    "canary": "warm-up, canary",
    "check_": "warm-up, canary",
    "compile": "warm-up, canary",
    "capture_graphs": "warm-up, canary",
    "check": "verify the image",
    "fetch": "verify the image",
    "verify": "verify the image",
    "criu": "CRIU restore",
    "cuda": "CUDA restore",
    "wake": "wake, attach weights",
    "attach": "wake, attach weights",
    "weights": "wake, attach weights",
    "first_token": "first token",
}
LABELS: Final = {
    "plain_cold": "plain script",
    "plain_cold_after_imports": "plain script, after imports",
    "cold": "Dumont, cold",
    "stock": "stock tools",
    "local": "Dumont, local snapshot",
    "parked": "Dumont, parked",
}
# Short bars cannot be seen beside long ones, so they have a panel of their own.
SHORT: Final = ("local", "parked")
# How each engine and path is drawn.
SERVING_LINES: Final = {
    ("dumont", serving.SERVICES): ("Dumont, through its services", "#D55E00", "o-"),
    ("dumont", serving.DIRECT): ("Dumont, at the model host", "#E69F00", "s--"),
    ("generate", serving.DIRECT): ("transformers generate, one static batch", "#56B4E9", "^-"),
    ("vllm", serving.DIRECT): ("vLLM, in-process", "#009E73", "D-"),
}
INCHES_WIDE: Final = 13.0
INCHES_PER_CASE: Final = 0.42
INCHES_AROUND: Final = 1.15
DOTS_PER_INCH: Final = 150


def group(phase: str) -> str:
    """The group that a phase is drawn in."""
    own = phase.rpartition(".")[2]
    return next((name for begin, name in BEGINNINGS.items() if own.startswith(begin)), OTHER)


def grouped(phases: Mapping[str, float]) -> dict[str, float]:
    """Seconds by group, in the order of ``GROUPS``."""
    seconds = dict.fromkeys(GROUPS, 0.0)
    for phase, value in phases.items():
        seconds[group(phase)] += value
    return {name: value for name, value in seconds.items() if value > 0}


def seconds_text(seconds: float) -> str:
    """The text beside a bar."""
    return f"{seconds:.2f} s" if seconds >= 0.1 else f"{seconds:.3f} s"


def panels(rows: Sequence[Row]) -> list[list[Row]]:
    """The panels of one model: all its rows, and then the short ones again if there are others."""
    order = list(LABELS)
    every = sorted(rows, key=lambda row: order.index(row.case))
    short = [row for row in every if row.case in SHORT]
    return [every, short] if short and len(short) < len(every) else [every]


def draw(path: Path, rows: Sequence[Row], machine: Mapping[str, Any]) -> None:
    """Write the picture of all ``rows`` as a PNG."""
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch

    models = {row.model: panels([other for other in rows if other.model == row.model]) for row in rows}
    columns = max(map(len, models.values()))
    heights = [INCHES_AROUND + INCHES_PER_CASE * len(drawn[0]) for drawn in models.values()]
    figure = Figure(
        figsize=(INCHES_WIDE, sum(heights) + 1.2), dpi=DOTS_PER_INCH, layout="constrained", facecolor="white"
    )
    grid = figure.add_gridspec(len(models), columns, height_ratios=heights)
    for line, (model, drawn) in enumerate(models.items()):
        for column, part in enumerate(drawn):
            title = model if column == 0 else "the short ones, enlarged"
            _panel(figure.add_subplot(grid[line, column]), part, title)
    used = {name for row in rows for name in grouped(row.phases)}
    handles = [Patch(facecolor=colour, label=name) for name, colour in GROUPS.items() if name in used]
    figure.legend(handles=handles, loc="outside lower center", ncols=-(-len(handles) // 2), frameon=False)
    figure.suptitle(
        f"Seconds to the first token (a line below a bar: least to most)\n{_described(machine)}", fontsize=11
    )
    figure.savefig(path, format="png")


def _panel(axes: Axes, rows: Sequence[Row], title: str) -> None:
    longest = max(max(row.seconds.max, sum(row.phases.values())) for row in rows)
    for place, row in enumerate(rows):
        end = 0.0
        for name, seconds in grouped(row.phases).items():
            axes.barh(
                place, seconds, left=end, height=0.62, color=GROUPS[name], edgecolor="white", linewidth=0.4
            )
            end += seconds
        axes.plot([row.seconds.min, row.seconds.max], [place + 0.4] * 2, color="#555555", linewidth=1.5)
        beyond = max(end, row.seconds.median) + longest * 0.012
        axes.text(beyond, place, seconds_text(row.seconds.median), va="center", fontsize=9, fontweight="bold")
    axes.set_yticks(range(len(rows)), [LABELS[row.case] for row in rows])
    axes.invert_yaxis()
    axes.set_xlim(0, longest * 1.14)
    axes.set_xlabel("seconds")
    axes.set_title(title, loc="left", fontsize=11, fontweight="bold")
    axes.grid(axis="x", color="#DDDDDD", linewidth=0.6)
    axes.set_axisbelow(True)
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.tick_params(axis="y", length=0)


def _median(value: serving.Percentiles | None) -> float | None:
    return None if value is None else value.p50


SERVING_PANELS: Final[tuple[tuple[str, str, Callable[[serving.Row], float | None]], ...]] = (
    ("tokens per second, all streams together", "tokens/s", lambda row: row.tokens_per_s),
    ("first token, median", "seconds", lambda row: _median(row.first_token)),
    ("a further token, median", "seconds", lambda row: _median(row.inter_token)),
)


def _described(machine: Mapping[str, Any]) -> str:
    parts = (
        machine.get("gpu") or machine.get("cpu"),
        f"driver {machine['driver']}" if "driver" in machine else "",
        f"CRIU {machine['criu']}" if "criu" in machine else "",
        f"torch {machine['torch']}" if machine.get("torch") else "",
    )
    return ", ".join(str(part) for part in parts if part)


def draw_serving(path: Path, rows: Sequence[serving.Row], machine: Mapping[str, Any]) -> None:
    """Write the picture of a serving bench as a PNG: a line of panels for each model and length."""
    from matplotlib.figure import Figure

    resident = [row for row in rows if not set(row.tiers) - {"resident"}]
    groups: dict[str, list[serving.Row]] = {}
    for row in resident:
        lengths = f"prompts of {row.case.prompt_tokens}, answers of {row.case.answer_tokens} tokens"
        groups.setdefault(f"{row.model}, {lengths}", []).append(row)
    figure = Figure(
        figsize=(INCHES_WIDE, 3.6 * max(1, len(groups)) + 0.6),
        dpi=DOTS_PER_INCH, layout="constrained", facecolor="white",
    )  # fmt: skip
    panels = figure.subplots(max(1, len(groups)), len(SERVING_PANELS), sharey="col", squeeze=False)
    for (title, part), line in zip(groups.items(), panels, strict=False):
        for axes, (name, unit, value) in zip(line, SERVING_PANELS, strict=True):
            _serving_panel(axes, part, value)
            axes.set_ylabel(unit)
            axes.set_title(f"{title}\n{name}" if axes is line[0] else f"\n{name}", loc="left", fontsize=10)
    handles, labels = panels[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=len(labels) or 1, frameon=False)
    figure.suptitle(_described(machine), fontsize=11)
    figure.savefig(path, format="png")


def _serving_panel(
    axes: Axes, rows: Sequence[serving.Row], value: Callable[[serving.Row], float | None]
) -> None:
    from matplotlib.ticker import LogLocator

    for (engine, way), (label, colour, style) in SERVING_LINES.items():
        points = [
            (row.case.streams, height)
            for row in rows
            if (row.engine, row.path) == (engine, way) and (height := value(row))
        ]
        if points:
            axes.plot(*zip(*sorted(points), strict=True), style, color=colour, label=label, markersize=5)
    counts = sorted({row.case.streams for row in rows})
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    # Values within one decade would otherwise have a single number at their axis, or none.
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_major_formatter("{x:g}")
    axes.set_xticks(counts, [str(count) for count in counts])
    axes.minorticks_off()
    axes.set_xlabel("streams")
    axes.grid(color="#DDDDDD", linewidth=0.6)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
