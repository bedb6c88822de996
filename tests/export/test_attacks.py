"""Whatever is broken in a checkpoint, an export or a base model is refused by every program, in one line, and at once.

`python -m tests.support.attack_targets` prints the same as a table.
"""

import json

import pytest

import moshi_patch
from finetune.export.__main__ import main as export
from tests.support.attack_targets import ACCEPTED, REFUSED, Targets
from tests.support.attacks import PROGRAMS, SECRET, Attack, all_attacks
from tests.support.breakages import proof_of, setting

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def targets(tmp_path_factory):
    moshi_patch.install()
    yield Targets.make(tmp_path_factory.mktemp("targets"))
    moshi_patch.uninstall()


@pytest.fixture(autouse=True)
def _patched(targets):
    moshi_patch.install()  # another fixture may have taken it back


@pytest.mark.parametrize("target", ["full", "adapters", "export"])
def test_what_nobody_broke_is_accepted_by_every_program(targets, tmp_path, target):
    whole = Attack("none", target, lambda folder: None, "devri")
    targets.attacked(whole, tmp_path)
    for program in "devi" if target == "export" else "devri":
        assert targets.outcome(program, whole, tmp_path) == ACCEPTED, PROGRAMS[program]


def test_there_are_as_many_attacks_as_were_promised():
    assert len({attack.name for attack in all_attacks()}) == len(all_attacks()) >= 147


@pytest.mark.parametrize("attack", all_attacks(), ids=lambda attack: attack.name)
def test_an_attack_is_refused_in_one_line(targets, tmp_path, attack):
    targets.attacked(attack, tmp_path)
    outcomes = {PROGRAMS[letter]: targets.outcome(letter, attack, tmp_path) for letter in attack.refused_by}
    assert outcomes == dict.fromkeys(outcomes, REFUSED)
    assert not proof_of(tmp_path / attack.target).exists(), "it ran what was written into it"
    assert not list(tmp_path.glob("*out*")), "something of an export is left"


@pytest.mark.parametrize("attack", [a for a in all_attacks() if "runs code" in a.name], ids=lambda attack: attack.name)
def test_no_program_runs_what_a_stranger_wrote_into_a_checkpoint(targets, tmp_path, attack):
    targets.attacked(attack, tmp_path)
    for letter in PROGRAMS:
        targets.outcome(letter, attack, tmp_path)
    assert not list(tmp_path.rglob("exploited"))


@pytest.mark.parametrize("attack", [a for a in all_attacks() if "secret" in a.name], ids=lambda attack: attack.name)
def test_no_program_copies_a_file_that_a_stranger_points_to(targets, tmp_path, attack):
    targets.attacked(attack, tmp_path)
    kept = tmp_path / "secret.key"
    for letter in "dev":
        targets.outcome(letter, attack, tmp_path)
    copies = [path for path in (tmp_path / "out").rglob("*") if path.is_file() and SECRET in path.read_text("latin1")]
    assert copies == []
    assert kept.read_text() == SECRET


@pytest.mark.parametrize("key", ["tokenizer_path", "mimi_path", "moshi_path", "config_path"])
def test_a_secret_that_a_stranger_trained_with_is_not_exported(targets, tmp_path, key):
    """Without `--base`, files are taken from where training_config.json says; they have to be what they are called."""
    path = str(tmp_path / "secret.key")
    step = "checkpoints/checkpoint_000001/consolidated"
    do = setting("training_config.json", f"training.moshi_paths.{key}", path)
    targets.attacked(Attack("a stranger's", "adapters", do, "e"), tmp_path)
    assert path in (tmp_path / "adapters" / step / "training_config.json").read_text()
    assert export([str(tmp_path / "adapters"), str(tmp_path / "out"), "--with-base"]) == 2
    assert not (tmp_path / "out").exists()


RESULTS = [
    {"standard": 5},
    {"standard": {"overall": []}},
    {"standard": {"overall": {"updates on": 5}}},
    {"paper": 5},
    {"paper": {"swuggy": "x"}},
    {"step": [1], "settings": "x"},
    {"settings": {"ttt.decay": 5}, "standard": {"overall": {}}},
]


@pytest.mark.parametrize("results", RESULTS, ids=str)
def test_results_of_the_wrong_shape_never_end_in_a_traceback(targets, tmp_path, capsys, results):
    (tmp_path / "eval.json").write_text(json.dumps(results))
    code = export([str(targets.folder / "full"), str(tmp_path / "out"), f"--eval={tmp_path / 'eval.json'}"])
    assert code in (0, 2)
    assert (tmp_path / "out").is_dir() == (code == 0)
    assert len([line for line in capsys.readouterr().err.splitlines() if line.startswith("python")]) == (code != 0)
