"""The command of docs/evaluation_paper.md, as it stands there, on a checkpoint that was just trained."""

import json
import math
import re
import shlex
import shutil

import pytest

import moshi_patch
from example.make_pairs import make_benchmarks
from finetune.evaluation.run import evaluate
from finetune.evaluation.settings_in_force import parse_command_line
from tests.support.tiny_repository import ROOT

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def run(made, tmp_path_factory):
    """The folder of a run of a few steps, and beside it the stand-ins of the benchmarks."""
    folder = tmp_path_factory.mktemp("run")
    shutil.copytree(made / "merged", folder / "run")
    make_benchmarks(folder / "tiny_benchmarks", items=3, longform_seconds=12.0)
    return folder


@pytest.fixture
def words(run, monkeypatch):
    """The documented command line, for the run of this test."""
    text = (ROOT / "docs" / "evaluation_paper.md").read_text()
    block = next(block for block in re.findall(r"```bash\n(.*?)```", text, re.S) if "eval_from_checkpoint" in block)
    line = next(line for line in block.replace("\\\n", " ").splitlines() if "eval_from_checkpoint" in line)
    monkeypatch.chdir(run)
    yield [word.replace("runs/tiny_ttt", "run") for word in shlex.split(line)[2:]]
    moshi_patch.uninstall()


def test_the_documented_command_evaluates_every_set_beside_a_baseline(run, words):
    out = run / "run" / "eval" / "checkpoint_000004"
    printed = evaluate(parse_command_line([*words, "--baseline=base"]))
    content = json.loads((out / "eval.json").read_text())["paper"]
    assert list(content) == ["swuggy", "sblimp", "sstorycloze", "tstorycloze", "longform"]
    for name, result in content.items():
        place = result["buckets"][0] if name == "longform" else result
        for condition in ("updates on", "updates off", "baseline", "updates on - baseline"):
            assert math.isfinite(place[condition]["value"])
            assert place[condition]["low"] is None  # of three items
        assert name in printed
    assert content["swuggy"]["beyond_first_chunk"]["share"] == 0.0  # six notes are twelve steps
    assert content["swuggy"]["updates on"] == content["swuggy"]["updates off"]
    assert (out / "eval_paper.png").read_bytes().startswith(b"\x89PNG")


def test_other_settings_of_the_benchmarks_are_other_results(run, words):
    (run / "out").mkdir()
    values = []
    for option in ("first", "all"):
        evaluate(parse_command_line([*words, f"--paper.codebooks={option}", f"--out_dir={run / 'out'}"]))
        values.append(json.loads((run / "out" / "eval.json").read_text())["paper"]["sblimp"]["per_pair"])
    assert values[0].keys() == values[1].keys()
    assert values[0] != values[1]
