"""A training state that is not what was saved is never resumed, and nothing that is written into it is run."""

import logging
import pickle
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.api import CheckpointException

from finetune.checkpoint.restricted import RestrictedPlanner, RestrictedReader
from finetune.checkpoint.state_files import state_problems
from finetune.common.checksums import CHECKSUMS
from finetune.common.errors import ConfigError
from finetune.data.tokenize import load_speech_tokenizer
from finetune.doctor.__main__ import main as doctor
from finetune.model.base import load_base
from finetune.settings.record import from_dict
from tests.support.breakages import Exploit, exploit_value
from tests.support.checkpoint_runs import CTX, MODES, advance, arguments, same, snapshot, tiny_run


@pytest.fixture
def run(patched, tmp_path):
    """Checkpointer, state and the folder of the checkpoint of step 1."""
    checkpointer, state = tiny_run(arguments(tmp_path / "run", **MODES["ttt_only"]))
    advance(state)
    return checkpointer, state, checkpointer.save(state)


def flip(path: Path, place: float) -> None:
    content = bytearray(path.read_bytes())
    content[int(place * (len(content) - 1))] ^= 1
    path.write_bytes(content)


def refused(run, match: str) -> None:
    """The checkpoint is not resumed, and the run is what it was."""
    checkpointer, state, checkpoint = run
    advance(state)
    before = snapshot(state)
    with pytest.raises(ConfigError, match=match) as error:
        checkpointer.load(checkpoint, state)
    assert "\n" not in str(error.value)
    assert same(snapshot(state), before)


def test_the_sums_are_of_all_files_and_sha256sum_reads_them(run):
    checkpoint = run[2]
    files = {f"training_state/{path.name}" for path in (checkpoint / "training_state").iterdir()}
    assert {line.split("  ")[1] for line in (checkpoint / CHECKSUMS).read_text().splitlines()} == files
    subprocess.run(["sha256sum", "--strict", "-c", CHECKSUMS], cwd=checkpoint, check=True, capture_output=True)


@pytest.mark.parametrize("place", [0, 0.3, 0.5, 0.99, 1])
@pytest.mark.parametrize("name", ["__0_0.distcp", ".metadata"])
def test_a_flipped_bit_anywhere_is_refused_before_anything_is_changed(run, name, place):
    flip(run[2] / "training_state" / name, place)
    assert doctor([str(run[2])]) == 1
    refused(run, rf"{name} is not what was saved \(SHA-256\).*--resume STEP")


def test_a_state_of_another_step_is_refused_by_the_sums_and_without_them_by_its_own_word(run, capsys):
    checkpointer, state, first = run
    advance(state)
    second = checkpointer.save(state)
    shutil.rmtree(first / "training_state")
    shutil.copytree(second / "training_state", first / "training_state")
    assert doctor([str(first)]) == 1
    refused(run, "is not what was saved")
    (first / CHECKSUMS).unlink()
    refused(run, "is of step 2, and lies in the checkpoint of step 1")


def test_a_file_that_the_sums_do_not_know_is_refused(run):
    (run[2] / "training_state" / "__1_0.distcp").write_bytes(b"more")
    assert "has no line for training_state/__1_0.distcp" in state_problems(run[2])[0]
    refused(run, "has no line for")


def test_without_sums_a_checkpoint_is_resumed_with_a_warning(run, caplog):
    checkpointer, state, checkpoint = run
    (checkpoint / CHECKSUMS).unlink()
    before = snapshot(state)
    advance(state)
    with caplog.at_level(logging.WARNING):
        checkpointer.load(checkpoint, state)
    assert "has no checksums of its training state" in caplog.text
    assert same(snapshot(state), before)


@pytest.mark.parametrize("damage", ["truncated", "gone", "index truncated"])
def test_without_sums_files_that_are_missing_or_cut_off_are_named_and_no_pickle_is_read(run, damage, monkeypatch):
    state = run[2] / "training_state"
    (run[2] / CHECKSUMS).unlink()
    if damage == "truncated":
        (state / "__0_0.distcp").write_bytes((state / "__0_0.distcp").read_bytes()[:-10])
    elif damage == "gone":
        (state / "__0_0.distcp").unlink()
    else:
        (state / ".metadata").write_bytes((state / ".metadata").read_bytes()[:700])

    def read(*args, **kwargs):
        raise AssertionError("a pickle is read")

    for name in ("load", "loads", "Unpickler"):
        monkeypatch.setattr(pickle, name, read)
    (problem,) = state_problems(run[2])
    assert (".metadata" if damage == "index truncated" else "__0_0.distcp") in problem


def test_an_index_that_does_something_is_not_read(tmp_path):
    for number, act in enumerate([Exploit(tmp_path / "done"), (print, "x"), torch.nn.Linear(1, 1), dcp.load]):
        (tmp_path / ".metadata").write_bytes(pickle.dumps(act))
        with pytest.raises(pickle.UnpicklingError):
            RestrictedReader(tmp_path).read_metadata()
        assert not (tmp_path / "done").exists(), number


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
def test_a_value_that_does_something_is_not_read_where_torchs_own_reader_would(run, tmp_path):
    folder = run[2] / "training_state"
    exploit_value(folder)
    proof = run[2].parent / "exploited"
    reader, planner = RestrictedReader(folder), RestrictedPlanner()
    with pytest.raises(CheckpointException, match="the value of progress is damaged, or would do something"):
        dcp.load({"progress": ""}, storage_reader=reader, planner=planner, no_dist=True)
    assert not proof.exists()
    dcp.load({"progress": ""}, checkpoint_id=folder, no_dist=True)
    assert proof.exists(), "the exploit is none"


@pytest.mark.parametrize("key", ["moshi_path", "mimi_path"])
def test_weights_that_are_a_pickle_run_nothing(patched, stock_repo, tmp_path, key):
    torch.save({"model": Exploit(tmp_path / "done")}, tmp_path / "weights.pt")
    paths = {"hf_repo_id": str(stock_repo), key: str(tmp_path / "weights.pt")}
    args = from_dict({"moshi_paths": paths, "full_finetuning": True, "param_dtype": "float32"})
    with pytest.raises(ConfigError, match=r"weights\.pt.*(a pickle of more than tensors|holds no weights)"):
        load_speech_tokenizer(*load_base(args, CTX), 1.0, CTX.device)
    assert not (tmp_path / "done").exists()
