"""How a bench is told: as a document, as a table, as a picture's parts."""

from __future__ import annotations

from dumont.benchmarks import plot, report
from dumont.benchmarks.results import CASES, Costs, Row, Spread

LOCAL = Row(
    model="qwen3-0.6b",
    case="local",
    rounds=3,
    seconds=Spread(0.81234567, 0.8, 0.9),
    phases={"criu": 0.5, "directory": 0.0001, "cuda_restore": 0.25},
    ratios={"plain_cold": 11.456, "stock": 3.0},
    costs=Costs(
        image_bytes=950_000_000,
        stored_bytes=260_000_000,
        source_pause=Spread(1.7, 1.6, 1.8),
        capture_phases={"dump": 1.0},
    ),
)
PARKED = Row(
    "qwen3-0.6b", "parked", 3, Spread(0.5, 0.4, 0.6), {"wake": 0.5}, {},
    Costs(park=Spread(0.3, 0.3, 0.3), gpu_bytes_serving=2_000_000_000, gpu_bytes_parked=0),
)  # fmt: skip


def test_the_document_holds_machine_run_and_rows() -> None:
    document = report.document({"gpu": "H100"}, [LOCAL], date="2026-11-23", rounds=3)
    assert (document["machine"], document["date"], document["rounds"]) == ({"gpu": "H100"}, "2026-11-23", 3)
    assert document["rows"] == [
        {
            "model": "qwen3-0.6b",
            "case": "local",
            "rounds": 3,
            "seconds": {"median": 0.8123, "min": 0.8, "max": 0.9},
            "phases": {"criu": 0.5, "directory": 0.0001, "cuda_restore": 0.25},
            "ratios": {"plain_cold": 11.46, "stock": 3.0},
            "image_bytes": 950_000_000,
            "stored_bytes": 260_000_000,
            "source_pause": {"median": 1.7, "min": 1.6, "max": 1.8},
            "capture_phases": {"dump": 1.0},
        }
    ]


def test_a_parked_row_tells_what_parking_takes_and_leaves_on_the_gpu() -> None:
    (row,) = report.document({}, [PARKED])["rows"]
    assert (row["image_bytes"], row["stored_bytes"]) == (None, None)
    assert row["park"]["median"] == 0.3
    assert (row["gpu_bytes_serving"], row["gpu_bytes_parked"]) == (2_000_000_000, 0)
    assert "source_pause" not in row


def test_the_table_has_a_cell_for_each_header() -> None:
    cells = dict(zip(report.HEADERS, report.cells(LOCAL), strict=True))
    assert cells["seconds"] == "0.812"
    assert cells["min–max"] == "0.800–0.900"
    assert (cells["plain ÷"], cells["stock ÷"]) == ("11.5", "3.0")
    assert (cells["image"], cells["stored"], cells["paused"]) == ("950 MB", "260 MB", "1.700")
    cells = dict(zip(report.HEADERS, report.cells(PARKED), strict=True))
    assert (cells["plain ÷"], cells["image"], cells["paused"]) == ("", "", "0.300")


def test_phases_too_short_to_be_seen_are_not_listed() -> None:
    assert report.phase_line(LOCAL) == "qwen3-0.6b local: criu 0.500, cuda_restore 0.250"


def test_a_phase_has_the_colour_of_what_it_does_in_whatever_case() -> None:
    groups = {phase: plot.group(phase) for phase in ("imports", "load.import_torch", "load.load_weights")}
    assert groups == {"imports": "imports", "load.import_torch": "imports", "load.load_weights": "load"}
    assert plot.group("criu") == "CRIU restore"
    assert plot.group("cuda_restore") == "CUDA restore"
    assert plot.group("check") == "verify the image"
    checks = ("load.check_batching", "load.check_graphs", "load.compile_kernels", "load.capture_graphs")
    assert {plot.group(phase) for phase in checks} == {"warm-up, canary"}
    assert plot.group("thaw") == plot.OTHER
    assert set(plot.BEGINNINGS.values()) | {plot.OTHER} == set(plot.GROUPS)


def test_groups_are_drawn_in_the_order_in_which_they_happen() -> None:
    drawn = plot.grouped({"launch": 1.0, "cuda_restore": 3.0, "criu": 2.0, "wake": 0.0, "serve": 1.0})
    assert list(drawn.items()) == [("CRIU restore", 2.0), ("CUDA restore", 3.0), (plot.OTHER, 2.0)]


def test_short_ways_get_a_panel_of_their_own_only_beside_long_ones() -> None:
    def row(case: str) -> Row:
        return Row("m", case, 1, Spread(1, 1, 1), {}, {}, Costs())

    every, short = plot.panels([row(case) for case in CASES])
    assert {one.case for one in every} == set(CASES)
    assert [one.case for one in short] == list(plot.SHORT)
    assert plot.panels([row("local"), row("parked")]) == [[row("local"), row("parked")]]
    assert plot.panels([row("cold")]) == [[row("cold")]]


def test_short_times_are_written_with_more_digits() -> None:
    assert (plot.seconds_text(9.876), plot.seconds_text(0.0123)) == ("9.88 s", "0.012 s")
