"""On a CPU a small model gets one thread and nothing is compiled; the environment may say otherwise."""

import os

import pytest
import torch
from moshi.models import loaders
from moshi.utils import compile as moshi_compile
from torch import nn

from moshi_patch import fit_threads, without_compiling
from moshi_patch.__main__ import main
from moshi_patch.arguments import value_of, wrong_path
from moshi_patch.cpu import LARGE, THREADS, fitted_threads

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def _threads(monkeypatch):
    """Two threads and nothing in the environment, as on a user's machine."""
    for name in THREADS:
        monkeypatch.delenv(name, raising=False)
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


def test_a_small_model_gets_one_thread_and_a_large_one_all():
    large = nn.Linear(1, LARGE)
    assert fit_threads(large).startswith("On the CPU: 2 threads; nothing is compiled. OMP_NUM_THREADS and")
    assert torch.get_num_threads() == 2
    assert "1 thread, as the model is small; nothing is compiled." in fit_threads(nn.Linear(64, 64))
    assert torch.get_num_threads() == 1


@pytest.mark.parametrize("name", THREADS)
def test_the_environment_decides_about_threads(name, monkeypatch):
    monkeypatch.setenv(name, "2")
    monkeypatch.setenv("NO_TORCH_COMPILE", "")
    assert fit_threads(nn.Linear(2, 2)).startswith("On the CPU: 2 threads; moshi compiles.")
    assert torch.get_num_threads() == 2


@pytest.mark.parametrize("model", [nn.Linear(2, 2, device="meta"), nn.Identity()])
def test_a_model_that_is_not_on_the_cpu_changes_nothing(model):
    assert fit_threads(model) is None
    assert torch.get_num_threads() == 2


@pytest.mark.parametrize(
    ("variable", "device", "disabled"), [(None, "cpu", True), ("", "cpu", False), (None, "cuda", 0)]
)
def test_nothing_is_compiled_for_a_cpu_unless_the_environment_asks_for_it(variable, device, disabled, monkeypatch):
    monkeypatch.delenv("NO_TORCH_COMPILE", raising=False)
    if variable is not None:
        monkeypatch.setenv("NO_TORCH_COMPILE", variable)
    with without_compiling(torch.device(device)):
        assert moshi_compile._compile_disabled == disabled
    assert not moshi_compile._compile_disabled


@pytest.mark.parametrize(
    ("device", "before", "after"), [("cpu", None, "1"), ("cpu", "", ""), ("cuda", None, None), (None, None, None)]
)
def test_programs_of_moshi_learn_that_before_moshi_is_imported(device, before, after, monkeypatch, patched, capsys):
    monkeypatch.setenv("NO_TORCH_COMPILE", "")  # so that what is set below is undone
    monkeypatch.delenv("NO_TORCH_COMPILE")
    if before is not None:
        monkeypatch.setenv("NO_TORCH_COMPILE", before)
    with pytest.raises(SystemExit):
        main(["moshi.nosuch", *(["--device", device] if device else [])])
    assert os.environ.get("NO_TORCH_COMPILE") == after


def test_what_was_chosen_is_said_once_when_moshi_has_loaded_a_model(monkeypatch, capsys):
    stock = lambda *args, **kwargs: nn.Linear(4, 4)  # noqa: E731
    monkeypatch.setattr(loaders, "get_moshi_lm", stock)
    with fitted_threads():
        loaders.get_moshi_lm("weights")
        loaders.get_moshi_lm("weights")
    assert loaders.get_moshi_lm is stock
    assert capsys.readouterr().err.count("On the CPU: 1 thread,") == 1
    assert torch.get_num_threads() == 1


@pytest.mark.parametrize(
    ("arguments", "value"),
    [
        ("--device cpu", "cpu"),
        ("--device=cpu in.wav", "cpu"),
        ("--device cuda --device cpu", "cpu"),
        ("in.wav --device", None),
        ("--devices cpu", None),
        ("", None),
    ],
)
def test_values_of_options_are_found(arguments, value):
    assert value_of("--device", arguments.split()) == value


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ("--hf-repo tiny_rep", "--hf-repo tiny_rep: no such folder"),
        ("--hf-repo ./tiny_rep", "no such folder"),
        ("--hf-repo=/a/b/c", "no such folder"),
        ("--hf-repo file", "is a file"),
        ("--moshi-weight=gone.safetensors", "--moshi-weight gone.safetensors: no such file"),
        ("--config folder", "--config folder: is a folder"),
        ("--tokenizer hf://a", "hf://OWNER/NAME/FILE"),
        ("--lora-weight file://gone", "no such file"),
        ("--hf-repo folder", None),
        ("--hf-repo kyutai/moshiko-pytorch-bf16", None),
        ("--tokenizer file --mimi-weight file://file --moshi-weight hf://a/b/c", None),
        ("--hf-repo", None),
    ],
)
def test_a_path_that_does_not_exist_is_called_that(arguments, named, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").touch()
    (tmp_path / "folder").mkdir()
    problem = wrong_path(arguments.split())
    assert (problem is None) if named is None else (named in problem)


def test_it_is_said_in_one_line_before_anything_is_imported(capsys):
    with pytest.raises(SystemExit) as end:
        main(["moshi.server", "--device", "cpu", "--hf-repo", "tiny_rep"])
    assert end.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("python -m moshi_patch: error: --hf-repo tiny_rep: no such folder")
