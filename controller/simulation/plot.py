"""The picture of a simulation: what each policy costs, and how long its callers wait."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from controller.simulation.results import Result


def draw(results: Sequence[Result], path: Path) -> None:
    """Draw the results as PNG; the first one is always-warm."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot
    from matplotlib.ticker import PercentFormatter

    figure, (cost, wait) = pyplot.subplots(1, 2, figsize=(11, 4.2), constrained_layout=True)
    ours = [result for result in results if result.decisions_per_second]
    others = [result for result in results if not result.decisions_per_second]
    cost.plot(
        [result.percentile(99) for result in ours],
        [result.saved(results[0]) for result in ours],
        "o-",
        label="Dumont, by idle_timeout",
    )
    for number, result in enumerate(ours):
        cost.annotate(
            result.policy.removeprefix("Dumont, idle "),
            (result.percentile(99), result.saved(results[0])),
            textcoords="offset points",
            xytext=(7, 4 - 12 * (number % 2)),
            fontsize=8,
        )
    for result, marker in zip(others, "s^D", strict=False):
        cost.plot(result.percentile(99), result.saved(results[0]), marker, label=result.policy)
    cost.axvline(2.0, color="0.7", linewidth=1, linestyle="--")
    cost.axhline(0.9, color="0.7", linewidth=1, linestyle="--")
    cost.set_xscale("log")
    cost.set_xlabel("99th percentile of the time to the first token, s")
    cost.set_ylabel("GPU-hours saved against always warm")
    cost.yaxis.set_major_formatter(PercentFormatter(1.0))
    cost.legend(fontsize=8)
    for result in results:
        values = result.first_token
        if not values:
            continue
        step = max(1, len(values) // 2000)
        shown = values[::step]
        wait.plot(
            shown, [(index * step + 1) / len(values) for index in range(len(shown))], label=result.policy
        )
    wait.set_xscale("log")
    wait.set_xlabel("time to the first token, s")
    wait.set_ylabel("share of the requests")
    wait.yaxis.set_major_formatter(PercentFormatter(1.0))
    wait.legend(fontsize=8)
    figure.savefig(path, dpi=110)
    pyplot.close(figure)
