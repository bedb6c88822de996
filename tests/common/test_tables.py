"""Tables of text: numbers stand on the right, and no cell breaks a Markdown table."""

import pytest

from finetune.common.tables import columns, markdown


def test_columns_are_aligned_and_numbers_stand_on_the_right():
    table = columns(["name", "loss"], [["updates on", "2.5"], ["no TTT", "+11.25"], ["none", ""]])
    assert table.splitlines() == [
        "name          loss",
        "------------------",
        "updates on     2.5",
        "no TTT      +11.25",
        "none",
    ]


def test_a_markdown_cell_with_a_bar_or_two_lines_stays_one_cell():
    assert markdown(["a", "b"], [["x | y", "one\ntwo"]]) == "| a | b |\n| --- | --- |\n| x \\| y | one two |"
    assert markdown(["a", "b"], [[1, 2]], numbers_right=True).splitlines()[1] == "| --- | ---: |"


@pytest.mark.parametrize("write", [columns, markdown])
def test_a_row_of_another_length_is_a_mistake(write):
    with pytest.raises(ValueError, match=r"row of a table|zip\(\) argument"):
        write(["a", "b"], [["only one"]])
