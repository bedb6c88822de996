"""A memory that explodes is warned of as an inactive one is, and a run that diverges names its suspects."""

import logging
import math

import pytest

from finetune.settings.record import from_dict
from finetune.training import trainer as trainer_module
from finetune.training.explosion import EXPLODED_ABOVE, ExplosionWatch, exploded, suspects
from finetune.training.trainer import TrainingDiverged, train
from tests.support.training_runs import settings_for

LAYER = "ttt/layers.1/relative_delta"


def watch(kind: str = "in_place") -> ExplosionWatch:
    rates = {"in_place": {"learning_rate": 0.03}, "mlp": {"base_lr": 2.0}}
    return ExplosionWatch(from_dict({"ttt": {"enabled": True, "kind": kind, **rates[kind]}}))


@pytest.mark.parametrize("value", [EXPLODED_ABOVE["in_place"] * 1.01, math.inf, math.nan, 1e9])
def test_it_is_warned_of_once_and_again_after_it_was_well(value, caplog):
    one = watch()
    assert not one.observe(1, {LAYER: EXPLODED_ABOVE["in_place"]})
    assert one.observe(2, {LAYER: value, "ttt/layers.3/relative_delta": 0.1, "loss": 3.0})
    assert not one.observe(3, {LAYER: value})
    assert not one.observe(4, {LAYER: 0.5})
    assert one.observe(5, {LAYER: value})
    [first, _] = [record.getMessage() for record in caplog.records]
    assert first.startswith("Step 2: the memory explodes: in layers.1 a sequence changes the fast weights by ")
    assert "Lower ttt.learning_rate (0.03). Or set ttt.update: residual" in first
    assert "\n" not in first


def test_of_the_other_kind_its_own_rate_is_named(caplog):
    assert watch("mlp").observe(1, {LAYER: math.inf})
    assert "Lower ttt.base_lr (2)." in caplog.text
    assert "residual" not in caplog.text


def test_null_in_the_metrics_is_an_explosion_and_no_ttt_is_none():
    assert list(exploded({LAYER: None}, "in_place")) == ["layers.1"]
    assert exploded({"loss": None, "ttt/layers.1/delta_norm": None}, "in_place") == {}


def test_suspects_are_named_with_the_last_norms():
    ttt = from_dict({"ttt": {"enabled": True, "learning_rate": 0.5}, "optim": {"lr": 1e-3}})
    text = suspects(ttt, (40, 12.3), {"layers.1": 7.0, "layers.3": math.inf})
    assert text == (
        "Suspects: ttt.learning_rate=0.5, optim.lr=0.001, max_norm=1. "
        "Last norms: gradient 12.3 (step 40); relative delta layers.1 7, layers.3 inf."
    )
    assert suspects(from_dict({"optim": {"lr": 1e-3}}), None, {}) == "Suspects: optim.lr=0.001, max_norm=1."


def test_a_run_that_an_enormous_rate_breaks_says_so(stock_repo, tmp_path, patched, monkeypatch, caplog):
    monkeypatch.setattr(trainer_module, "MAX_BAD_STEPS", 2)
    ttt = {"enabled": True, "layers": [1, 3], "chunk_size": 16, "learning_rate": 6e4, "init_target": "readout"}
    settings = settings_for(stock_repo, tmp_path / "run", ttt=ttt | {"target_gain": 6e4, "optim_lr": 1.0}, max_steps=15)
    settings |= {"log_freq": 100, "do_ckpt": False, "param_dtype": "float16"}
    with caplog.at_level(logging.WARNING), pytest.raises(TrainingDiverged) as error:
        train(from_dict(settings))
    said = str(error.value)
    assert "Suspects: ttt.learning_rate=60000, optim.lr=0.001, max_norm=1. Last norms: " in said
    assert "relative delta layers.1 " in said
    assert "\n" not in said
