"""Rows as a JSON document and as a table's cells. Pure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any, Final

from dumont.benchmarks.results import Row, Spread

HEADERS: Final = ("model", "case", "seconds", "min–max", "plain ÷", "stock ÷", "image", "stored", "paused")
# As many digits as the measurements are good for.
DIGITS: Final = 4


def document(machine: Mapping[str, Any], rows: Sequence[Row], **facts: Any) -> dict[str, Any]:
    """Everything that a benchmark measured. ``facts``: about the run, such as its command and date."""
    return {"machine": dict(machine), **facts, "rows": [_row(row) for row in rows]}


def _row(row: Row) -> dict[str, Any]:
    costs = row.costs
    optional = {
        "source_pause": _spread(costs.source_pause),
        "capture_phases": _rounded(costs.capture_phases) or None,
        "park": _spread(costs.park),
        "gpu_bytes_serving": costs.gpu_bytes_serving,
        "gpu_bytes_parked": costs.gpu_bytes_parked,
    }
    return {
        "model": row.model,
        "case": row.case,
        "rounds": row.rounds,
        "seconds": _spread(row.seconds),
        "phases": _rounded(row.phases),
        "ratios": {base: round(ratio, 2) for base, ratio in row.ratios.items()},
        "image_bytes": costs.image_bytes,
        "stored_bytes": costs.stored_bytes,
        **{name: value for name, value in optional.items() if value is not None},
    }


def _spread(spread: Spread | None) -> dict[str, float] | None:
    return None if spread is None else _rounded(asdict(spread))


def _rounded(values: Mapping[str, float]) -> dict[str, float]:
    return {name: round(value, DIGITS) for name, value in values.items()}


def cells(row: Row) -> tuple[str, ...]:
    """A row of the table with the columns of ``HEADERS``; a cell without a value is empty."""
    costs = row.costs
    pause = costs.source_pause or costs.park
    return (
        row.model,
        row.case,
        f"{row.seconds.median:.3f}",
        f"{row.seconds.min:.3f}–{row.seconds.max:.3f}",
        _ratio(row, "plain_cold"),
        _ratio(row, "stock"),
        _megabytes(costs.image_bytes),
        _megabytes(costs.stored_bytes),
        f"{pause.median:.3f}" if pause else "",
    )


def phase_line(row: Row) -> str:
    """The phases that are long enough to matter, on one line."""
    told = ", ".join(f"{name} {seconds:.3f}" for name, seconds in row.phases.items() if seconds >= 0.0005)
    return f"{row.model} {row.case}: {told}"


def _ratio(row: Row, base: str) -> str:
    return f"{row.ratios[base]:.1f}" if base in row.ratios else ""


def _megabytes(count: int | None) -> str:
    return "" if count is None else f"{count / 1e6:,.0f} MB"
