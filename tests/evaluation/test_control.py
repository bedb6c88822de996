"""The control beside a run: it is found by itself, only what is one is called so, and what is missing is said."""

import json
import shutil

import pytest

from finetune.checkpoint.saved import open_checkpoint
from finetune.common.commands import command
from finetune.common.errors import ConfigError
from finetune.evaluation.baseline import Baseline, open_baseline
from finetune.evaluation.conditions import BASELINE, BENEFIT, CONTROL
from finetune.evaluation.run import evaluate
from finetune.evaluation.settings_in_force import parse_command_line
from finetune.evaluation.verdict import NO_CONTROL
from tests.support.evaluations import results

pytestmark = pytest.mark.slow

CONTROL_STEP = "checkpoints/checkpoint_000004/consolidated"


def opened(words, name: str, *options: str) -> Baseline | None:
    settings = parse_command_line(words(name, *options))
    return open_baseline(settings.args, settings.checkpoint)


def copied(made, tmp_path, name: str = "adapters"):
    shutil.copytree(made / name, tmp_path / "run")
    return tmp_path / "run"


def test_the_control_of_a_run_is_beside_it_unasked_and_the_page_begins_with_who_won(made, words, tmp_path):
    page = evaluate(parse_command_line(words("adapters")))
    found = results(tmp_path)["standard"]
    assert list(found["overall"]) == ["updates on", "updates off", "trained without TTT"]
    benefit = found["overall"]["updates on"]["loss"] - found["overall"]["trained without TTT"]["loss"]
    assert found["differences"][BENEFIT]["loss"]["value"] == pytest.approx(benefit)
    words_of_it = f"{abs(benefit):.4f} nats per step {'lower' if benefit < 0 else 'higher'} than trained without"
    assert page.startswith(f"Not told from chance: with TTT the loss is {words_of_it} (too few recordings")
    assert "--control" not in page
    evaluate(parse_command_line(words("adapters", f"--baseline={made / 'adapters' / 'control'}")))
    assert results(tmp_path)["standard"] == found


def test_a_control_that_was_left_out_is_missed(made, words, tmp_path):
    page = evaluate(parse_command_line(words("adapters", "--baseline=none")))
    assert page.startswith(NO_CONTROL)
    assert "lean on updates" in page.splitlines()[1]
    assert "The control of the run was left out" in page
    assert "--resume --control" not in page
    assert list(results(tmp_path)["standard"]["differences"]) == ["reliance"]


def test_without_a_control_the_page_says_so_and_how_to_train_one(made, words):
    page = evaluate(parse_command_line(words("merged")))
    assert page.startswith(NO_CONTROL)
    assert f"No control was trained. Train one: {command('train', made / 'merged' / 'args.yaml')}" in page


@pytest.mark.parametrize("how", ["--baseline=control", None, "by its folder"])
def test_the_control_of_the_same_step_is_taken(made, words, how):
    options = [] if how is None else [how if how.startswith("--") else f"--baseline={made / 'adapters' / 'control'}"]
    found = opened(words, "adapters", *options)
    assert (found.condition, found.checkpoint.step, found.notes) == (CONTROL, 4, [])


def test_a_control_of_another_step_is_taken_with_a_note(made, words, tmp_path):
    run = copied(made, tmp_path)
    folder = run / "control" / "checkpoints"
    (folder / "checkpoint_000004").rename(folder / "checkpoint_000003")
    record = folder / "checkpoint_000003" / "consolidated" / "training_config.json"
    record.write_text(json.dumps(json.loads(record.read_text()) | {"step": 3}))
    found = opened(words, "adapters", f"--checkpoint_dir={run}")
    assert (found.condition, found.checkpoint.step) == (CONTROL, 3)
    assert "The control is of step 3, the checkpoint of step 4" in found.notes[0]


def test_the_folder_of_the_own_control_stands_for_its_checkpoint_of_the_same_step(made, words, tmp_path):
    run = copied(made, tmp_path)
    folder = run / "control" / "checkpoints"
    shutil.copytree(folder / "checkpoint_000004", folder / "checkpoint_000009")
    found = opened(words, "adapters", f"--checkpoint_dir={run}", f"--baseline={run / 'control'}")
    assert (found.checkpoint.step, found.checkpoint.folder.parent.name) == (4, "checkpoint_000004")


@pytest.mark.parametrize(
    ("changes", "named"),
    [({"max_steps": 9}, "max_steps=9, not 4"), ({"seed": 1}, "seed=1, not 0"), ({"ttt": {}}, "ttt.as_control=False")],
)
def test_a_run_without_ttt_that_differs_otherwise_is_no_control(made, words, tmp_path, changes, named):
    run = copied(made, tmp_path)
    record = run / "control" / CONTROL_STEP / "training_config.json"
    content = json.loads(record.read_text())
    content["training"] |= changes
    record.write_text(json.dumps(content))
    found = opened(words, "adapters", f"--checkpoint_dir={run}", "--baseline=control")
    assert found.condition == BASELINE
    assert named in found.notes[0]
    assert "is no control of this run" in found.notes[0]


def test_a_run_of_all_weights_without_ttt_is_a_control_and_one_with_ttt_or_the_base_is_none(made, words):
    assert opened(words, "merged", f"--baseline={made / 'stock'}").condition == CONTROL
    assert opened(words, "merged", f"--baseline={made / 'adapters'}").condition == BASELINE
    assert opened(words, "merged", "--baseline=base").condition == BASELINE
    assert opened(words, "merged") is None
    assert opened(words, "adapters", "--baseline=none") is None


def test_a_control_that_was_never_trained_is_refused(made, words):
    with pytest.raises(ConfigError, match=r"baseline='control': .*merged/control is no control"):
        opened(words, "merged", "--baseline=control")


def test_a_broken_control_that_nobody_asked_for_is_refused_with_the_way_out(made, words, tmp_path):
    run = copied(made, tmp_path)
    (run / "control" / CONTROL_STEP / "config.json").write_text("{")
    with pytest.raises(ConfigError, match="It is the control of the run; --baseline none leaves it out"):
        opened(words, "adapters", f"--checkpoint_dir={run}")
    assert opened(words, "adapters", f"--checkpoint_dir={run}", "--baseline=none") is None


def test_an_export_knows_its_control_though_it_does_not_name_its_data(made, words, tmp_path):
    run = copied(made, tmp_path)
    record = run / "checkpoints" / "checkpoint_000004" / "consolidated" / "training_config.json"
    content = json.loads(record.read_text())
    del content["training"]["data"]
    record.write_text(json.dumps(content))
    assert opened(words, "adapters", f"--checkpoint_dir={run}", "--baseline=control").condition == CONTROL


def test_the_checkpoint_of_an_export_lies_in_no_run(made):
    assert open_checkpoint(made / "merged").run_dir == made / "merged"
    assert open_checkpoint(made / "merged" / CONTROL_STEP / "consolidated.safetensors").run_dir == made / "merged"
