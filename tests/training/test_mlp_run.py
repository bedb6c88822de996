"""A model with memories of the kind `mlp` from training to its export: every room does its part."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import moshi_patch
from finetune.checkpoint.saved import open_checkpoint
from finetune.checkpoint.verify import examine
from finetune.common.errors import ConfigError
from finetune.doctor.__main__ import main as doctor
from finetune.evaluation.__main__ import main as evaluate
from finetune.export.__main__ import main as export
from finetune.settings.record import from_dict
from finetune.training.trainer import train
from tests.support.tiny_repository import DATA
from tests.support.training_runs import metrics, settings_for

pytestmark = pytest.mark.slow

MLP = {"enabled": True, "kind": "mlp", "layers": [1, 3], "mini_batch_size": 8, "optim_lr": 3e-2}
TENSORS = 19


@pytest.fixture(scope="module")
def run(stock_repo, tmp_path_factory) -> Path:
    """Six steps with adapters, and their control."""
    folder = tmp_path_factory.mktemp("mlp") / "run"
    settings = settings_for(stock_repo, folder, ttt=MLP, do_eval=True, control=True, sample_freq=0, duration_sec=2)
    train(from_dict(settings))
    moshi_patch.uninstall()
    return folder


def last(run: Path) -> Path:
    return run / "checkpoints" / "checkpoint_000006"


def test_the_run_logs_what_its_memories_do_and_has_a_control(run):
    first, *_, final = metrics(run)
    for layer in (1, 3):
        assert first[f"ttt/layers.{layer}/gating_alpha_norm"] > 0, "the gate moves at the first step"
        assert final[f"ttt/layers.{layer}/relative_delta"] > 1e-3
    assert final["loss"] < first["loss"]
    assert metrics(run, "eval")[-1]["ttt_reliance"] != 0
    assert metrics(run / "control")[-1]["loss"] != final["loss"]


def test_the_checkpoint_holds_19_tensors_a_layer_and_is_good(run):
    saved = open_checkpoint(last(run))
    names = [key for name in load_file(saved.weights) if (key := moshi_patch.memory_key(name))]
    assert [sum(key.layer == layer for key in names) for layer in (1, 3)] == [TENSORS, TENSORS]
    assert {key.kind for key in names} == {"mlp"}
    assert saved.config["ttt_kind"] == "mlp"
    assert "ttt_chunk_size" not in saved.config
    assert [problems for _, problems in examine(saved) if problems] == []


def test_the_doctor_reports_updates_and_gates(run, stock_repo, capsys):
    assert doctor([str(last(run)), "--json"]) == 0
    checks = {check["name"]: check for check in json.loads(capsys.readouterr().out)["checks"]}
    assert checks["TTT layer 1"]["details"]["kind"] == "mlp"
    assert len(checks["TTT layer 3"]["details"]["tensors"]) == TENSORS
    active = checks["TTT active"]["details"]
    assert active["largest_logit_change_gates_closed"] > 0
    assert active["largest_logit_change"] > 0


def test_an_evaluation_tells_updates_on_from_off_and_from_gates_closed(run, tmp_path):
    lines = [json.dumps({"path": f"{DATA}/{name}.wav", "duration": 11.0}) for name in ("sister", "boat")]
    (tmp_path / "eval.jsonl").write_text("\n".join(lines))
    words = [f"--checkpoint_dir={last(run)}", f"--data.eval_data={tmp_path}/eval.jsonl", f"--out_dir={tmp_path}/out"]
    assert evaluate(words) == 0
    overall = json.loads((tmp_path / "out" / "eval.json").read_text())["standard"]
    assert list(overall["overall"])[:3] == ["updates on", "updates off", "gates closed"]
    assert len({row["loss"] for row in overall["overall"].values()}) == len(overall["overall"])
    assert "updates on - gates closed" in overall["differences"]
    assert evaluate([*words[:2], f"--out_dir={tmp_path}/other", "--ttt.base_lr=0.1"]) == 0
    assert evaluate([*words, "--ttt.chunk_size=8"]) != 0


def test_an_export_serves_the_same_model(run, tmp_path, capsys):
    assert export([str(last(run)), str(tmp_path / "out"), "--with-base"]) == 0
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["ttt_kind"] == "mlp"
    card = (tmp_path / "out" / "README.md").read_text()
    assert "2407.04620" in card
    assert "`ttt_base_lr`" in card
    assert doctor([str(tmp_path / "out"), "--json"]) == 0


def test_a_resumed_run_goes_on_and_another_kind_does_not(run, stock_repo, tmp_path):
    settings = settings_for(stock_repo, tmp_path / "other", ttt=MLP, init_from=str(last(run)), max_steps=2)
    train(from_dict(settings))
    settings = settings_for(stock_repo, tmp_path / "third", init_from=str(last(run)), max_steps=2)
    with pytest.raises(ConfigError, match=r"init_from.*does not fit"):
        train(from_dict(settings))
    moshi_patch.uninstall()
    assert torch.is_grad_enabled()
