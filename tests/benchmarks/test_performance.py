"""docs/performance.md says what the committed results say."""

import pytest


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
