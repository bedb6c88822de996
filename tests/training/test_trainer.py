"""A tiny model trains from files: what a run does, logs and leaves behind, and how it ends when things go wrong."""

import logging
import math
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file

from finetune.common.distributed import Context, cleanup, setup
from finetune.common.errors import ConfigError
from finetune.settings.record import from_dict
from finetune.settings.validation import validate
from finetune.training import activity as activity_module
from finetune.training.batch_loss import batch_counts, forward_loss
from finetune.training.held_out import difference, evaluate, recording_names
from finetune.training.run_dir import RunDir
from finetune.training.signals import StopSignals
from finetune.training.trainer import MAX_BAD_STEPS, Trainer, TrainingDiverged, train
from tests.support.tiny_repository import DATA, ENVIRONMENT, ROOT
from tests.support.training_runs import metrics, settings_for

pytestmark = pytest.mark.slow

ONE = Context(0, 1, 0, torch.device("cpu"))


@pytest.fixture(autouse=True)
def _patched(patched):
    """Training installs the patch for good; here it is gone after each test."""


@pytest.fixture
def repo(stock_repo) -> Path:
    return stock_repo


@pytest.fixture
def trainer(repo, tmp_path):
    """Makes trainers; `train` runs them, here they are taken step by step."""
    made = []

    def make(**changes) -> Trainer:
        args = from_dict(settings_for(repo, tmp_path / f"run{len(made)}", **changes))
        validate(args)
        ctx = setup()
        made.append(Trainer(args, ctx, RunDir(args), StopSignals()))
        return made[-1]

    yield make
    for each in made:
        each.close()
    cleanup()


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"param_dtype": "bfloat16"},
        {"lora": {"enable": True, "rank": 4, "ft_embed": True}, "ttt": {}},
        {"lora": {}, "full_finetuning": True, "save_adapters": False},
        {"lora": {}},
    ],
    ids=["lora+ttt", "lora+ttt-bf16", "lora+embeddings", "full+ttt", "ttt_alone"],
)
def test_a_run_lowers_the_loss_and_logs_what_it_does(repo, tmp_path, changes):
    run = tmp_path / "run"
    settings = settings_for(repo, run, **{"do_eval": True, "eval_freq": 6, "max_steps": 12, **changes})
    settings["optim"]["lr"] = 3e-3
    train(from_dict(settings))
    rows = metrics(run)
    assert [row["step"] for row in rows] == list(range(1, 13))
    assert rows[-1]["loss"] < rows[0]["loss"] - 0.2
    numbers = {"loss", "text_loss", "audio_loss", "grad_norm", "steps_per_second", "peak_memory_gib"}
    assert numbers | {"tokens_per_second", "audio_seconds_per_second"} <= rows[0].keys()
    assert all(math.isfinite(row[name]) for row in rows for name in numbers)
    evaluations = metrics(run, "eval")
    assert [row["step"] for row in evaluations] == [6, 12]
    assert evaluations[1]["perplexity"] == pytest.approx(math.exp(evaluations[1]["loss"]), rel=1e-5)
    if settings["ttt"]:
        assert rows[0]["ttt/layers.1/relative_delta"] == 0  # nothing is learnt before the first update
        assert rows[-1]["ttt/layers.3/relative_delta"] > 1e-3
        assert rows[-1]["lr/target_generators"] == pytest.approx(5 * rows[-1].get("lr/w_down", 0))
        assert evaluations[1]["loss_updates_off"] != evaluations[1]["loss"]
        reliance = evaluations[1]["loss"] - evaluations[1]["loss_updates_off"]
        assert evaluations[1]["ttt_reliance"] == pytest.approx(reliance, abs=1e-5)
    assert (run / "report.png").is_file()
    assert yaml.safe_load((run / "args.yaml").read_text())["optim"]["lr"] == 3e-3
    names = sorted(path.name for path in (run / "checkpoints").iterdir())
    assert names == ["best.json", "checkpoint_000006", "checkpoint_000012"]
    assert (run / "samples" / "step_000012.wav").is_file()


