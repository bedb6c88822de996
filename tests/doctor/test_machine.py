"""The doctor tells what is wrong with a machine: what is missing, of another version, or does not fit."""

import subprocess
import sys

import pytest

import moshi_patch
from finetune.doctor.finding import FAILED, OK, WARNING
from finetune.doctor.machine import check_machine
from tests.support.tiny_repository import ENVIRONMENT, ROOT


@pytest.fixture(autouse=True)
def _patched(patched):
    """Stock again afterwards, whatever a test leaves."""


@pytest.mark.parametrize("installed", [True, False])
def test_the_check_of_the_patch_leaves_moshi_as_it_was(installed, tmp_path):
    (moshi_patch.install if installed else moshi_patch.uninstall)()
    assert [check.status for check in check_machine(tmp_path) if check.name == "patch"] == [OK]
    assert moshi_patch.is_installed() == installed


def test_a_moshi_that_the_patch_does_not_fit_fails_and_is_named(monkeypatch, tmp_path):
    moshi_patch.uninstall()
    monkeypatch.setattr("moshi.modules.gating.ActivationGating.forward", lambda self, x, more: x)
    (check,) = [check for check in check_machine(tmp_path) if check.name == "patch"]
    assert check.status == FAILED
    assert "ActivationGating" in check.value or "should take x alone" in check.value


def test_versions_outside_of_the_tested_range_are_named(monkeypatch, tmp_path):
    monkeypatch.setattr("importlib.metadata.version", lambda name: {"torch": "2.4.0+cu121", "moshi": "0.3.1"}[name])
    checks = {check.name: check for check in check_machine(tmp_path)}
    for name, version in {"torch": "2.4.0+cu121", "moshi": "0.3.1"}.items():
        assert checks[name].status == WARNING
        assert version in checks[name].value
        assert "tested from" in checks[name].remedy


def test_without_moshi_it_still_says_what_is_missing(tmp_path):
    (tmp_path / "moshi").mkdir()
    (tmp_path / "moshi" / "__init__.py").write_text("raise ImportError('there is no moshi')")
    environment = ENVIRONMENT | {"PYTHONPATH": f"{tmp_path}:{ROOT}"}
    command = [sys.executable, "-m", "finetune.doctor", "checkpoint"]
    run = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=60)
    assert run.returncode == 1
    assert "FAILED moshi: cannot be imported: ImportError: there is no moshi" in run.stdout
    assert "Traceback" not in run.stdout + run.stderr
