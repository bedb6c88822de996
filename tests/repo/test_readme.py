"""What the README says can be typed is typed here."""

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


def test_the_recall_table_is_that_of_the_committed_results():
    rows = {
        line.split(",")[0].strip("| "): line for line in README.splitlines() if line.startswith(("| easy", "| hard"))
    }
    lines = (ROOT / "benchmarks" / "results" / "recall.jsonl").read_text().splitlines()
    for case, row in rows.items():
        runs = sorted(
            (run for run in map(json.loads, lines) if run["cell"] == case), key=lambda run: run["settings"]["seed"]
        )
        columns = [("on", "first"), ("none", "beyond"), ("on", "beyond"), ("off", "beyond")]
        for (condition, mark), cell in zip(columns, row.replace("*", "").split("|")[2:6], strict=True):
            nats = [run["final"][condition][""][mark]["nats"] for run in runs if condition in run["final"]]
            assert cell.strip() == " / ".join(f"{one:.2f}" for one in nats), (case, condition, mark)
    assert set(rows) == {"easy", "hard"}
