"""Each `training_mode` moves its own parameters and no other bit, and a frozen run saves nothing."""

import logging

import pytest
import torch
from safetensors.torch import load_file

import moshi_patch
from finetune.checkpoint.saved import load_model, model_paths, open_checkpoint
from finetune.common.errors import ConfigError
from finetune.settings.record import from_dict
from finetune.settings.validation import unusual_settings, validate
from finetune.training import trainer as trainer_module
from finetune.training.trainer import train
from tests.support.training_runs import metrics, settings_for

GENERATORS = {
    f"transformer.layers.{layer}.gating.target_generator.{key}" for layer in (1, 3) for key in moshi_patch.TARGET_KEYS
}
W_DOWN = {f"transformer.layers.{layer}.gating.linear_out.weight" for layer in (1, 3)}
TTT = {"enabled": True, "layers": [1, 3], "chunk_size": 16, "learning_rate": 1e-2}


@pytest.fixture(autouse=True)
def _patched(patched):
    """Training installs the patch for good; here it is gone after each test."""


def settings_of_mode(repo, run_dir, mode: str, **changes) -> dict:
    """Of a run of three steps: the mode, and neither `full_finetuning` nor `lora.enable`."""
    common = {"lora": {"rank": 4}, "training_mode": mode, "max_steps": 3}
    return settings_for(repo, run_dir, **{**common, **changes})


@pytest.fixture
def moved(monkeypatch):
    """Runs `train` and returns the names of the parameters of which any bit moved, and of all."""

    def run(settings: dict) -> tuple[set[str], set[str]]:
        models = []
        build = trainer_module.build_model

        def watched(*args):
            built = build(*args)
            models.append((built.model, {name: p.detach().clone() for name, p in built.model.named_parameters()}))
            return built

        monkeypatch.setattr(trainer_module, "build_model", watched)
        train(from_dict(settings))
        [(model, before)] = models
        return {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}, set(before)

    return run


def test_full_moves_all_that_a_gradient_reaches(stock_repo, tmp_path, moved):
    found, every = moved(settings_of_mode(stock_repo, tmp_path / "run", "full"))
    assert found >= GENERATORS | W_DOWN | {"text_emb.weight", "text_linear.weight", "out_norm.alpha"}
    assert every - found == set()


def test_lora_moves_adapters_alone_those_on_w_down_too(stock_repo, tmp_path, moved):
    found, every = moved(settings_of_mode(stock_repo, tmp_path / "run", "lora"))
    assert found == {name for name in every if ".lora_A." in name or ".lora_B." in name}
    assert "transformer.layers.1.gating.linear_out.lora_B.weight" in found


@pytest.mark.parametrize("w_down", [True, False])
def test_ttt_moves_target_generators_and_w_down_alone(stock_repo, tmp_path, moved, w_down):
    ttt = TTT | {"train_w_down": w_down}
    found, _ = moved(settings_of_mode(stock_repo, tmp_path / "run", "ttt", ttt=ttt))
    trained = GENERATORS | (W_DOWN if w_down else set())
    assert found == trained
    folder = tmp_path / "run" / "checkpoints" / "checkpoint_000003" / "consolidated"
    assert load_file(folder / "ttt.safetensors").keys() == trained, "what trained alone is saved"


def test_lora_and_ttt_move_both(stock_repo, tmp_path, moved):
    found, every = moved(settings_of_mode(stock_repo, tmp_path / "run", "lora+ttt"))
    w_down = {name.replace("weight", "frozen_W.weight") for name in W_DOWN}
    adapters = {name for name in every if ".lora_" in name}
    on_w_down = {name for name in adapters if any(name.startswith(one.removesuffix("weight")) for one in W_DOWN)}
    assert found == GENERATORS | w_down | (adapters - on_w_down)
    assert len(on_w_down) == 4


def test_a_file_of_the_plans_trains_ttt_mlp_alone_and_goes_on_from_what_it_saved(stock_repo, tmp_path, moved):
    plan = {"enable": True, "layers": "1,3", "base_lr": 1.0, "mini_batch_size": 8, "initial_gating_alpha": 0.1}
    settings = settings_of_mode(stock_repo, tmp_path / "run", "ttt", ttt=plan | {"persistent_states": True})
    found, every = moved(settings)
    new = {name for name in every if name.startswith(("transformer.layers.1.ttt.", "transformer.layers.3.ttt."))}
    assert len(new) == 38
    assert found == new
    folder = tmp_path / "run" / "checkpoints" / "checkpoint_000003" / "consolidated"
    assert load_file(folder / "ttt.safetensors").keys() == new
    saved = open_checkpoint(folder)
    assert saved.config["ttt_kind"] == "mlp"
    assert saved.config["ttt_base_lr"] == 1.0
    load_model(saved, model_paths(saved), torch.device("cpu"), torch.float32)
    train(from_dict(settings | {"max_steps": 4, "checkpoint": {"resume": True}}))
    assert [row["step"] for row in metrics(tmp_path / "run")] == [1, 2, 3, 4]


