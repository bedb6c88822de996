"""An exported folder answers as the checkpoint did, needs nothing else of the machine, and is never half made."""

import json
import logging
import os
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
import yaml
from moshi.models.loaders import CheckpointInfo
from safetensors.torch import load_file

from finetune.checkpoint.saved import load_model, model_paths, open_checkpoint
from finetune.common.errors import ConfigError
from finetune.doctor.__main__ import main as doctor
from finetune.export import export as export_module
from finetune.export.__main__ import main
from finetune.export.export import export
from finetune.settings.commands import ExportArgs
from finetune.settings.record import from_dict
from finetune.training.build_model import build_model
from moshi_patch.repository import local_repositories
from tests.export.test_model_card import RESULTS
from tests.support.checkpoint_runs import CTX
from tests.support.loading import assert_active, logits
from tests.support.models import relative
from tests.support.saved_runs import MODES, TTT, copy_run, train
from tests.support.tiny_repository import stream_speech

pytestmark = pytest.mark.slow


@pytest.fixture(autouse=True)
def _patched(patched):
    """For the models that are built here."""


@pytest.fixture
def repo(stock_repo):
    return stock_repo


@pytest.fixture
def saved(saved_run, repo, tmp_path):
    """A run of two steps in one of `MODES`, to change; returns its folder."""

    def run(mode: str, dtype: str = "float32", base: Path | None = None) -> Path:
        if base is None and dtype == "float32":
            return copy_run(saved_run(mode), tmp_path / "run")
        # Earlier versions saved adapters over a base with adapters of its own, too.
        built_as = {} if base is None else {"save_adapters": False}
        return train(tmp_path / "run", base or repo, mode, built_as, param_dtype=dtype)

    return run


def answers(run: Path) -> torch.Tensor:
    """Logits of the checkpoint, loaded as an evaluation loads it."""
    saved = open_checkpoint(run)
    model, _ = load_model(saved, model_paths(saved), torch.device("cpu"), torch.float32)
    assert_active(model)
    return logits(model)


def served(folder: Path) -> CheckpointInfo:
    """What `--hf-repo FOLDER` serves, everything from the folder."""
    with local_repositories():
        return CheckpointInfo.from_hf_repo(str(folder))


@pytest.mark.parametrize("relocated", [False, True], ids=["in place", "moved, base and run gone"])
@pytest.mark.parametrize("mode", MODES)
def test_an_export_answers_as_the_checkpoint_did(saved, repo, tmp_path, mode, relocated):
    base = shutil.copytree(repo, tmp_path / "base")
    run = saved(mode, base=base)
    expected = answers(run)
    out = export(ExportArgs(run, tmp_path / "out", with_base=True))
    if relocated:
        out = out.rename(tmp_path / "elsewhere")
        shutil.rmtree(run)
        shutil.rmtree(base)
    info = served(out)
    model = info.get_moshi(dtype=torch.float32)
    assert torch.equal(logits(model), expected)
    assert model.ttt_config.chunk_size == 8
    assert info.get_mimi().sample_rate == 24_000
    assert info.get_text_tokenizer().vocab_size() == model.text_card
    assert torch.equal(answers(out), expected)  # an export is a checkpoint, too


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_adapters_that_are_merged_answer_as_they_did_beside_the_base(saved, tmp_path, dtype):
    run = saved("adapter", dtype)
    expected = answers(run)
    out = export(ExportArgs(run, tmp_path / "out", merge=True))
    config = json.loads((out / "config.json").read_text())
    assert config["lora"] is False
    assert not {"lora_name", "lora_rank", "lora_scaling"} & config.keys()
    weights = load_file(out / "consolidated.safetensors")
    assert {value.dtype for value in weights.values()} == {getattr(torch, dtype)}
    assert not [name for name in weights if "lora" in name]
    merged = served(out).get_moshi(dtype=torch.float32)
    assert relative(logits(merged), expected) < (1e-5 if dtype == "float32" else 2e-2)
    assert_active(merged)


def test_a_second_export_and_a_next_stage_begin_from_an_export(saved, tmp_path):
    run = saved("adapter")
    expected = answers(run)
    first = export(ExportArgs(run, tmp_path / "first", with_base=True))
    second = export(ExportArgs(first, tmp_path / "second", with_base=True))
    assert {path.name for path in second.iterdir()} == {path.name for path in first.iterdir()}
    assert torch.equal(logits(served(second).get_moshi(dtype=torch.float32)), expected)
    merged = export(ExportArgs(first, tmp_path / "merged", merge=True))
    args = from_dict({"moshi_paths": {"hf_repo_id": str(merged)}, "ttt": TTT, "param_dtype": "float32"})
    assert relative(logits(build_model(args, CTX).model.eval()), expected) < 1e-5


