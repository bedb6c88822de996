"""What is installed is all of it, with all it needs, and works outside the checkout."""

import ast
import re
import shutil
import subprocess
import sys
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest
from setuptools import find_packages

import moshi_ttt
from tests.support.tiny_repository import DATA, ENVIRONMENT, ROOT

pytestmark = pytest.mark.slow

PYPROJECT = (ROOT / "pyproject.toml").read_text()
OPTIONAL = {"wandb": "imported when `wandb.project` is set, and asked for by name where it is missing"}
INDIRECT = {"tensorboard"}
"""Imported by `torch.utils.tensorboard`."""
SKIPPED = shutil.ignore_patterns(".*", "runs", "demo_out", "build", "dist", "*.egg-info", "__pycache__", "results")


def test_every_subpackage_is_in_the_wheel():
    (patterns,) = re.findall(r"^include = (\[.*\])$", PYPROJECT, re.M)
    found = set(find_packages(str(ROOT), include=re.findall(r'"([^"]+)"', patterns)))
    tops = [ROOT / name for name in ("moshi_patch", "finetune")]
    packages = {".".join(path.parent.relative_to(ROOT).parts) for top in tops for path in top.rglob("__init__.py")}
    folders = {".".join(path.parent.relative_to(ROOT).parts) for top in tops for path in top.rglob("*.py")}
    assert found == packages == folders
    assert {"moshi_patch.kinds.in_place.ops", "finetune.data"} <= found


def test_the_page_is_in_the_wheel(installed):
    page = Path("moshi_patch", "serving", "web", "page")
    names = {path.name for path in (installed / page).iterdir()}
    assert names == {path.name for path in (ROOT / page).iterdir()} >= {"index.html", "app.js", "style.css"}


def test_what_is_imported_is_declared():
    (block,) = re.findall(r"^dependencies = \[\n(.*?)^\]", PYPROJECT, re.M | re.S)
    declared = {_plain(name) for name in re.findall(r'^\s*"([\w-]+)', block, re.M)}
    sources = [*(ROOT / "finetune").rglob("*.py"), *(ROOT / "moshi_patch").rglob("*.py"), *ROOT.glob("*.py")]
    imported = {name for path in sources for name in _imports(path)} - sys.stdlib_module_names - OPTIONAL.keys()
    names = packages_distributions()
    needed = {name: {_plain(one) for one in names[name]} for name in imported - {"finetune", "moshi_patch"}}
    assert {name for name, found in needed.items() if not found & declared} == set()
    assert declared == {one for found in needed.values() for one in found & declared} | INDIRECT


def _imports(path: Path) -> set[str]:
    nodes = list(ast.walk(ast.parse(path.read_text())))
    names = {alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names}
    names |= {node.module for node in nodes if isinstance(node, ast.ImportFrom) and not node.level}
    return {name.split(".")[0] for name in names}


def _plain(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


@pytest.fixture(scope="module")
def installed(tmp_path_factory) -> Path:
    """A folder with what `pip install` makes of the wheel that is built from the sdist, and nothing else."""
    folder = tmp_path_factory.mktemp("installed")
    shutil.copytree(ROOT, folder / "source", ignore=SKIPPED)
    _run("-m", "build", "--no-isolation", "--outdir", folder / "dist", folder / "source")
    (wheel,), (sdist,) = (folder / "dist").glob("*.whl"), (folder / "dist").glob("*.tar.gz")
    assert sdist.stat().st_size > 10_000
    _run("-m", "pip", "install", "--no-deps", "--no-index", "--target", folder / "site", wheel)
    return folder / "site"


def _run(*words: object, **variables: str) -> subprocess.CompletedProcess:
    done = subprocess.run(
        [sys.executable, *map(str, words)], env=ENVIRONMENT | variables, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done


def test_the_wheel_gives_commands_that_work_outside_the_checkout(installed, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    command = installed / "bin" / "moshi-ttt"
    shown = _run(command, "--help", PYTHONPATH=str(installed)).stdout
    assert all(name in shown for name in moshi_ttt.COMMANDS)
    where = f"import finetune, moshi_patch, moshi_ttt; print(finetune.__file__, moshi_patch.__file__, '{installed}')"
    assert _run("-c", where, PYTHONPATH=str(installed)).stdout.count(str(installed)) == 3
    checked = _run(command, "data", "check", DATA / "train.jsonl", PYTHONPATH=str(installed))
    assert "0 problems" in checked.stdout
    other = tmp_path / "other" / "finetune"
    other.mkdir(parents=True)
    (other / "__init__.py").write_text("")
    words = [sys.executable, str(command), "train", "run.yaml"]
    variables = ENVIRONMENT | {"PYTHONPATH": f"{other.parent}:{installed}"}
    done = subprocess.run(words, env=variables, capture_output=True, text=True, timeout=60)
    assert done.returncode == 2
    (line,) = done.stderr.splitlines()
    assert line.startswith(f"moshi-ttt: the package `finetune` that Python finds is not this project's ({other})")


@pytest.mark.parametrize("content", ["", "PROJECT = 'another'", "import not_installed_anywhere", "1 / 0", "("])
def test_another_projects_finetune_is_told_apart(content, tmp_path, monkeypatch, capsys):
    (tmp_path / "finetune").mkdir()
    (tmp_path / "finetune" / "__init__.py").write_text(content)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "finetune", raising=False)
    for command in ("train", "evaluate", "export", "doctor", "data"):
        assert moshi_ttt.main([command]) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert "moshi-finetune's has the same name" in line
    assert moshi_ttt.main(["--help"]) == 0


@pytest.mark.parametrize("argv", [[], ["nosuch"], ["--nosuch"], ["trian", "run.yaml"]])
def test_an_unknown_command_names_the_known_ones(argv, capsys):
    assert moshi_ttt.main(argv) == 2
    errors = capsys.readouterr().err
    assert all(name in errors for name in moshi_ttt.COMMANDS)