def test_a_text_embedding_that_trains_is_saved_with_the_adapters_and_resuming_without_it_is_refused(repo, tmp_path):
    settings = settings_for(repo, tmp_path / "run", max_steps=2)
    settings["ttt"] |= {"init_target": "readout", "text_emb_lr": 0.05}
    train(from_dict(settings))
    [file] = (tmp_path / "run").glob("checkpoints/*/consolidated/lora.safetensors")
    base = load_file(repo / "model.safetensors")["text_emb.weight"]
    assert (load_file(file)["text_emb.weight"].float() - base.float()).abs().max() > 0.01
    resumed = settings | {"max_steps": 3, "checkpoint": {"resume": True}}
    resumed["ttt"] = settings["ttt"] | {"text_emb_lr": None}
    with pytest.raises(ConfigError, match="text_emb_lr is set=False, was True"):
        train(from_dict(resumed))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_run_that_was_stopped_continues_bit_for_bit(repo, tmp_path, dtype):
    run = tmp_path / "run"
    settings = settings_for(repo, run, ckpt_freq=3, param_dtype=dtype)
    train(from_dict(settings))
    straight = metrics(run)
    shutil.rmtree(run / "checkpoints" / "checkpoint_000006")
    train(from_dict(settings | {"checkpoint": {"resume": True}}))
    again = metrics(run)
    assert [row["step"] for row in again] == [1, 2, 3, 4, 5, 6]
    same = ("loss", "grad_norm", "lr/adapters", "ttt/layers.3/delta_norm")
    assert [[row[name] for name in same] for row in again] == [[row[name] for name in same] for row in straight]


def test_resuming_where_nothing_is_starts_anew_and_says_so(repo, tmp_path, caplog):
    train(from_dict(settings_for(repo, tmp_path / "run", max_steps=1, checkpoint={"resume": True})))
    assert "Nothing to resume" in caplog.text
    assert len(metrics(tmp_path / "run")) == 1


def test_a_second_stage_starts_from_the_first_ones_result(repo, tmp_path, trainer):
    train(from_dict(settings_for(repo, tmp_path / "first")))
    first = metrics(tmp_path / "first")
    second = trainer(init_from=str(tmp_path / "first"), data={"train_data": f"{DATA}/train.jsonl"})
    fresh = trainer(data={"train_data": f"{DATA}/train.jsonl"})
    assert second.train_step().loss < min(fresh.train_step().loss, first[0]["loss"]) - 0.1
    assert second.state.step == 1


def test_an_existing_run_is_never_overwritten_nor_deleted(repo, tmp_path, monkeypatch):
    run = tmp_path / "run"
    run.mkdir()
    (run / "precious").write_text("weights")
    monkeypatch.setattr("finetune.training.trainer.build_model", lambda *_: pytest.fail("loaded a model first"))
    with pytest.raises(ConfigError, match=r"run_dir=.*exists already.*--resume.*overwrite_run_dir"):
        train(from_dict(settings_for(repo, run)))
    assert RunDir(from_dict(settings_for(repo, run, overwrite_run_dir=True))).start() == run
    assert not (run / "precious").exists()
    assert [(folder / "precious").read_text() for folder in tmp_path.glob("run.*")] == ["weights"]


def test_settings_are_checked_before_any_model_is_loaded(repo, tmp_path, monkeypatch):
    monkeypatch.setattr("finetune.training.trainer.build_model", lambda *_: pytest.fail("loaded a model first"))
    with pytest.raises(ConfigError, match="duration_sec"):
        train(from_dict(settings_for(repo, tmp_path / "run", duration_sec=1)))
    assert not (tmp_path / "run").exists()


def test_microbatches_are_one_large_batch(trainer):
    data = {"train_data": f"{DATA}/train.jsonl"}
    large = trainer(batch_size=4, data=data)
    small = trainer(batch_size=1, num_microbatches=4, data=data)
    for _ in range(3):
        one, many = large.train_step(), small.train_step()
        for name in ("loss", "text", "audio", "grad_norm"):
            assert getattr(many, name) == pytest.approx(getattr(one, name), rel=1e-5)


def test_gradients_are_clipped_to_max_norm_and_their_norm_is_reported(trainer):
    found = []
    for max_norm in (1e6, 0.01):
        made = trainer(max_norm=max_norm)
        beta, _ = made.state.optimizer.param_groups[0]["betas"]  # which OneCycleLR moves
        reported = made.train_step().grad_norm
        first_moments = [state["exp_avg"].norm() for state in made.state.optimizer.state.values()]
        found.append((reported, torch.stack(first_moments).norm().item() / (1 - beta)))
    (norm, applied), (norm_again, clipped) = found
    assert norm == norm_again > 0.1
    assert applied == pytest.approx(norm, rel=1e-4)
    assert clipped == pytest.approx(0.01, rel=1e-3)


def test_recomputed_activations_change_nothing(trainer):
    losses = []
    for checkpointing in (True, False):
        made = trainer(gradient_checkpointing=checkpointing)
        losses.append([made.train_step(measure=True).loss for _ in range(3)] + [*made.activity.values().values()])
    assert losses[0] == losses[1]


def test_counts_known_from_the_codes_are_those_of_the_loss(trainer):
    made = trainer(first_codebook_weight_multiplier=100.0, text_padding_weight=0.25, duration_sec=9)
    for _ in range(3):
        batch = next(made.state.loader)
        assert (batch.codes == -1).any() or batch.codes.shape[2] == 113
        parts = forward_loss(made.model, batch, made.args, ONE)
        assert torch.equal(batch_counts(made.model, batch, made.args, ONE), parts.counts)


