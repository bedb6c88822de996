"""Chromium and HAProxy: installed where that may be, and otherwise their tests are skipped and a run says so."""

import shutil
import subprocess
from types import SimpleNamespace

import pytest

from tests.conftest import pytest_terminal_summary
from tests.support.tiny_repository import ROOT
from tests.support.tools import needs_chromium, needs_haproxy

SCRIPT = ROOT / ".ci" / "browsers"
USED = ("sh", "id", "mktemp", "rm", "tail", "env", "timeout")


def run_script(folder, apt: str | None, uid: int = 0) -> str:
    """Runs it where nothing is installed but what it uses, with this as `apt-get`; what it says and what apt did."""
    for name in USED:
        (folder / name).symlink_to(shutil.which(name))
    (folder / "id").unlink()
    write(folder / "id", f"echo {uid}")
    if apt is not None:
        write(folder / "apt-get", f"echo apt-get $* >> {folder}/calls\n{apt}")
    environment = {"PATH": str(folder), "CHROMIUM": "no-such-chromium"}
    done = subprocess.run([folder / "sh", SCRIPT], env=environment, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    calls = folder / "calls"
    return done.stdout + done.stderr + (calls.read_text() if calls.exists() else "")


def write(path, body: str) -> None:
    path.write_text(f"#!/bin/sh\n{body}\n")
    path.chmod(0o755)


@pytest.mark.slow
def test_what_is_missing_is_installed(tmp_path):
    said = run_script(tmp_path, "exit 0")
    assert "chromium" in said
    assert "could not" not in said
    assert "update" not in said


@pytest.mark.slow
@pytest.mark.parametrize(
    ("apt", "uid", "reason"),
    [("exit 1", 0, "could not install"), (None, 0, "no apt-get"), ("exit 0", 1000, "not root")],
    ids=["apt fails", "no apt", "no root"],
)
def test_what_cannot_be_installed_does_not_end_the_tests(apt, uid, reason, tmp_path):
    said = run_script(tmp_path, apt, uid)
    assert reason in said
    assert ("apt-get update" in said) == (reason == "could not install")  # its lists may be old


def test_make_and_ci_call_it():
    assert "test: setup browsers" in (ROOT / "Makefile").read_text()
    assert "BROWSERS=always make test" in (ROOT / ".ci" / "run").read_text()


def test_a_run_says_at_its_end_what_was_not_tested():
    lines = []
    reasons = [mark.mark.kwargs["reason"] for mark in (needs_chromium, needs_haproxy, needs_chromium)]
    skipped = [SimpleNamespace(longrepr=("file.py", 1, f"Skipped: {reason}")) for reason in [*reasons, "no CUDA"]]
    pytest_terminal_summary(SimpleNamespace(stats={"skipped": skipped}, write_line=lines.append))
    assert len(lines) == 2
    assert lines[0].startswith("2 tests skipped, not set up here: Chromium")
    assert lines[1].startswith("1 tests skipped, not set up here: HAProxy")
    assert all("make browsers" in line for line in lines)