@pytest.mark.parametrize("mode", MODES)
def test_the_folder_holds_what_is_needed_and_nothing_of_the_machine(saved, tmp_path, repo, mode):
    out = export(ExportArgs(saved(mode), tmp_path / "out", with_base=True))
    weights = {"lora.safetensors", "model.safetensors"} if mode == "adapter" else {"consolidated.safetensors"}
    common = {"config.json", "training_config.json", "README.md", "SHA256SUMS", "mimi_config.json"}
    assert {path.name for path in out.iterdir()} == common | weights | {"mimi.safetensors", "tokenizer.model"}
    for path in [*out.glob("*.json"), out / "README.md"]:
        for private in (str(tmp_path), str(repo), "secret.jsonl"):
            assert private not in path.read_text(), path.name
    subprocess.run(["sha256sum", "--strict", "-c", "SHA256SUMS"], cwd=out, check=True, capture_output=True)
    assert doctor([str(out)]) == 0
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".tmp")] == []
    assert out.stat().st_mode & 0o777 == 0o755


def test_what_lies_on_the_hub_is_named_not_copied(saved, tmp_path, repo, monkeypatch):
    run = saved("adapter")
    config = run / "checkpoints" / "checkpoint_000002" / "consolidated" / "training_config.json"
    content = json.loads(config.read_text())
    content["training"]["moshi_paths"]["hf_repo_id"] = "someone/their-moshi"
    config.write_text(json.dumps(content))
    (config.parent / "SHA256SUMS").unlink()
    # The Hub itself cannot be reached here: what it would send is that repository.
    monkeypatch.setattr("moshi.models.loaders.hf_hub_download", lambda repo_id, name, **_: str(repo / name))
    out = export(ExportArgs(run, tmp_path / "out"))
    exported = json.loads((out / "config.json").read_text())
    assert exported["moshi_name"] == "hf://someone/their-moshi/model.safetensors"
    assert exported["mimi_name"] == "hf://someone/their-moshi/mimi.safetensors"
    assert exported["tokenizer_name"] == "hf://someone/their-moshi/tokenizer.model"
    assert exported["lora_name"] == "lora.safetensors"
    assert not (out / "model.safetensors").exists()
    heading = yaml.safe_load((out / "README.md").read_text().split("---\n")[1])
    assert heading["base_model"] == "someone/their-moshi"
    assert heading["base_model_relation"] == "adapter"
    assert torch.equal(answers(out), answers(run))
    args = from_dict({"moshi_paths": {"hf_repo_id": str(out)}, "ttt": TTT, "param_dtype": "float32"})
    assert relative(logits(build_model(args, CTX).model.eval()), answers(run)) < 1e-5  # trains on with them merged


def test_adapters_over_a_base_with_adapters_of_its_own_are_refused_where_they_would_be_missing(saved, tmp_path, capsys):
    first = export(ExportArgs(saved("adapter"), tmp_path / "first", with_base=True))
    shutil.rmtree(tmp_path / "run")
    run = saved("adapter", base=first)
    own = str(first / "lora.safetensors")
    for options in ({"with_base": True}, {"merge": True}):
        with pytest.raises(ConfigError, match=f"adapters of its own, {own}"):
            export(ExportArgs(run, tmp_path / "out", **options))
    with pytest.raises(ConfigError, match="adapters of its own"):
        answers(run)
    assert doctor([str(run)]) == 1
    assert own in capsys.readouterr().out


def test_training_adapters_over_a_base_with_adapters_of_its_own_is_refused(saved, tmp_path):
    first = export(ExportArgs(saved("adapter"), tmp_path / "first", with_base=True))
    common = {"moshi_paths": {"hf_repo_id": str(first)}, "ttt": TTT, "param_dtype": "float32"}
    with pytest.raises(
        ConfigError, match=r"save_adapters=True: .* adapters of its own, .*save_adapters to false.*--merge"
    ):
        build_model(from_dict(common | MODES["adapter"]), CTX)
    for mode in ("merged", "full"):
        assert build_model(from_dict(common | MODES[mode]), CTX)


def test_adapters_over_a_local_base_are_refused_with_both_remedies(saved, tmp_path):
    with pytest.raises(ConfigError, match=r"--with-base .* --merge"):
        export(ExportArgs(saved("adapter"), tmp_path / "out"))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("kind", ["folder", "file", "link"])
