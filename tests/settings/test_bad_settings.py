"""Settings that nobody can use: each ends in one line that names the key and its value, with exit code 2, at once."""

import os
from pathlib import Path

import pytest
import yaml

from finetune.evaluation.__main__ import main as evaluate
from finetune.settings.evaluation import EvalArgs
from finetune.settings.limits import settings_of
from finetune.settings.schema import TrainArgs
from finetune.training.__main__ import main as train

HUGE = "9" * 5000
NUL = "a\0b"
HALF = "\udce4"
"""Half of a character: what Python makes of a file name that is not UTF-8."""

GOOD = {"run_dir": "run", "full_finetuning": True, "save_adapters": False, "data": {"train_data": "train.jsonl"}}


def kind(field) -> type:
    types = [field.type, *getattr(field.type, "__args__", ())]
    return next(one for one in (bool, float, int, str) if one in types)


ABSURD = {
    bool: ["perhaps", 1, HUGE, [True]],
    int: [1e30, -(10**30), float("nan"), float("inf"), 2.5, HUGE, "abc", [1], {"a": 1}, True],
    float: [1e30, -1e30, float("nan"), float("inf"), HUGE, "abc", [1.0], {"a": 1}, True],
    str: [NUL, HALF, ["a"], {"a": 1}, True],
}
SETTINGS = [(key, value) for key, field, _ in settings_of(TrainArgs()) for value in ABSURD[kind(field)]]
TEXTS = {
    "deep lists": "[" * 900 + "]" * 900,
    "deep lists without end": "run_dir: " + "[" * 200_000,
    "deep sections": "".join(f"{' ' * depth}a:\n" for depth in range(900)),
    "deep braces": "optim: " + "{a: " * 900 + "1" + "}" * 900,
    "a long number": f"max_steps: {HUGE}",
    "a long hexadecimal number": f"max_steps: 0x{HUGE}",
    "a long number in base 60": f"max_steps: 1{':59' * 5000}",
    "no date": "max_steps: 2024-99-99",
    "a date": "max_steps: 2024-01-01",
    "no number by tag": "max_steps: !!int x",
    "no date by tag": "max_steps: !!timestamp x",
    "no bool by tag": "do_eval: !!bool perhaps",
    "no float by tag": "optim: {lr: !!float x}",
    "python by tag": "run_dir: !!python/object/apply:os.getcwd []",
    "binary": "run_dir: !!binary '@'",
    "a set": "optim: !!set {lr}",
    "aliases of aliases": "a: &a [x, x]\n"
    + "".join(f"{b}: &{b} [{', '.join([f'*{a}'] * 9)}]\n" for a, b in zip("abcdefghij", "bcdefghijk", strict=True)),
    "a section in itself": "optim: &o {lr: *o}",
    "a list in itself": "ttt: {layers: &l [*l]}",
    "a list as key": "[a]: 1",
    "a section as key": "{a: 1}: 1",
    "a number as key": "1: 2",
    "nothing as key": "null: 2",
    "merged keys": "<<: 5",
    "two documents": "seed: 1\n---\nseed: 2",
    "a control character": "run_dir: a\x07b",
    "no mapping": "just words",
    "empty": "",
    "a tab": "optim:\n\tlr: 1",
    "an alias of nothing": "seed: *a",
}


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch) -> Path:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "train.jsonl").touch()
    return tmp_path


def refused(main, argv: list[str], capsys) -> str:
    """The line that a program ends with."""
    assert main(argv) == 2
    out, errors = capsys.readouterr()
    assert out == ""
    (line,) = errors.splitlines()
    assert len(line) < 2000
    return line


def nested(key: str, value: object) -> dict:
    content = yaml.safe_load(yaml.safe_dump(GOOD))
    section = content
    *sections, name = key.split(".")
    for part in sections:
        section = section.setdefault(part, {})
    section[name] = value
    return content


def test_there_are_as_many_as_were_tried_by_hand_and_more():
    assert len(SETTINGS) + len(TEXTS) > 147


