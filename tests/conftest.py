"""Shared by all tests: moshi without torch.compile, the patch installed for one test at a time, small models."""

import json
import os

os.environ.setdefault("NO_TORCH_COMPILE", "1")  # read when moshi is imported

import pytest
import torch
from moshi.models import loaders

import moshi_patch
from tests.support.datasets import DEP_Q
from tests.support.tiny_repository import build_repo
from tests.support.tools import NOT_SET_UP

torch.set_num_threads(1)  # the tests' tensors are tiny: threads only wait for each other


def pytest_terminal_summary(terminalreporter):
    """Says at the end what could not be tested on this machine, and what would have it tested."""
    reasons = [str(report.longrepr[-1]) for report in terminalreporter.stats.get("skipped", [])]
    missing = [reason.removeprefix("Skipped: ") for reason in reasons if NOT_SET_UP in reason]
    for reason in sorted(set(missing)):
        terminalreporter.write_line(f"{missing.count(reason)} tests skipped, {reason}")


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def mimi(tmp_path_factory):
    """The Mimi of the tiny repository, random, with codebooks that fit speech."""
    from tests.support.published import make_mimi

    return make_mimi(tmp_path_factory.mktemp("mimi"))


@pytest.fixture
def patched():
    """moshi with the patch installed, stock again afterwards."""
    moshi_patch.install()
    yield
    moshi_patch.uninstall()


@pytest.fixture(scope="session")
def stock_repo(tmp_path_factory):
    """A tiny repository without TTT; only to be read."""
    return build_repo(tmp_path_factory.mktemp("stock") / "repo", ttt=False)


@pytest.fixture(scope="session")
def ttt_repo(tmp_path_factory):
    """The same model with TTT, whose fast weights move; only to be read."""
    return build_repo(tmp_path_factory.mktemp("with_ttt") / "repo")


@pytest.fixture(scope="session")
def mlp_repo(tmp_path_factory):
    """The same model with the other kind of memory, which moves too; only to be read."""
    return build_repo(tmp_path_factory.mktemp("with_mlp") / "repo", ttt_kind="mlp")


@pytest.fixture(scope="session")
def saved_run(stock_repo, tmp_path_factory):
    """By mode, one of `saved_runs.MODES`, the folder of a short run over `stock_repo`. For reading alone."""
    folder, made = tmp_path_factory.mktemp("saved_runs"), {}

    def run(mode: str):
        if mode not in made:
            from tests.support.saved_runs import train

            installed = moshi_patch.is_installed()
            moshi_patch.install()
            made[mode] = train(folder / mode, stock_repo, mode)
            if not installed:
                moshi_patch.uninstall()
        return made[mode]

    return run


@pytest.fixture(scope="session")
def codec(ttt_repo):
    """Mimi and the text tokenizer of a tiny repository."""
    folder = ttt_repo
    config = json.loads((folder / "mimi_config.json").read_text())
    mimi = loaders.get_mimi(folder / "mimi.safetensors", config, num_codebooks=DEP_Q)
    return mimi, loaders.sentencepiece.SentencePieceProcessor(str(folder / "tokenizer.model"))
