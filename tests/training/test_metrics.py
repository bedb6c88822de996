"""Metrics are written once per step, also after a kill, and the report shows them."""

import json
import logging
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.summary.writer import event_file_writer

from finetune.common.distributed import Context
from finetune.common.errors import ConfigError
from finetune.settings.parsing import build
from finetune.settings.schema import TrainArgs
from finetune.training.control import compared
from finetune.training.metrics import Monitor, read_metrics

RANKS = [Context(rank, 2, rank, torch.device("cpu")) for rank in range(2)]
LAYERS = [f"ttt/layers.{index}/relative_delta" for index in (1, 3)]


def monitor(folder: Path, rank: int = 0, **settings) -> Monitor:
    return Monitor(folder, build(TrainArgs, settings), RANKS[rank])


def steps(path: Path) -> list[int]:
    return [entry["step"] for entry in read_metrics(path)]


def write(target: Monitor, first: int, last: int, loss: float = 1.0) -> None:
    for step in range(first, last + 1):
        target.train(step, {"loss": loss / step, "lr/adapters": 1e-3 * step, **dict.fromkeys(LAYERS, 1e-4 * step)})
        if step % 2 == 0:
            target.eval(step, {"loss": loss / step, "loss_updates_off": 2 * loss / step})


def test_each_line_holds_a_step_and_its_values(tmp_path):
    run = monitor(tmp_path)
    run.train(1, {"loss": 2.5, "grad_norm": float("nan")})
    run.eval(1, {"loss": torch.tensor(3.0).item()})
    run.close()
    [entry] = [json.loads(line) for line in (tmp_path / "metrics.train.jsonl").read_text().splitlines()]
    assert entry.pop("time") > 1e9
    assert entry == {"step": 1, "loss": 2.5, "grad_norm": None}
    [entry] = read_metrics(tmp_path / "metrics.eval.jsonl")
    assert (entry["step"], entry["loss"]) == (1, 3.0)


def test_only_rank_0_writes(tmp_path):
    run = monitor(tmp_path / "run", rank=1)
    write(run, 1, 2)
    run.resume(1)
    run.close()
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("told", [False, True], ids=["at_the_first_line", "by_resume"])
def test_steps_after_a_resume_are_counted_once_and_nothing_is_lost(tmp_path, told):
    killed = monitor(tmp_path)
    write(killed, 1, 8, loss=1.0)
    with (tmp_path / "metrics.train.jsonl").open("a") as file:
        file.write('{"step": 9, "lo')  # cut off
    run = monitor(tmp_path)
    if told:
        run.resume(4)
        assert steps(tmp_path / "metrics.train.jsonl") == [1, 2, 3, 4]
        assert steps(tmp_path / "metrics.eval.jsonl") == [2, 4]
    write(run, 5, 10, loss=3.0)
    entries = read_metrics(tmp_path / "metrics.train.jsonl")
    assert [entry["step"] for entry in entries] == list(range(1, 11))
    assert [entry["loss"] * entry["step"] for entry in entries] == pytest.approx([1.0] * 4 + [3.0] * 6)
    assert steps(tmp_path / "metrics.eval.jsonl") == [2, 4, 6, 8, 10]
    replaced = (tmp_path / "metrics.train.replaced.jsonl").read_text()
    assert steps(tmp_path / "metrics.train.replaced.jsonl") == [5, 6, 7, 8]
    assert replaced.endswith('{"step": 9, "lo\n')
    assert steps(tmp_path / "metrics.eval.replaced.jsonl") == [6, 8]
    killed.close()
    run.close()


def test_a_recording_without_a_finite_loss_is_null_and_compared_with_nothing(tmp_path):
    for folder, loss in ((tmp_path, float("nan")), (tmp_path / "control", 1.0)):
        run = monitor(folder)
        run.eval(2, {"loss": loss}, {"a.wav": loss})
    assert '"shares": {"a.wav": null}' in (tmp_path / "metrics.recordings.jsonl").read_text()
    assert compared(tmp_path) == []


def test_lines_of_an_old_run_are_read_with_todays_names_and_sign(tmp_path):
    (tmp_path / "metrics.eval.jsonl").write_text('{"step": 3, "loss": 2.0, "ttt_gain": 0.5, "ttt_gain_error": 0.1}\n')
    assert read_metrics(tmp_path / "metrics.eval.jsonl") == [
        {"step": 3, "loss": 2.0, "ttt_reliance": -0.5, "ttt_reliance_error": 0.1}
    ]


def test_a_run_that_goes_straight_on_replaces_nothing(tmp_path):
    write(monitor(tmp_path), 1, 4)
    write(monitor(tmp_path), 5, 8)
    assert steps(tmp_path / "metrics.train.jsonl") == list(range(1, 9))
    assert list(tmp_path.glob("*.replaced.jsonl")) == []


def test_tensorboard_shows_each_step_once(tmp_path, monkeypatch):
    # Its files are read in the order of their names, which end in a number: in one second, 10 comes before 9.
    monkeypatch.setattr(event_file_writer, "_global_uid", event_file_writer.AtomicCounter(0))
    for first, last, loss in ((1, 8, 1.0), (5, 10, 3.0)):
        run = monitor(tmp_path)
        write(run, first, last, loss)
        run.close()
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    scalars = events.Scalars("train/loss")
    assert [event.step for event in scalars] == list(range(1, 11))
    assert [event.value * event.step for event in scalars] == pytest.approx([1.0] * 4 + [3.0] * 6)
    tags = {"train/loss", "eval/loss", "eval/loss_updates_off", "lr/adapters", *LAYERS}
    assert set(events.Tags()["scalars"]) == tags


def test_without_tensorboard_the_files_are_written_and_one_warning(tmp_path, monkeypatch, caplog):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    write(monitor(tmp_path), 1, 4)
    assert steps(tmp_path / "metrics.train.jsonl") == [1, 2, 3, 4]
    assert caplog.text.count("tensorboard") == 2  # in one line
    assert len([record for record in caplog.records if record.levelno == logging.WARNING]) == 1


def test_wandb_is_asked_for_only_by_a_project_and_missing_it_is_an_error(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    monitor(tmp_path).close()
    with pytest.raises(ConfigError, match=r"wandb.project='mine': wandb is not installed"):
        monitor(tmp_path, wandb={"project": "mine"})
    monitor(tmp_path, rank=1, wandb={"project": "mine"}).close()


def test_wandb_gets_the_same_values_and_a_resumed_run_is_the_same_run(tmp_path, monkeypatch):
    """A stand-in for a service that needs an account; the arguments are those of wandb's documentation."""
    starts, logged, ended = [], [], []
    run = SimpleNamespace(log=lambda values, step: logged.append((step, values)), finish=lambda: ended.append(1))
    fake = SimpleNamespace(init=lambda **settings: (starts.append(settings), run)[1], login=lambda key: 1 / 0)
    monkeypatch.setitem(sys.modules, "wandb", fake)
    settings = {"project": "mine", "run_name": "first", "offline": True, "key": "secret"}
    for step in (1, 2):
        target = monitor(tmp_path, wandb=settings)
        target.train(step, {"loss": 1.0, "lr/base": 0.1})
        target.close()
    assert logged == [(1, {"train/loss": 1.0, "lr/base": 0.1}), (2, {"train/loss": 1.0, "lr/base": 0.1})]
    assert starts[0] == starts[1]
    assert starts[0]["mode"] == "offline"
    assert (starts[0]["project"], starts[0]["name"], starts[0]["resume"]) == ("mine", "first", "allow")
    assert "secret" not in json.dumps(starts)
    assert len(ended) == 2
