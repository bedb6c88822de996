"""What the README says can be typed is typed here."""

import re
from pathlib import Path

import pytest

import moshi_patch

ROOT = Path(__file__).parent.parent
BLOCKS = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.S)


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
    named = {name for text in texts for name in re.findall(r"(?:benchmarks|docs|example|tests)/[\w./]+\w", text)}
    assert len(named) > 5
    for name in named:
        assert (ROOT / name).exists(), name
