"""The tables of both updates: what a model is compared with, how a missing run looks, what streams say."""

import pytest

from benchmarks.evidence.grid import Cell
from benchmarks.evidence.report import updates
from benchmarks.evidence.report.blocks import BLOCKS
from benchmarks.evidence.results import Results
from benchmarks.evidence.settings import Settings

pytestmark = pytest.mark.usefixtures("patched")

NAMED = {model.name: model for model in (*updates.SCRATCH, *updates.CONTINUED, *updates.FORMS)}
RESIDUAL = NAMED["gently, then rows of four: residual"]
WITHOUT = updates.NO_TTT


def line(model: updates.Model, seed: int, within: float, heard: str = "fresh", **after) -> dict:
    """A finished run with a stream of two units, the second worse by 0.25 nats."""
    settings = Settings(**model.settings | {"stream": heard, "seed": seed} | after)
    marks = {"first": 3.8, "within": within, "beyond": 0.5}
    final = {"": {mark: {"nats": nats, "hits": 0.5} for mark, nats in marks.items()}}
    points = [
        {"windows": 13.0 * unit, "beyond": 0.25 + 0.25 * unit, "first": 3.8 + unit, "entropy": 4.0 - unit}
        for unit in (1, 2)
    ]
    conditions = (model.condition,) if model.condition == "none" else ("on", "off")
    content = {condition: final for condition in conditions}
    streams = {condition: points for condition in conditions}
    return {
        "id": settings.id, "cell": "a", "status": "ok", "settings": settings.as_dict(),
        "final": content, "stream": streams, "training": {}, "seconds": 1.0,
    }  # fmt: skip


def results(*lines: dict) -> Results:
    return Results([Cell("a", 1, (0,), {}, {})], {entry["id"]: entry for entry in lines})


def test_no_two_models_are_trained_alike():
    assert len({Settings(**model.settings).id for model in NAMED.values()}) == len(NAMED)


def column(table: str, heading: str) -> dict[str, str]:
    """One column of a Markdown table, by the first cell of each row."""
    rows = [[cell.strip() for cell in row.split("|")[1:-1]] for row in table.splitlines()]
    return {row[0]: row[rows[0].index(heading)] for row in rows}


def test_what_is_lost_within_the_window_is_compared_seed_by_seed():
    found = results(line(WITHOUT, 0, 0.2), line(WITHOUT, 1, 0.6), line(RESIDUAL, 0, 0.3), line(RESIDUAL, 1, 0.5))
    table = column(BLOCKS["reached"](found), "residual, taught on gently, then in rows of four")
    assert table["e. within the window, more than without TTT"] == "0.00 (-0.10–0.10)"
    assert table["a. fresh: last unit less the first"] == "0.25 (0.25–0.25)"
    assert table["i. entropy of own samples, lowest"] == "–"
    assert table["seeds"] == "2"


def test_a_longer_teaching_is_compared_with_one_without_ttt_of_equal_length():
    longer = NAMED["gently, then rows of four, 3600 steps: residual"]
    alone = NAMED["gently, then rows of four, 3600 steps: no TTT"]
    found = results(line(WITHOUT, 0, 0.2), line(longer, 0, 0.6))
    rows = ("e. within the window, more than without TTT", "h. new text, more than without TTT")
    assert [column(BLOCKS["reached"](found), "the same, three times the steps")[row] for row in rows] == ["–", "–"]
    found = results(line(WITHOUT, 0, 0.2), line(longer, 0, 0.6), line(alone, 0, 0.5))
    assert [column(BLOCKS["reached"](found), "the same, three times the steps")[row] for row in rows] == [
        "0.10",
        "0.00",
    ]


def test_a_stream_without_a_sweep_is_found_too_and_one_that_is_missing_is_a_dash():
    found = results(line(RESIDUAL, 0, 0.25, sweep=True), line(RESIDUAL, 0, 0.25, heard="own"))
    row = next(row for row in BLOCKS["updates_tried"](found).splitlines() if row.startswith(f"| {RESIDUAL.name}"))
    cells = [cell.strip() for cell in row.split("|")[1:-1]]
    assert cells[6:] == ["0.50 → 0.75", "–", "0.50 → 0.75", "5.80", "2.00", "1"]


def test_the_harm_is_told_with_updates_off_and_on():
    rows = BLOCKS["harm"](results(line(RESIDUAL, 0, 0.25), line(WITHOUT, 0, 0.2))).splitlines()
    expected = [WITHOUT.name, f"{RESIDUAL.name}, updates off", f"{RESIDUAL.name}, updates on"]
    assert [row.split("|")[1].strip() for row in rows[2:]] == expected
