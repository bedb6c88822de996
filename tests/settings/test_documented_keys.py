"""The tables of keys in docs/ list every key of the settings with the default that it has, and no other key."""

import re

import pytest

from finetune.settings.evaluation import EvalArgs
from finetune.settings.limits import settings_of
from finetune.settings.schema import TrainArgs
from tests.support.tiny_repository import ROOT

OF_THE_CHECKPOINT = ("ttt.", "lora.")
"""Sections of an evaluation that come from the checkpoint's config.json; the text below its table says so."""


def table(page: str, heading: str) -> dict[str, str]:
    """By key, its default as the table below `heading` has it."""
    text = (ROOT / "docs" / page).read_text().split(f"\n## {heading}\n")[1].split("\n## ")[0]
    found = {}
    for row in (line for line in text.splitlines() if line.startswith("| `")):
        names, defaults = (cell.strip() for cell in row.strip("| ").split(" | ")[:2])
        keys = re.findall(r"`([^`]+)`", names)
        keys = [f"{keys[0].rpartition('.')[0]}{key}" if key.startswith(".") else key for key in keys]
        values = [value.strip().strip('`"') for value in defaults.split(",")] if defaults else [""]
        values = values * len(keys) if len(values) == 1 else values
        found |= dict(zip(keys, values, strict=True))
    return found


def is_default(shown: str, value: object) -> bool:
    if value == "":
        return shown in ("required", "")
    if value is None or isinstance(value, bool):
        return shown == {None: "null", True: "true", False: "false"}[value]
    if isinstance(value, (int, float)):
        return float(shown.replace("−", "-")) == value
    return shown == value


@pytest.mark.parametrize("key", [key for key, _, _ in settings_of(TrainArgs())])
def test_each_key_of_training_stands_in_its_table_with_its_default(key):
    shown = table("training.md", "Keys")
    default = {key: value for key, _, value in settings_of(TrainArgs())}[key]
    assert key in shown
    assert is_default(shown[key], default)


def test_no_other_key_stands_there():
    assert set(table("training.md", "Keys")) == {key for key, _, _ in settings_of(TrainArgs())}


def test_each_key_of_an_evaluation_stands_in_one_of_its_tables_with_its_default():
    shown = table("evaluation.md", "Settings")
    paper = {key: value for key, value in table("evaluation_paper.md", "Settings").items() if key.startswith("paper.")}
    keys = {key: value for key, _, value in settings_of(EvalArgs()) if not key.startswith(OF_THE_CHECKPOINT)}
    for key, default in keys.items():
        place = shown | paper
        at = place.get(key, place.get(f"{key.partition('.')[0]}.*"))
        assert at is not None, key
        assert at == "of the training" or is_default(at, default), key
    known = {key for key in shown | paper if not key.endswith(".*")}
    assert known <= keys.keys()