def test_frozen_moves_nothing_measures_everything_and_saves_nothing(stock_repo, tmp_path, moved, caplog):
    run, twin = tmp_path / "run", tmp_path / "twin"
    found, every = moved(settings_of_mode(stock_repo, run, "frozen", do_eval=True, ckpt_freq=1, eval_freq=2))
    assert found == set() != every
    assert not (run / "checkpoints").exists()
    assert not list(run.rglob("*.safetensors"))
    train(from_dict(settings_of_mode(stock_repo, twin, "lora+ttt", do_eval=True, max_steps=3)))
    ours, theirs = metrics(run), metrics(twin)
    assert [row["step"] for row in ours] == [1, 2, 3]
    assert ours[0]["loss"] == theirs[0]["loss"], "of the same batch"
    assert ours[2]["loss"] != theirs[2]["loss"]
    first, last = metrics(run, "eval")
    assert first["loss"] == last["loss"]
    assert first["loss"] > metrics(twin, "eval")[-1]["loss"]


def test_auto_trains_as_before(stock_repo, tmp_path, moved):
    found, every = moved(settings_for(stock_repo, tmp_path / "run", lora={}, max_steps=2))
    assert found == GENERATORS | W_DOWN
    folder = tmp_path / "run" / "checkpoints" / "checkpoint_000002" / "consolidated"
    assert load_file(folder / "consolidated.safetensors").keys() == every, "the whole model"


@pytest.mark.parametrize(
    ("mode", "changes", "said"),
    [
        ("full", {"full_finetuning": False}, "full_finetuning=False: contradicts training_mode='full'; set it to true"),
        ("full", {"lora": {"enable": True}}, "lora.enable=True: contradicts training_mode='full'"),
        ("lora", {"full_finetuning": True}, "full_finetuning=True: contradicts training_mode='lora'"),
        ("lora", {"lora": {"enable": False}}, "lora.enable=False: contradicts training_mode='lora'"),
        ("lora", {"ttt": TTT | {"text_emb_lr": 0.1}}, "ttt.text_emb_lr=0.1: contradicts training_mode='lora'"),
        ("lora", {"ttt": TTT | {"first_steps": 2}}, "ttt.first_steps=2: nothing would train in them"),
        ("ttt", {"full_finetuning": True}, "full_finetuning=True: contradicts training_mode='ttt'"),
        ("ttt", {"lora": {"enable": True}}, "lora.enable=True: contradicts training_mode='ttt'"),
        ("ttt", {"ttt": {"enabled": False}}, "ttt.enabled=False: contradicts training_mode='ttt'"),
        ("lora+ttt", {"lora": {"enable": False}}, "lora.enable=False: contradicts training_mode='lora+ttt'"),
        ("lora+ttt", {"ttt": {"enabled": False}}, "ttt.enabled=False: contradicts training_mode='lora+ttt'"),
        ("frozen", {"full_finetuning": True}, "full_finetuning=True: contradicts training_mode='frozen'"),
        ("frozen", {"control": True}, "control=True: contradicts training_mode='frozen'"),
        ("TTT", {}, "training_mode='TTT': must be one of auto, full, lora, ttt, lora+ttt, frozen."),
    ],
)
def test_what_contradicts_the_mode_is_one_line(stock_repo, tmp_path, mode, changes, said):
    with pytest.raises(ConfigError) as error:
        train(from_dict(settings_of_mode(stock_repo, tmp_path / "run", mode, **changes)))
    assert said in str(error.value)
    assert "\n" not in str(error.value)
    assert not (tmp_path / "run").exists()


def test_another_mode_is_not_resumed_and_the_same_under_another_name_is(stock_repo, tmp_path, caplog):
    run = tmp_path / "run"
    caplog.set_level(logging.INFO)
    train(from_dict(settings_of_mode(stock_repo, run, "lora+ttt", max_steps=2)))
    before = {path: path.stat().st_mtime_ns for path in run.rglob("*") if path.is_file() and path.name != ".lock"}
    resumed = {"checkpoint": {"resume": True}}
    for mode in ("lora", "frozen", "ttt"):
        with pytest.raises(ConfigError, match=r"training_mode='.*', was 'lora\+ttt'"):
            train(from_dict(settings_of_mode(stock_repo, run, mode, **resumed)))
    assert {path: path.stat().st_mtime_ns for path in before} == before
    train(from_dict(settings_for(stock_repo, run, max_steps=3, **resumed)))  # auto comes to lora+ttt
    assert [row["step"] for row in metrics(run)] == [1, 2, 3]
    saved, resumed, again = [
        record.getMessage() for record in caplog.records if record.getMessage().startswith(("Saved", "Resumed"))
    ]
    assert "4 tensors of TTT" in saved
    assert {saved.split(": ")[1], resumed.split(": ")[1]} == {again.split(": ")[1]}, "the same count and bytes"


def test_ttt_alone_in_auto_is_told_that_the_whole_model_is_saved(stock_repo, tmp_path):
    args = from_dict(settings_for(stock_repo, tmp_path / "run", lora={}))
    validate(args)
    [said] = [one for one in unusual_settings(args) if "save_adapters" in one]
    assert "the whole model is saved with training_mode=auto" in said
    for quiet in (settings_of_mode(stock_repo, tmp_path, "ttt"), settings_for(stock_repo, tmp_path)):
        assert not [one for one in unusual_settings(from_dict(quiet)) if "save_adapters" in one]
