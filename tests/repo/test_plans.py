"""docs/plans.md: what it says of the five documents is there: each test, each command with its options, each name."""

import ast
import contextlib
import functools
import importlib
import io
import re
import shlex
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
TEXT = (ROOT / "docs" / "plans.md").read_text()
HEAD = ["of", "named there", "here", "tested by", "why it is different"]
PROGRAMS = {"train.py": "finetune.training", "eval_from_checkpoint.py": "finetune.evaluation"}
TEST = re.compile(r"`(tests/[\w/]+\.py)::(test_\w+)`")


@dataclass(frozen=True)
class Row:
    """A line of a table of the page: documents by number, and its cells."""

    documents: tuple[int, ...]
    named: str
    here: str
    tests: str
    reason: str


def cells(line: str) -> list[str]:
    return [cell.strip() for cell in re.split(r"(?<!\\)\|", line.strip())[1:-1]]


ROWS = [
    Row(tuple(map(int, of.split(", "))), *rest)
    for of, *rest in (cells(line) for line in TEXT.splitlines() if line.startswith("| "))
    if of != HEAD[0]
]


@functools.cache
def defined(path: str) -> frozenset[str]:
    """Functions, classes and their members, and constants that a file of the repository defines."""
    tree = ast.parse((ROOT / path).read_text())
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
            found.add(node.name)
        targets = getattr(node, "targets", [getattr(node, "target", None)])
        found |= {target.id for target in targets if isinstance(target, ast.Name)}
    return frozenset(found)


def names(row: Row) -> str:
    return row.named[:60]


def test_there_is_a_row_for_everything_and_of_each_document():
    heads = [cells(line) for line in TEXT.splitlines() if line.startswith("| of ")]
    assert heads
    assert all(head == HEAD for head in heads)
    documents = dict(re.findall(r"^(\d)\. \*(.+)\*", TEXT, re.M))
    assert list(documents) == ["1", "2", "3", "4", "5"]
    for number in map(int, documents):
        assert sum(number in row.documents for row in ROWS) > 15, number
    assert {number for row in ROWS for number in row.documents} == {1, 2, 3, 4, 5}
    assert len({row.named for row in ROWS}) == len(ROWS), "nothing is named twice"
    assert len(ROWS) > 100


@pytest.mark.parametrize("row", ROWS, ids=names)
def test_a_row_names_tests_that_are_there_or_says_why_it_is_different(row):
    found = TEST.findall(row.tests)
    assert row.here
    assert found or row.reason, "neither a test nor a reason"
    assert TEST.sub("", row.tests).strip(" ,") == "", "what is tested is named as path::test, and nothing else"
    for path, test in found:
        assert (ROOT / path).is_file(), path
        assert test in defined(path), f"{path}::{test}"


@pytest.mark.parametrize(
    ("path", "name"), sorted({match for row in ROWS for match in re.findall(r"`([\w/]+\.py):(\w+)`", row.here)})
)
def test_a_name_of_a_module_is_defined_there(path, name):
    assert name in defined(path)


def test_files_and_public_names_are_there():
    spans = {span for row in ROWS for span in re.findall(r"`([^`]+)`", row.here)}
    paths = {span.split(":")[0] for span in spans if re.fullmatch(r"(?:[\w.]+/)+[\w.]*(?::\w+)?|\w+\.(?:py|md)", span)}
    assert len(paths) > 30
    ours = [path for path in paths if path.split("/")[0] in {item.name for item in ROOT.iterdir()}]
    assert [path for path in ours if not (ROOT / path).exists()] == []
    for name in {span.removeprefix("moshi_patch.").split("(")[0] for span in spans if span.startswith("moshi_patch.")}:
        assert hasattr(importlib.import_module("moshi_patch"), name), name


COMMANDS = sorted(
    {span for row in ROWS for span in re.findall(r"`((?:python|torchrun) [^`]+)`", row.here)}
    | {
        line.split("#")[0].strip()
        for block in re.findall(r"```bash\n(.*?)```", TEXT, re.S)
        for line in block.splitlines()
    }
)


@functools.cache
def help_of(module: str, *words: str) -> str:
    """What the program in `module` says of its options."""
    said = io.StringIO()
    main = importlib.import_module(f"{module}.__main__").main
    with contextlib.redirect_stdout(said):
        assert main([*words, "--help"]) == 0
    return said.getvalue()


@pytest.mark.parametrize("command", COMMANDS)
def test_a_command_is_one_and_has_its_options(command):
    words = shlex.split(command)
    if words[0] == "torchrun":
        words = words[next(index for index, word in enumerate(words) if word.endswith(".py")) :]
    else:
        words = words[2:] if words[1] == "-m" else words[1:]
    module = PROGRAMS.get(words[0], words[0])
    if module == "moshi_patch":
        assert callable(importlib.import_module("moshi_patch.__main__").main)
        return
    known = [word for word in words[1:2] if word in ("check", "split")]
    options = [word.split("=")[0] for word in words[1:] if word.startswith("--")]
    if "--import-ancestor" in options:
        known = ["--import-ancestor"]
    said = help_of(module, *known)
    assert [option for option in options if not re.search(rf"(?<!\w){re.escape(option)}(?![\w-])", said)] == []
    assert all((ROOT / word).is_file() for word in words if word.startswith("example/"))
