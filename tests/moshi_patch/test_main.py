"""`python -m moshi_patch`: runs a program under the patch, refuses what is not there, hides nothing else."""

import json
import subprocess
import sys

import pytest
import torch

import moshi_patch
from moshi_patch.__main__ import main, without_cuda
from tests.support.tiny_repository import ENVIRONMENT, ROOT

NO_CUDA = pytest.mark.skipif(torch.cuda.is_available(), reason="about machines without CUDA")


@pytest.fixture
def modules(tmp_path, monkeypatch, patched):
    """A folder on the module search path; the patch and `sys.argv` are put back afterwards."""
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(sys, "argv", ["pytest"])
    return tmp_path


def test_an_unknown_module_is_one_line_on_stderr_and_exit_code_2():
    command = [sys.executable, "-m", "moshi_patch", "nosuch.module", "--device", "cpu"]
    run = subprocess.run(command, cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True, timeout=60)
    assert run.returncode == 2
    assert len(run.stderr.splitlines()) == 1
    assert "'nosuch.module'" in run.stderr
    assert run.stdout == ""


@pytest.mark.parametrize("name", ["moshi.nosuch", "moshi", ".server", "", "sys", "__main__"])
def test_what_cannot_be_run_is_unknown_too(name, modules, capsys):
    with pytest.raises(SystemExit) as exit_:
        main([name])
    assert exit_.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert repr(name) in line


def test_usage_is_shown_on_request_and_when_nothing_is_asked_for(capsys):
    with pytest.raises(SystemExit) as exit_:
        main(["-h"])
    assert exit_.value.code == 0
    assert "usage: python -m moshi_patch [-h] MODULE" in capsys.readouterr().out
    with pytest.raises(SystemExit) as exit_:
        main([])
    assert exit_.value.code == 2
    assert "usage: python -m moshi_patch [-h] MODULE" in capsys.readouterr().err


def test_the_module_runs_as_main_with_its_arguments_and_the_patch_installed(modules, capsys):
    moshi_patch.uninstall()
    (modules / "program.py").write_text(
        "import json, sys, moshi_patch\nprint(json.dumps([__name__, sys.argv[1:], moshi_patch.is_installed()]))\n"
    )
    main(["program", "-h", "--device", "cpu", "in.wav"])
    assert json.loads(capsys.readouterr().out) == ["__main__", ["-h", "--device", "cpu", "in.wav"], True]


def test_a_package_runs_through_its_main_module(modules, capsys):
    (modules / "program_package").mkdir()
    (modules / "program_package" / "__init__.py").touch()
    (modules / "program_package" / "__main__.py").write_text("print('ran')\n")
    main(["program_package"])
    assert capsys.readouterr().out == "ran\n"


def test_the_exit_code_is_the_programs_own(modules):
    (modules / "leaving.py").write_text("import sys\nsys.exit(7)\n")
    with pytest.raises(SystemExit) as exit_:
        main(["leaving"])
    assert exit_.value.code == 7


@pytest.mark.parametrize("name", ["broken_package", "broken_package.program", "broken_program"])
def test_a_module_whose_own_import_fails_is_not_taken_for_a_missing_one(name, modules):
    (modules / "broken_package").mkdir()
    (modules / "broken_package" / "__init__.py").write_text("import not_installed_anywhere\n")
    (modules / "broken_package" / "program.py").touch()
    (modules / "broken_program.py").write_text("import not_installed_anywhere\n")
    with pytest.raises(ModuleNotFoundError, match="not_installed_anywhere"):
        main([name])


@NO_CUDA
def test_waiting_for_cuda_fails_without_cuda_and_is_harmless_under_the_runner():
    with pytest.raises((AssertionError, RuntimeError)):
        torch.cuda.synchronize()
    with without_cuda():
        torch.cuda.synchronize()
        torch.cuda.synchronize(device="cuda:0")
    with pytest.raises((AssertionError, RuntimeError)):
        torch.cuda.synchronize()


def test_where_there_is_cuda_waiting_for_it_stays_as_it_is(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    stock = torch.cuda.synchronize
    with without_cuda():
        assert torch.cuda.synchronize is stock
