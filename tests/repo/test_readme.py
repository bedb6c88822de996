"""What the README says can be typed is typed here."""

import dataclasses
import json
import re
from pathlib import Path

import pytest

import moshi_patch

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"```python\n(.*?)```", README, re.S)


@pytest.mark.usefixtures("patched")
def test_python_blocks_run_one_after_the_other(capsys):
    assert BLOCKS
    names = {}
    for block in BLOCKS:
        exec(compile(block, "README.md", "exec"), names)
    assert moshi_patch.is_installed()
    assert "'updates': [3]" in capsys.readouterr().out


def test_files_the_documentation_names_exist():
    texts = [path.read_text() for path in [ROOT / "README.md", *(ROOT / "docs").glob("*.md")]]
    named = {name for text in texts for name in re.findall(r"(?<!\w)(?:benchmarks|docs|example|tests)/[\w./]+\w", text)}
    assert len(named) > 5
    for name in named:
        assert (ROOT / name).exists(), name


def row(start: str) -> list[str]:
    """The cells of the line of the README's table that begins with `start`."""
    (line,) = [line for line in README.splitlines() if line.startswith(f"| {start} |")]
    return [cell.strip() for cell in line.strip("|").split("|")]


def test_the_recall_that_is_said_is_that_of_the_committed_results():
    lines = (ROOT / "benchmarks" / "results" / "recall.jsonl").read_text().splitlines()
    runs = sorted(map(json.loads, lines), key=lambda run: run["settings"]["seed"])

    def nats(case: str, condition: str) -> str:
        found = [run["final"] for run in runs if run["cell"] == case and condition in run["final"]]
        return " / ".join(f"{final[condition]['']['beyond']['nats']:.2f}" for final in found)

    for case in ("easy", "hard"):
        said = row(f"recall of random tokens beyond attention, {case}")
        assert said[1:3] == [nats(case, "on"), nats(case, "none")]
    assert row("the same weights with updates off, easy")[1] == nats("easy", "off")


def test_every_other_number_of_the_table_stands_in_the_page_it_is_from():
    pages = "\n".join(
        (ROOT / "docs" / f"{name}.md").read_text() for name in ("evidence", "evidence_tables", "performance")
    )
    table = README[README.index("## What was measured") : README.index("Where it helps")]
    numbers = [
        number
        for line in table.splitlines()
        if "recall of random" not in line
        for number in re.findall(r"\d\.\d\d", line)
    ]
    assert len(numbers) > 8
    assert [number for number in numbers if number not in pages and number not in ("3.79",)] == []


def test_the_readme_is_read_in_five_minutes():
    assert len(README.splitlines()) <= 150


def test_every_keyword_stands_in_the_method_with_its_default():
    rows = re.findall(r"^\| `ttt_(\w+)` \| `(.*?)` \|", (ROOT / "docs" / "method.md").read_text(), re.M)
    assert rows == [(field.name, repr(field.default)) for field in dataclasses.fields(moshi_patch.TTTConfig)]