def test_what_exists_is_never_overwritten(saved, tmp_path, kind):
    run, out = saved("full"), tmp_path / "out"
    {"folder": out.mkdir, "file": lambda: out.write_text("mine"), "link": lambda: out.symlink_to("nowhere")}[kind]()
    with pytest.raises(ConfigError, match="exists, and nothing is overwritten"):
        export(ExportArgs(run, out))
    assert kind != "file" or out.read_text() == "mine"


@pytest.mark.parametrize("damage", ["flipped", "truncated", "settings", "training"])
def test_a_broken_checkpoint_is_refused_and_named(saved, tmp_path, damage, capsys):
    run = saved("full")
    folder = run / "checkpoints" / "checkpoint_000002" / "consolidated"
    file = folder / "consolidated.safetensors"
    content = bytearray(file.read_bytes())
    if damage == "flipped":
        content[-3] ^= 1
        file.write_bytes(content)
    elif damage == "truncated":
        file.write_bytes(content[:-8])
        (folder / "SHA256SUMS").unlink()
    elif damage == "settings":
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(config | {"ttt_layers": [0, 3]}))
    else:
        (folder / "training_config.json").write_text("{")
    assert main([str(run), str(tmp_path / "out")]) == 2
    named = {"flipped": "SHA-256", "truncated": "truncated", "settings": "ttt_layers", "training": "not valid JSON"}
    assert named[damage] in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
    assert list(tmp_path.glob(".tmp*")) == []


def test_an_export_that_fails_on_the_way_leaves_nothing(saved, tmp_path, monkeypatch, capsys):
    run = saved("full")

    def full(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(export_module, "write_checksums", full)
    assert main([str(run), str(tmp_path / "new" / "out")]) == 1
    assert "out: cannot be made (No space left on device); nothing is left of it." in capsys.readouterr().err
    assert os.listdir(tmp_path / "new") == []


def test_an_old_checkpoint_needs_the_base_named(saved, tmp_path, repo, caplog):
    run = saved("full")
    folder = run / "checkpoints" / "checkpoint_000002" / "consolidated"
    (folder / "training_config.json").unlink()
    (folder / "SHA256SUMS").unlink()
    with pytest.raises(ConfigError, match="--base"):
        export(ExportArgs(run, tmp_path / "out"))
    with caplog.at_level(logging.WARNING):
        out = export(ExportArgs(run, tmp_path / "out", base=str(repo)))
    assert "a flipped bit in its weights would not be seen" in caplog.text
    assert "Not recorded." in (out / "README.md").read_text()
    assert_active(served(out).get_moshi(dtype=torch.float32))


def test_what_an_evaluation_of_the_run_found_is_on_the_card_and_nothing_of_another_step(saved, tmp_path):
    run = saved("full")
    place = run / "eval" / "checkpoint_000002" / "eval.json"
    place.parent.mkdir(parents=True)
    place.write_text(json.dumps(RESULTS | {"step": 2}))
    assert "| updates on | 2.5000 |" in (export(ExportArgs(run, tmp_path / "found")) / "README.md").read_text()
    (tmp_path / "eval.json").write_text(json.dumps(RESULTS | {"step": 7}))
    with pytest.raises(ConfigError, match="was measured at step 7, and this checkpoint is of 2"):
        export(ExportArgs(run, tmp_path / "out", eval=tmp_path / "eval.json"))


def test_results_of_other_weights_of_the_same_step_are_refused(saved, tmp_path):
    run = saved("full")
    (tmp_path / "eval.json").write_text(json.dumps(RESULTS | {"step": 2, "sha256": "0" * 64}))
    with pytest.raises(ConfigError, match=r"eval='.*eval.json': was measured with other weights"):
        export(ExportArgs(run, tmp_path / "out", eval=tmp_path / "eval.json"))


def test_without_an_evaluation_the_card_says_so_and_a_missing_one_is_named(saved, tmp_path):
    run = saved("full")
    with pytest.raises(ConfigError, match=r"eval='.*nothing.json': no such file"):
        export(ExportArgs(run, tmp_path / "out", eval=tmp_path / "nothing.json"))
    assert "Not measured." in (export(ExportArgs(run, tmp_path / "out")) / "README.md").read_text()


@pytest.mark.parametrize("mode", ["adapter", "full"])
def test_the_stock_program_streams_from_an_export_alone(saved, tmp_path, mode):
    out = export(ExportArgs(saved(mode), tmp_path / "out", with_base=True))
    shutil.rmtree(tmp_path / "run")
    assert stream_speech(tmp_path / "out.wav", "--hf-repo", out) > 10
