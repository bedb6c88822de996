"""Runs to evaluate, trained once, and the command lines of evaluations of them."""

from functools import partial

import pytest

import moshi_patch
from tests.support.evaluations import command_line, make_runs


@pytest.fixture(scope="session")
def made(tmp_path_factory):
    """What `make_runs` makes; never written to."""
    return make_runs(tmp_path_factory.mktemp("made"))


@pytest.fixture
def words(made, tmp_path):
    """The command line of an evaluation of a run of `made` with results in `tmp_path / "out"`."""
    yield partial(command_line, made, tmp_path / "out")
    moshi_patch.uninstall()
