"""docs/performance.md says what the committed results say, and so do the figures of docs/serving.md."""

import json
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]


def test_every_table_is_made_of_the_committed_results():
    from benchmarks.cost.performance import PAGE, PARTS
    from benchmarks.pages import fill

    page = PAGE.read_text()
    assert all(f"<!-- {name} -->" in page for name in PARTS)
    assert fill(page, PARTS) == page, "run python -m benchmarks.cost.performance"


def test_markers_that_do_not_fit_are_refused():
    from benchmarks.pages import fill

    parts = {"one": lambda: "1"}
    assert fill("a <!-- one -->\nold\n<!-- end one --> b", parts) == "a <!-- one -->\n1\n<!-- end one --> b"
    with pytest.raises(ValueError, match="no such part"):
        fill("<!-- two --><!-- end two -->", parts)
    with pytest.raises(ValueError, match="is missing"):
        fill("<!-- one -->", parts)


def test_what_a_person_costs_is_that_of_the_committed_results():
    page = (ROOT / "docs" / "serving.md").read_text()

    def results(name: str) -> dict[str, Any]:
        return json.loads((ROOT / "benchmarks" / "results" / f"{name}.json").read_text())["results"]

    for row in results("many")["rows"]:
        mine, stock = row["many"], row["stock"]
        cells = [row["rows"], f"{mine['processor_ms_per_frame']:.1f} ms"]
        cells += [
            f"{row['stock_servers']}: {stock['processor_ms_per_frame']:.1f} ms",
            f"{row['processor_over_stock']:.2f}",
        ]
        cells += [f"{mine['tick_ms_p50']:.0f}, {mine['tick_ms_p99']:.0f} ms"]
        cells += [f"{mine['response_ms']['p50']:.0f}, {mine['response_ms']['p99']:.0f} ms"]
        cells += [f"{100 * mine['late'] / mine['answers']:.1f} %", mine["dropped"]]
        assert f"| {' | '.join(map(str, cells))} |" in page
    for row in results("many_float32")["rows"]:
        mine, stock = row["many"]["processor_ms_per_frame"], row["stock"]["processor_ms_per_frame"]
        assert f"{mine:.1f} ms against {stock:.1f} ({row['processor_over_stock']:.2f}) at {row['rows']}" in page
    hour = results("many_hour")["steady"]
    assert f"{hour['joined']:,} joins" in page
    assert f"{hour['slope_mib_per_minute']} MiB a minute" in page
    assert f"p50 {hour['tick_ms_p50']:.0f} ms, p99 {hour['tick_ms_p99']:.0f} ms" in page
    assert f"{hour['dropped']} of {hour['frames']:,} frames" in page
    later = results("many_45_minutes")["steady"]
    assert f"{later['joined']} joins, tick p50 {later['tick_ms_p50']:.0f} ms, p99 {later['tick_ms_p99']:.0f} ms" in page
    assert f"{later['dropped']} of {later['frames']:,} frames" in page
    assert f"{later['slope_mib_per_minute']} MiB a minute" in page
