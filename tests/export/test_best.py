"""The checkpoint with the lowest held-out loss is named where another one is looked at, and exported on request."""

import json

import pytest

from finetune.checkpoint.best import BEST_FILE, Best, read_best, write_best
from finetune.doctor.__main__ import main as doctor
from finetune.export.__main__ import main
from tests.support.saved_runs import copy_run

pytestmark = pytest.mark.slow

CHECKPOINTS = ("checkpoint_000001", "checkpoint_000002")


@pytest.fixture
def run(saved_run, tmp_path, patched):
    """A run with the checkpoints of steps 1 and 2, of which the first is the best."""
    run = copy_run(saved_run("full"), tmp_path / "run")
    write_best(run / "checkpoints", Best(1, 2.5))
    return run


def step_of(out) -> int:
    return json.loads((out / "training_config.json").read_text())["step"]


def test_the_newest_is_exported_and_the_best_is_named(run, tmp_path, caplog):
    assert main([str(run), str(tmp_path / "out")]) == 0
    assert step_of(tmp_path / "out") == 2
    assert (
        "Step 1 of this run has the lowest held-out loss, 2.5000, and this is step 2: export it with --best"
        in caplog.text
    )


def test_the_best_is_exported_on_request(run, tmp_path, caplog):
    assert main([str(run), str(tmp_path / "out"), "--best"]) == 0
    assert step_of(tmp_path / "out") == 1
    assert "lowest held-out loss" not in caplog.text


@pytest.mark.parametrize(
    ("record", "said"),
    [
        ({"step": 7, "loss": 1.0}, "step 7 was, and is not there any more; there are 1, 2"),
        (None, "none is recorded"),
        ({"step": "1", "loss": 1.0}, "none is recorded"),
        ({"step": 1, "loss": 10**400}, "none is recorded"),
        ({"step": 1, "loss": float("nan")}, "none is recorded"),
    ],
    ids=["deleted", "no record", "text", "too large", "nan"],
)
def test_a_best_that_is_not_there_is_refused(run, tmp_path, capsys, record, said):
    (run / "checkpoints" / BEST_FILE).unlink()
    if record is not None:
        (run / "checkpoints" / BEST_FILE).write_text(json.dumps(record))
    assert main([str(run), str(tmp_path / "out"), "--best"]) == 2
    assert said in capsys.readouterr().err


def test_a_single_checkpoint_has_no_best(run, tmp_path, capsys):
    assert main([str(run / "checkpoints" / "checkpoint_000002"), str(tmp_path / "out"), "--best"]) == 2
    assert "is no run with checkpoints" in capsys.readouterr().err


@pytest.mark.parametrize("place", ["run", *CHECKPOINTS])
def test_the_doctor_names_it(run, capsys, place):
    path = run if place == "run" else run / "checkpoints" / place
    assert doctor([str(path)]) == 0
    (line,) = [line for line in capsys.readouterr().out.splitlines() if " best: " in line]
    assert "step 1 of this run has the lowest held-out loss, 2.5000" in line
    assert line.startswith("ok") == (place == "checkpoint_000001")
    assert (str(run / "checkpoints" / "checkpoint_000001") in line) == (place != "checkpoint_000001")


def test_a_record_is_read_as_it_was_written(tmp_path):
    write_best(tmp_path, Best(3, 1.25))
    assert read_best(tmp_path) == Best(3, 1.25)
    write_best(tmp_path, None)
    assert read_best(tmp_path) is None
