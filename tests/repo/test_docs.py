"""What docs/checkpoints.md says can be typed is typed here, in its order, and its messages are those of the code."""

import ast
import functools
import re
import runpy
import shlex
import string
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from moshi.models import LMModel, loaders

from tests.support.models import TINY, TTT
from tests.support.tiny_repository import ENVIRONMENT, ROOT

pytestmark = pytest.mark.slow

TEXT = (ROOT / "docs" / "checkpoints.md").read_text()
NOT_RUN = {
    "hf upload": "needs an account",
    "python -m finetune.export runs/tiny_ttt exports/best --best": "no evaluation here; see tests/export/test_best.py",
    "python -m moshi_patch moshi.server": "runs until it is stopped; tests/moshi_patch/serving starts it",
}
"""Commands that are not run here, and why."""

FASTER = ["--do_eval=false", "--duration_sec=4", "--batch_size=1"]
"""For every training: what it shows does not depend on how long it takes."""


def commands() -> list[str]:
    """Those of all bash blocks, in their order, with comments and continued lines resolved."""
    blocks = re.findall(r"```bash\n(.*?)```", TEXT, re.S)
    lines = "".join(blocks).replace("\\\n", " ").splitlines()
    return [line for line in lines if line.strip()]


def run_python(arguments: list[str]) -> None:
    """As `python ARGUMENTS` would in a process of its own, which would take seconds to import torch each time."""
    kept = sys.argv, list(sys.path), torch.get_num_threads()
    try:
        if arguments[0] == "-m":
            sys.argv = arguments[1:]
            runpy.run_module(arguments[1], run_name="__main__", alter_sys=True)
        else:
            sys.argv = arguments
            runpy.run_path(str(ROOT / arguments[0]), run_name="__main__")
    except SystemExit as end:
        if end.code not in (None, 0):
            raise RuntimeError(f"{arguments} ended with {end.code}") from end
    finally:
        sys.argv, sys.path[:] = kept[:2]
        torch.set_num_threads(kept[2])


@pytest.mark.filterwarnings("ignore:.*found in sys.modules.*:RuntimeWarning")  # of runpy, for modules known already
def test_every_command_runs(tmp_path, monkeypatch, patched, capfd):
    (tmp_path / "example").symlink_to(ROOT / "example")
    monkeypatch.chdir(tmp_path)
    variables, ran, waived = {}, [], set()
    for line in commands():
        words = shlex.split(string.Template(line).substitute(variables), comments=True)
        skipped = [start for start in NOT_RUN if line.startswith(start)]
        if skipped:
            waived.update(skipped)
        elif len(words) == 1 and "=" in words[0]:
            name, _, variables[name] = words[0].partition("=")
        elif words[0] == "python":
            run_python(words[1:] + (FASTER if words[1] == "train.py" else []))
            ran.append(words)
        else:
            subprocess.run(line, shell=True, check=True, env=ENVIRONMENT, capture_output=True)
            ran.append(words)
    assert len(ran) > 14
    assert waived == NOT_RUN.keys()
    assert {path.name for path in (tmp_path / "exports").iterdir()} == {"merged", "full", "adapters"}
    card = (tmp_path / "exports" / "full" / "README.md").read_text()
    assert "| reliance |" in card
    assert (tmp_path / "results" / "eval.json").is_file()
    assert "FAILED" not in capfd.readouterr().out.replace("0 FAILED", "")


def test_scripts_and_modules_that_are_named_exist():
    for line in commands():
        words = shlex.split(line, comments=True)
        if words[:2] == ["python", "-m"]:
            assert any((ROOT / words[2].replace(".", "/")).with_suffix(end).exists() for end in ("", ".py")), line
        elif words[0] == "python" and not line.startswith(tuple(NOT_RUN)):
            assert (ROOT / words[1]).is_file(), line


@functools.cache
def templates() -> list[str]:
    """All texts in the source, each inserted value as a zero character."""
    files = [*(ROOT / "finetune").rglob("*.py"), *(ROOT / "moshi_patch").rglob("*.py"), Path(loaders.__file__)]
    found = []
    for file in files:
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.JoinedStr):
                parts = [part.value if isinstance(part, ast.Constant) else "\0" for part in node.values]
                found.append("".join(parts))
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                found.append(node.value)
    return found


def messages() -> list[str]:
    rows = [line for line in TEXT.split("## When something is wrong")[1].splitlines() if line.startswith("| `")]
    cells = [row.split(" | ")[0] for row in rows]
    return [one or other for cell in cells for one, other in re.findall(r"`` (.+?) ``|`([^`]+)`", cell)]


@pytest.mark.parametrize("message", [one for one in messages() if "unexpected keyword" not in one])
def test_a_message_is_one_that_the_code_gives(message):
    pattern = re.compile(".*".join(re.escape(part.strip()) for part in message.split("...")), re.S)
    assert any(pattern.search(template) for template in templates()), message


def test_without_the_patch_moshi_says_what_the_table_says():
    (message,) = [one for one in messages() if "unexpected keyword" in one]
    with pytest.raises(TypeError, match=message):
        LMModel(**TINY, **TTT)