def test_a_step_that_is_not_finite_is_skipped_and_the_next_good_one_counts(trainer, caplog):
    made = trainer(max_steps=30)
    made.train_step()
    broken = made.model.out_norm.alpha
    good = broken.detach().clone()
    with torch.no_grad():
        broken.fill_(float("nan"))
    before = {name: p.clone() for name, p in made.model.named_parameters() if p.requires_grad}
    for _ in range(MAX_BAD_STEPS - 1):
        assert not made.train_step().applied
    assert all(torch.equal(value, made.model.get_parameter(name)) for name, value in before.items())
    assert "the update is skipped (9 in a row)" in caplog.text
    with torch.no_grad():
        broken.copy_(good)
    assert made.train_step().applied
    assert any(not torch.equal(value, made.model.get_parameter(name)) for name, value in before.items())
    assert made.state.step == MAX_BAD_STEPS + 1
    with torch.no_grad():
        broken.fill_(float("inf"))
    for _ in range(MAX_BAD_STEPS - 1):
        made.train_step()
    with pytest.raises(TrainingDiverged, match="10 steps in a row"):
        made.train_step()


def test_a_difference_has_the_standard_error_of_a_sum_over_recordings():
    torch.manual_seed(0)
    ours, theirs = ({f"{index}.wav": value for index, value in enumerate(torch.rand(6).tolist())} for _ in range(2))
    each = torch.tensor([ours[name] - theirs[name] for name in ours])
    found = difference("d", ours, theirs)
    assert found["d"] == pytest.approx(sum(ours.values()) - sum(theirs.values()))
    assert found["d_error"] == pytest.approx(6 * (each.std() / 6**0.5).item())
    few = [dict(list(shares.items())[:4]) for shares in (ours, theirs)]
    assert difference("d", *few).keys() == {"d"}, "four recordings say nothing of the spread"
    with pytest.raises(ValueError, match="different recordings"):
        difference("d", ours, few[0])


def test_recordings_keep_their_names_when_the_data_move():
    here, there = (recording_names([f"{root}/a/x.wav", f"{root}/b/x.wav"]) for root in ("/data", "/mnt/copy/data"))
    assert list(here.values()) == list(there.values()) == ["a/x.wav", "b/x.wav"]
    assert recording_names(["/data/x.wav"]) == {"/data/x.wav": "x.wav"}


def test_the_shares_of_the_recordings_add_up_to_the_loss_on_any_number_of_ranks(trainer):
    made = trainer(do_eval=True, batch_size=2, duration_sec=3)
    found = evaluate(made.model, made.eval_loader, made.args, ONE)
    assert sum(found.shares.values()) == pytest.approx(found.values["loss"], rel=1e-6)
    assert list(found.shares) == ["sister.wav"], "one recording of several segments"
    assert found.values["ttt_reliance"] == pytest.approx(
        found.values["loss"] - found.values["loss_updates_off"], abs=1e-5
    )


def test_a_run_with_inactive_ttt_says_what_to_raise(trainer, caplog, monkeypatch):
    monkeypatch.setattr(activity_module, "INACTIVE_STEPS", 3)
    made = trainer(ttt={"enabled": True, "layers": [1], "chunk_size": 16, "optim_lr": 1e-12, "learning_rate": 1e-6})
    with caplog.at_level(logging.WARNING):
        made.run()
    assert "TTT is inactive" in caplog.text


def test_from_the_command_line(repo, tmp_path):
    file = tmp_path / "run.yaml"
    file.write_text(yaml.safe_dump(settings_for(repo, tmp_path / "run", max_steps=2)))

    def command(*arguments) -> subprocess.CompletedProcess:
        words = [sys.executable, ROOT / "train.py", *arguments]
        return subprocess.run(words, env=ENVIRONMENT, capture_output=True, text=True, timeout=60, cwd=tmp_path)

    done = command(file, "--optim.lr", "1e-2", "--log_freq=2")
    assert done.returncode == 0, done.stderr
    assert [row["step"] for row in metrics(tmp_path / "run")] == [2]
    assert "it/s" not in done.stderr, "there is no bar where there is no terminal"
    assert "step: 000002 - done (%): 100.0 - loss: " in done.stderr
    assert "Whether TTT helps is not known" in done.stdout
    assert not done.stdout.startswith("[Gloo]")
    for line in ("target_generators", "w_down", "adapters", "(frozen)"):
        assert f"\n{line}" in done.stderr
    refused = command("--config", file, "--ttt.chunk_sise", "8")
    assert refused.returncode == 2
    assert refused.stderr.startswith("train.py: ttt.chunk_sise='8': unknown key; did you mean")
