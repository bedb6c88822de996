"""The end of a run: a verdict that says no more than was measured, and commands that run as printed."""

import json
import re
import shlex
from pathlib import Path

import pytest

from finetune.common import commands
from finetune.common.commands import command
from finetune.settings.schema import TrainArgs
from finetune.training.summary import next_commands, resume_command, summary, verdict

ALIVE, DEAD = [{"step": 9, "ttt/layers.1/relative_delta": 1e-2}], [{"step": 9, "ttt/layers.1/relative_delta": 1e-9}]
HELD_OUT = [{"step": 9, "loss": 3.0, "ttt_reliance": -2.4}]


def difference(value: float, error: float | None) -> list[dict]:
    entry = {"step": 9, "control_difference": value}
    return [entry if error is None else entry | {"control_difference_error": error}]


@pytest.mark.parametrize(
    ("train", "held_out", "differences", "kind", "words"),
    [
        (ALIVE, HELD_OUT, difference(-0.05, 0.01), "helped", "TTT helped: .* lower than trained without, -0.05 ± 0.01"),
        (ALIVE, HELD_OUT, difference(0.05, 0.01), "harmed", r"TTT harmed: .* higher .*\+0.05"),
        (ALIVE, HELD_OUT, difference(-0.05, 0.03), "chance", "Not told from chance"),
        (ALIVE, HELD_OUT, difference(-1e-5, 1e-9), "chance", "Not told from chance"),
        (ALIVE, HELD_OUT, difference(-2.0, None), "chance", "from fewer than five held-out recordings"),
        (
            ALIVE,
            HELD_OUT,
            [],
            "no control",
            "no control was trained.*lose 2.4 nats without updates shows no",
        ),
        (ALIVE, [], [], "no evaluation", "nothing was held out"),
        (DEAD, HELD_OUT, difference(-0.05, 0.01), "dead", "TTT is dead"),
        ([{"step": 9}], HELD_OUT, [], "without TTT", "has no TTT"),
        ([], [], [], "without TTT", "has no TTT"),
    ],
)
def test_the_verdict(train, held_out, differences, kind, words):
    found = verdict(train, held_out, differences)
    assert found.kind == kind
    assert "\n" not in found.sentence
    assert re.search(words, found.sentence)


@pytest.mark.parametrize(
    ("ours", "control", "kind"),
    [
        ({10: 3.0, 20: 3.2}, {10: 2.9, 20: 3.4}, "control rose"),
        ({10: 2.8, 20: 3.2}, {10: 2.9, 20: 3.4}, "helped"),
        ({10: 3.0, 20: 3.2}, {10: 3.5, 20: 3.4}, "helped"),
        ({10: 3.0, 20: 3.2}, {}, "helped"),
    ],
)
def test_a_gain_that_the_control_makes_by_getting_worse_is_none(ours, control, kind):
    held_out, other = ([{"step": step, "loss": loss} for step, loss in one.items()] for one in (ours, control))
    found = verdict(
        ALIVE, held_out, [{"step": 20, "control_difference": -0.2, "control_difference_error": 0.01}], other
    )
    assert found.kind == kind
    if kind == "control rose":
        assert "rose from 2.9 (step 10) to 3.4 at step 20" in found.sentence
        assert "at its best the run with TTT has 3 (step 10)" in found.sentence


def test_a_memory_whose_size_is_no_number_has_exploded():
    assert verdict([{"step": 9, "ttt/layers.1/relative_delta": None}], HELD_OUT, []).kind == "exploded"


@pytest.mark.parametrize(("kind", "rate"), [("in_place", "ttt.learning_rate."), ("mlp", "ttt.base_lr.")])
@pytest.mark.parametrize("delta", [1e-9, None], ids=["dead", "exploded"])
def test_a_verdict_names_the_rate_that_its_kind_of_memory_has(kind, rate, delta):
    found = verdict([{"step": 9, "ttt/layers.1/relative_delta": delta}], HELD_OUT, [], kind=kind)
    assert found.sentence.endswith(rate)


