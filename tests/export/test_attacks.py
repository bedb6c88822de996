"""Whatever is broken in a checkpoint, an export or a base model is refused by every program, in one line, and at once.

`python -m tests.support.attack_targets` prints the same as a table.
"""

import pytest

import moshi_patch
from tests.support.attack_targets import ACCEPTED, REFUSED, Targets
from tests.support.attacks import PROGRAMS, SECRET, Attack, all_attacks
from tests.support.breakages import proof_of

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