@pytest.mark.parametrize(("key", "value"), SETTINGS, ids=[f"{key}-{str(value)[:9]!r}" for key, value in SETTINGS])
def test_a_setting_in_a_file_and_on_the_command_line(key, value, folder, capsys):
    (folder / "run.yaml").write_text(yaml.safe_dump(nested(key, value)))
    assert key in refused(train, ["run.yaml"], capsys)
    if isinstance(value, (int, float, str)) and not isinstance(value, bool):
        (folder / "good.yaml").write_text(yaml.safe_dump(GOOD))
        assert key in refused(train, ["good.yaml", f"--{key}", str(value)], capsys)


@pytest.mark.parametrize("text", TEXTS.values(), ids=TEXTS)
def test_a_file(text, folder, capsys):
    (folder / "run.yaml").write_text(text)
    assert refused(train, ["run.yaml"], capsys).startswith("python -m finetune.training: ")


@pytest.mark.parametrize("content", [b"\xff\xfe\x00", b"run_dir: \xe4", b"\x80", b"PK\x03\x04"])
def test_a_file_that_is_no_text(content, folder, capsys):
    (folder / "run.yaml").write_bytes(content)
    assert "not valid YAML" in refused(train, ["run.yaml"], capsys)


@pytest.mark.parametrize(
    ("name", "named"),
    [("nosuch.yaml", "no such file"), (".", "is a folder"), ("a" * 5000, "no such file"), (NUL, "no such file")],
)
def test_a_file_that_is_none(name, named, capsys):
    assert named in refused(train, [name], capsys)
    assert named in refused(evaluate, ["--checkpoint_dir=run", f"--config={name}"], capsys)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_a_file_that_may_not_be_read(folder, capsys):
    (folder / "run.yaml").write_text("seed: 1")
    (folder / "run.yaml").chmod(0)
    assert "cannot be read" in refused(train, ["run.yaml"], capsys)


EVALUATION = [
    (key, value)
    for key, field, _ in settings_of(EvalArgs())
    if not key.startswith(("ttt.", "lora."))
    for value in ABSURD[kind(field)]
    if isinstance(value, (int, float, str)) and not isinstance(value, bool)
]


@pytest.mark.parametrize(("key", "value"), EVALUATION, ids=[f"{key}-{str(value)[:9]!r}" for key, value in EVALUATION])
def test_a_setting_of_an_evaluation(key, value, capsys):
    given = [] if key == "checkpoint_dir" else ["--checkpoint_dir=run"]
    line = refused(evaluate, [*given, f"--{key}={value}"], capsys)
    # a value of the right type is looked at together with the checkpoint, which is not there
    assert key in line or "checkpoint_dir='run'" in line


@pytest.mark.parametrize(
    ("text", "meant"),
    {
        "TTT: {enabled: true}": "ttt",
        "do_checkpoint: true": "do_ckpt",
        "chunk_size: 8": "ttt.chunk_size",
        "chunksize: 8": "ttt.chunk_size",
        "optim: {chunk_size: 8}": "ttt.chunk_size",
        "batch-size: 8": "batch_size",
        "batchSize: 8": "batch_size",
        "checkpoint_freq: 8": "ckpt_freq",
        "num_checkpoint_keep: 8": "num_ckpt_keep",
        "lora: {lr: 1}": "optim.lr",
        "rank: 8": "lora.rank",
        "train_data: a": "data.train_data",
        "trian_data: a": "data.train_data",
        "hf_repo: a": "moshi_paths.hf_repo_id",
        "moshi_path: {hf_repo_id: a}": "moshi_paths",
        "Seed: 1": "seed",
        "resume: true": "checkpoint.resume",
        "full_finetune: true": "full_finetuning",
        "data: {training_data: a}": "data.train_data",
    }.items(),
)
def test_the_right_name_is_found_in_any_section(text, meant, folder, capsys):
    (folder / "run.yaml").write_text(text)
    assert f"did you mean {meant!r}?" in refused(train, ["run.yaml"], capsys)
