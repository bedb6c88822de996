"""Shared by all tests: moshi without torch.compile, the patch installed for one test at a time, small models."""

import os

os.environ.setdefault("NO_TORCH_COMPILE", "1")  # read when moshi is imported

import pytest
import torch

import moshi_patch

torch.set_num_threads(1)  # the tests' tensors are tiny: threads only wait for each other


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def mimi(tmp_path_factory):
    """The Mimi of the tiny repository, random, with codebooks that fit speech."""
    from .paper import make_mimi

    return make_mimi(tmp_path_factory.mktemp("mimi"))


@pytest.fixture
def patched():
    """moshi with the patch installed, stock again afterwards."""
    moshi_patch.install()
    yield
    moshi_patch.uninstall()
