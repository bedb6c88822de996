"""What `eval_from_checkpoint.py` refuses: in one line, and as a rule before a model is loaded."""

import json
import shutil
from pathlib import Path

import pytest
import sphn
from safetensors.torch import load_file, save_file

from finetune.common.errors import ConfigError
from finetune.data.broken import BrokenData
from finetune.evaluation import run as run_module
from finetune.evaluation.__main__ import main
from finetune.evaluation.run import evaluate
from finetune.evaluation.settings_in_force import parse_command_line
from finetune.export.export import export
from finetune.settings.commands import ExportArgs
from tests.support.evaluations import MODES, results
from tests.support.tiny_repository import DATA, build_repo

pytestmark = pytest.mark.slow


@pytest.fixture
def unloadable(monkeypatch):
    """A test that loads a model fails."""
    for name in ("load_model", "load_baseline"):
        monkeypatch.setattr(run_module, name, lambda *_: pytest.fail("a model is loaded"))


def broken_copy(made, tmp_path, change) -> str:
    shutil.copytree(made / "merged", tmp_path / "broken")
    folder = tmp_path / "broken" / "checkpoints" / "checkpoint_000004" / "consolidated"
    change(folder)
    return f"--checkpoint_dir={tmp_path / 'broken'}"


def other_chunk(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"ttt_chunk_size": 8}))


def missing_target(folder: Path) -> None:
    file = folder / "consolidated.safetensors"
    weights = {name: value for name, value in load_file(file).items() if "layers.3.gating.target" not in name}
    save_file(weights, file)


def flipped_bit(folder: Path) -> None:
    file = folder / "consolidated.safetensors"
    content = bytearray(file.read_bytes())
    content[-1000] ^= 1
    file.write_bytes(content)


@pytest.mark.usefixtures("unloadable")
@pytest.mark.parametrize(
    ("change", "named"), [(other_chunk, "ttt_chunk_size=8"), (missing_target, "layers? 1")], ids=["setting", "weights"]
)
def test_a_checkpoint_that_contradicts_itself_is_refused_with_the_keys(made, words, tmp_path, change, named):
    with pytest.raises(ConfigError, match=f"is broken: .*{named}"):
        evaluate(parse_command_line(words("merged", broken_copy(made, tmp_path, change))))


@pytest.mark.usefixtures("unloadable")
@pytest.mark.parametrize(
    ("baseline", "named"),
    [("nowhere", "baseline='nowhere': no such file or folder"), ("other", r"its codes differ: card=32, not 64")],
)
def test_what_cannot_be_a_baseline_is_refused(words, tmp_path, baseline, named):
    if baseline == "other":
        build_repo(tmp_path / "other", card=32)
        baseline = str(tmp_path / "other")
    with pytest.raises(ConfigError, match=named):
        evaluate(parse_command_line(words("merged", f"--baseline={baseline}")))


@pytest.mark.usefixtures("unloadable")
def test_files_of_the_base_model_that_are_gone_are_named(words):
    with pytest.raises(ConfigError, match=r"moshi_paths\.mimi_path='gone': no such file"):
        evaluate(parse_command_line(words("merged", "--moshi_paths.mimi_path=gone")))


def test_a_truncated_base_model_is_one_line(made, words, tmp_path):
    shutil.copytree(made / "repo", tmp_path / "repo")
    weights = tmp_path / "repo" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1000])
    with pytest.raises(
        ConfigError, match="cannot be loaded over its base model in moshi_paths: damaged, or of another format"
    ) as error:
        evaluate(parse_command_line(words("adapters", f"--moshi_paths.hf_repo_id={tmp_path / 'repo'}")))
    assert "\n" not in str(error.value)


def test_a_baseline_that_cannot_be_loaded_is_one_line(made, words, tmp_path):
    shutil.copytree(made / "repo", tmp_path / "repo")
    weights = tmp_path / "repo" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1000])
    with pytest.raises(
        ConfigError, match=r"baseline='.*repo': cannot be loaded: damaged, or of another format"
    ) as error:
        evaluate(parse_command_line(words("merged", f"--baseline={tmp_path / 'repo'}")))
    assert "\n" not in str(error.value)


@pytest.mark.usefixtures("unloadable")
@pytest.mark.parametrize("mode", MODES)
def test_an_export_is_not_compared_with_itself_as_its_base(made, words, tmp_path, mode):
    export(ExportArgs(made / mode, tmp_path / "export", with_base=mode == "adapters"))
    given = words("merged", f"--checkpoint_dir={tmp_path / 'export'}", "--baseline=base")
    with pytest.raises(ConfigError, match=r"baseline='base': .*\.safetensors is the checkpoint itself"):
        evaluate(parse_command_line(given))


@pytest.mark.usefixtures("unloadable")
@pytest.mark.parametrize("key", ["checkpoint_dir", "baseline"])
def test_weights_with_a_flipped_bit_are_not_evaluated(made, words, tmp_path, key):
    broken = broken_copy(made, tmp_path, flipped_bit).removeprefix("--checkpoint_dir=")
    with pytest.raises(ConfigError, match=rf"{key}='.*broken.*consolidated.safetensors is not what was saved"):
        evaluate(parse_command_line(words("merged", f"--{key}={broken}")))


@pytest.mark.usefixtures("unloadable")
def test_results_that_have_no_place_are_refused_before_a_model_is_loaded(words, tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match=r"out_dir='.*file/results': no folder can be made there: Not a directory"):
        evaluate(parse_command_line(words("merged", f"--out_dir={tmp_path / 'file' / 'results'}")))


@pytest.mark.parametrize(
    ("options", "named"),
    [
        (["--checkpoint_dir=nowhere"], "checkpoint_dir='nowhere': no such file or folder"),
        (["--eval_type=all"], "eval_type='all'"),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else None,
)
def test_the_program_refuses_in_one_line(words, options, named, capsys):
    assert main(words("merged", *options), prog="eval_from_checkpoint.py") == 2
    out, errors = capsys.readouterr()
    assert out == ""
    assert len(errors.strip().splitlines()) == 1
    assert errors.startswith("eval_from_checkpoint.py: ")
    assert named in errors


def test_a_few_broken_recordings_are_skipped_by_name_and_many_are_an_error(words, tmp_path):
    pcm, rate = sphn.read(str(DATA / "boat.wav"), duration_sec=1.0)
    lines = []
    for index in range(25):
        sphn.write_wav(str(tmp_path / f"{index}.wav"), pcm.mean(0) if index == 24 else pcm, rate)  # the last is mono
        (tmp_path / f"{index}.json").write_text('{"alignments": []}')
        lines.append(json.dumps({"path": f"{index}.wav", "duration": 1.0}))
    data = f"--data.eval_data={tmp_path / 'list.jsonl'}"
    (tmp_path / "list.jsonl").write_text("\n".join(lines))
    table = evaluate(parse_command_line(words("merged", data)))
    assert "24 recordings, " in table
    assert "1 skipped" in table
    assert [Path(name.split()[0]).name for name in results(tmp_path)["standard"]["skipped"]] == ["24.wav"]
    (tmp_path / "list.jsonl").write_text("\n".join(lines[20:]))
    with pytest.raises(BrokenData, match=r"1 of 5 items are broken.*24.wav"):
        evaluate(parse_command_line(words("merged", data)))
    (tmp_path / "list.jsonl").write_text('{"path": "missing.wav", "duration": 1.0}')
    with pytest.raises(BrokenData, match=r"missing.wav"):
        evaluate(parse_command_line(words("merged", data)))
