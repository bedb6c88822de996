"""The YAML files of the examples are read, make sense, and are what they say they are."""

import re

import pytest
import yaml

from finetune.settings.command_line import load_args
from finetune.settings.record import to_dict
from finetune.settings.validation import unusual_settings
from tests.support.tiny_repository import ROOT

WITHOUT_TTT = ["moshi_7B.yaml"]


@pytest.mark.parametrize("file", sorted((ROOT / "example").glob("*.yaml")), ids=lambda path: path.name)
def test_shipped_settings_are_read_and_make_sense(file):
    args = load_args(file)
    assert args.ttt.enabled == args.ttt.to_kwargs()["ttt_enabled"] == (file.name not in WITHOUT_TTT)
    assert not args.ttt.enabled or args.duration_sec * 12.5 >= 2 * args.ttt.chunk_size
    assert unusual_settings(args) == []


def test_the_examples_with_and_without_ttt_differ_in_ttt_alone():
    with_ttt, without = (to_dict(load_args(ROOT / "example" / f"moshi_7B{end}.yaml")) for end in ("_ttt", ""))
    assert {key for key in with_ttt if with_ttt[key] != without[key]} == {"ttt", "run_dir"}


def test_the_other_kind_that_an_example_names_is_read(tmp_path):
    text = (ROOT / "example" / "dailytalk.yaml").read_text()
    settings = yaml.safe_load(text)
    (section,) = re.findall(r"^# (ttt: .*)$", text, re.M)
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(settings | yaml.safe_load(section)))
    args = load_args(tmp_path / "run.yaml")
    assert (args.ttt.kind, args.ttt.mini_batch_size, args.ttt.layers) == ("mlp", 8, "middle")
    assert unusual_settings(args) == []
