"""docs/performance.md says what the committed results say, and so do the figures of docs/serving.md."""

import json
from pathlib import Path

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

    def measured(name: str) -> dict[int, list[str]]:
        rows = json.loads((ROOT / "benchmarks" / "results" / f"{name}.json").read_text())["results"]["rows"]
        times = {row["rows"]: [row[one]["processor_ms_per_frame"] for one in ("many", "stock")] for row in rows}
        ratios = {row["rows"]: row["processor_over_stock"] for row in rows}
        return {count: [*(f"{ms:.1f}" for ms in pair), f"{ratios[count]:.2f}"] for count, pair in times.items()}

    for count, (many, stock, ratio) in measured("many").items():
        assert f"| {count} | {many} ms | {stock} ms | {ratio} |" in page
    for many, stock, ratio in measured("many_float32").values():
        assert f"{many}" in page
        assert f"{stock} ({ratio})" in page