def logged(folder: Path, losses: dict[int, float]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    shares = {step: {f"{number}.wav": loss / 6 + number * 1e-4 for number in range(6)} for step, loss in losses.items()}
    files = {
        "train": [{"step": step, "loss": 1.0, "ttt/layers.1/relative_delta": 0.1} for step in losses],
        "eval": [{"step": step, "loss": loss} for step, loss in losses.items()],
        "recordings": [{"step": step, "shares": shares[step]} for step in losses],
    }
    for kind, entries in files.items():
        (folder / f"metrics.{kind}.jsonl").write_text("".join(f"{json.dumps(entry)}\n" for entry in entries))


def test_the_summary_names_best_and_last_control_and_checkpoint(tmp_path):
    run = tmp_path / "my run"
    logged(run, {10: 3.0, 20: 2.5, 30: 2.75})
    logged(run / "control", {10: 3.0, 20: 2.7, 30: 2.85})
    for step in (20, 30):
        (run / "checkpoints" / f"checkpoint_{step:06d}").mkdir(parents=True)
    (run / "checkpoints" / "best.json").write_text('{"step": 20, "loss": 2.5}')
    (run / "control" / "checkpoints" / "checkpoint_000030").mkdir(parents=True)
    args = TrainArgs(run_dir=str(run), do_eval=True)
    text = summary(args, seconds=3725, world_size=1)
    for part in (
        "30 steps, 1:02:05 in this process",
        "best 2.5000 at step 20, last 2.7500 at step 30",
        "best 2.7000 at step 20, last 2.8500 at step 30",
        "with TTT − without   -0.1 ± ",
        "(negative: TTT is better)",
        "checkpoint_000020 (best held-out loss, 2.5000)",
        "report.png",
        "TTT helped",
    ):
        assert part in text, part
    printed = [shlex.split(line.strip()) for line in text.splitlines() if "train.py" in line or str(run) in line][-4:]
    assert printed[0][-4:] == [
        "--checkpoint_dir",
        str(run / "checkpoints" / "checkpoint_000020"),
        "--baseline",
        str(run / "control"),
    ]
    assert printed[3][-4:] == [str(run / "args.yaml"), "--resume", "--max_steps", "200"]


def test_without_a_control_the_command_that_trains_one_is_printed(tmp_path):
    logged(tmp_path / "run", {10: 3.0})
    text = summary(TrainArgs(run_dir=str(tmp_path / "run"), do_eval=True), seconds=1, world_size=1)
    assert re.search(r"no control was trained\. To train one:\n  .*args\.yaml --resume --control\n", text)


def test_an_export_gets_a_name_that_is_free(tmp_path):
    taken = tmp_path / "export_checkpoint_000004"
    taken.mkdir()
    assert next_commands(TrainArgs(run_dir=str(tmp_path)), Path("checkpoint_000004"))[-1].endswith(f"{taken}-2")


def test_a_run_that_logged_nothing_has_a_summary_too(tmp_path):
    text = summary(TrainArgs(run_dir=str(tmp_path / "run")), seconds=1, world_size=1)
    assert "0 steps" in text
    assert "--control" not in text, "there is nothing that a control could be compared with"
    assert "Next:" not in text


def test_commands_are_those_of_the_readme_in_a_checkout_and_run_from_elsewhere_too(tmp_path, monkeypatch):
    monkeypatch.setattr(commands, "python", lambda: "python")
    monkeypatch.chdir(commands.CHECKOUT)
    assert command("evaluate", "--checkpoint_dir", "a b") == "python eval_from_checkpoint.py --checkpoint_dir 'a b'"
    assert command("doctor", "runs/x") == "python -m finetune.doctor runs/x"
    monkeypatch.chdir(tmp_path)
    words = shlex.split(command("doctor", "x"))
    assert (tmp_path / words[1]).resolve() == commands.CHECKOUT / "moshi_ttt.py"
    monkeypatch.setattr(commands, "CHECKOUT", tmp_path / "site-packages")
    assert command("train", "run.yaml") == "moshi-ttt train run.yaml"


def test_a_run_on_many_processes_is_continued_on_as_many(monkeypatch):
    monkeypatch.chdir(commands.CHECKOUT)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "8")
    args = TrainArgs(run_dir="runs/x")
    one = resume_command(args, 8)
    assert one.endswith("--nproc-per-node 8 train.py runs/x/args.yaml --resume")
    assert "--nnodes" not in one
    two = resume_command(args, 16)
    assert "--nnodes 2 " in two
    assert "--nproc-per-node 8 train.py" in two
