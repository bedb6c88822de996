"""SIGTERM and SIGINT: the step is finished and saved, one line says how to go on, and going on changes nothing."""

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

from finetune.settings.command_line import parse_command_line
from finetune.settings.record import from_dict
from finetune.training import evaluations, trainer
from finetune.training.signals import Stopped, StopSignals
from finetune.training.trainer import train
from tests.support.tiny_repository import ENVIRONMENT, ROOT
from tests.support.training_runs import metrics, settings_for

pytestmark = pytest.mark.slow


@pytest.fixture(autouse=True)
def _patched(patched):
    """Training installs the patch for good; here it is gone after each test."""


def settings(repo: Path, run: Path, **changes) -> dict:
    return settings_for(repo, run, **{"sample_freq": 0, "do_eval": True, "eval_freq": 3, "max_steps": 4, **changes})


@pytest.fixture(scope="module")
def straight(stock_repo, tmp_path_factory) -> list[list[dict]]:
    """What a run that nothing stops logs."""
    run = tmp_path_factory.mktemp("straight") / "run"
    train(from_dict(settings(stock_repo, run)))
    return logged(run)


def logged(run: Path) -> list[list[dict]]:
    timeless = {"time", "steps_per_second", "tokens_per_second", "audio_seconds_per_second", "peak_memory_gib"}
    return [
        [{key: row[key] for key in row if key not in timeless} for row in metrics(run, kind)]
        for kind in ("train", "eval")
    ]


def signal_in_step(monkeypatch, step: int, number: int) -> None:
    plain = trainer.update

    def signalled(state, *args, **kwargs):
        if state.step + 1 == step:
            os.kill(os.getpid(), number)
        return plain(state, *args, **kwargs)

    monkeypatch.setattr(trainer, "update", signalled)


def test_a_signal_ends_the_run_after_its_step_and_resuming_is_as_if_there_had_been_none(
    stock_repo, tmp_path, monkeypatch, straight
):
    with monkeypatch.context() as patch:
        signal_in_step(patch, 3, signal.SIGTERM)
        with pytest.raises(Stopped) as end:
            train(from_dict(settings(stock_repo, tmp_path / "run")))
    assert end.value.exit_code == 143
    saved = tmp_path / "run" / "checkpoints" / "checkpoint_000003"
    assert saved.is_dir()
    message = str(end.value)
    assert message.startswith(f"stopped by SIGTERM at step 3, saved as {saved}. Continue with: ")
    assert "\n" not in message
    words = message.partition("Continue with: ")[2].split()
    assert words[-3:] == [str(Path(words[-3])), str(tmp_path / "run" / "args.yaml"), "--resume"]
    assert metrics(tmp_path / "run")[-1]["step"] == 3
    assert not (tmp_path / "run" / "metrics.eval.jsonl").exists(), "the evaluation waits"
    train(parse_command_line(words[-2:]))  # the settings are those of args.yaml
    assert logged(tmp_path / "run") == straight
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL, "as before"


def test_a_signal_in_an_evaluation_ends_it_and_it_is_made_up_for(stock_repo, tmp_path, monkeypatch, straight):
    plain = evaluations.evaluate

    def signalled(*args):
        os.kill(os.getpid(), signal.SIGTERM)
        return plain(*args)

    with monkeypatch.context() as patch:
        patch.setattr(evaluations, "evaluate", signalled)
        with pytest.raises(Stopped, match="at step 3, saved as"):
            train(from_dict(settings(stock_repo, tmp_path / "run")))
    train(from_dict(settings(stock_repo, tmp_path / "run", checkpoint={"resume": True})))
    assert logged(tmp_path / "run") == straight


def test_without_checkpoints_it_says_that_nothing_was_saved(stock_repo, tmp_path, monkeypatch):
    signal_in_step(monkeypatch, 1, signal.SIGINT)
    with pytest.raises(Stopped, match=r"at step 1, not saved, as do_ckpt is false") as end:
        train(from_dict(settings(stock_repo, tmp_path / "run", do_ckpt=False)))
    assert end.value.exit_code == 130


def test_a_signal_while_the_model_is_loaded_ends_at_once(stock_repo, tmp_path, monkeypatch):
    monkeypatch.setattr(trainer, "build_model", lambda *_: os.kill(os.getpid(), signal.SIGTERM) or time.sleep(60))
    with pytest.raises(Stopped, match="SIGTERM while it was starting: nothing is lost"):
        train(from_dict(settings(stock_repo, tmp_path / "run")))
    assert not (tmp_path / "run").exists()


def test_votes_of_any_rank_decide():
    assert StopSignals.decided([0.0, 0.0]) == 0
    assert StopSignals.decided([0.0, 3.0]) == signal.SIGINT
    assert StopSignals.decided([1.0, 1.0]) == signal.SIGTERM


@pytest.mark.parametrize(("torchrun", "goes_on"), [(False, False), (True, True)])
def test_a_second_signal_ends_at_once_but_torchruns_copy_is_the_same_one(torchrun, goes_on):
    child = os.fork()
    if child == 0:
        if torchrun:
            os.environ["TORCHELASTIC_RUN_ID"] = "none"
        else:
            os.environ.pop("TORCHELASTIC_RUN_ID", None)
        with StopSignals() as stop:
            stop.finishing = True
            os.kill(os.getpid(), signal.SIGTERM)
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(0.05)
        os._exit(0)
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    assert status == (0 if goes_on else -signal.SIGTERM)


def test_from_the_command_line_the_exit_code_is_143_and_there_is_no_traceback(stock_repo, tmp_path):
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(settings(stock_repo, tmp_path / "run", max_steps=10_000)))
    process = subprocess.Popen(
        [sys.executable, ROOT / "train.py", "run.yaml"],
        cwd=tmp_path,
        env=ENVIRONMENT,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        for line in process.stderr:
            if "step: 000001" in line:
                process.send_signal(signal.SIGTERM)
                break
        rest = process.stderr.read()
        assert process.wait(timeout=60) == 143
    finally:
        process.kill()
    assert "Traceback" not in rest
    assert re.match(
        r"train\.py: stopped by SIGTERM at step \d+, saved as .*args\.yaml --resume$", rest.splitlines()[-1]
    )
