"""The model card says what a model is, how it was trained and what was measured, and no more than that."""

import copy
from pathlib import Path

import pytest
import yaml

from finetune.checkpoint.saved import SavedCheckpoint
from finetune.common.errors import ConfigError
from finetune.evaluation.verdict import NO_CONTROL
from finetune.export.model_card import model_card

RESULTS = {
    "standard": {
        "streams": 12,
        "seconds": 600.0,
        "overall": {
            "updates on": {"loss": 2.5, "text_loss": 1.0, "audio_loss": 1.5, "perplexity": 12.2},
            "updates off": {"loss": 2.75, "text_loss": 1.1, "audio_loss": 1.65, "perplexity": None},
        },
        "differences": {
            "updates on - updates off": {
                "loss": {"value": -0.25, "low": -0.3, "high": -0.2},
                "text_loss": {"value": -0.1, "low": None, "high": None},
            }
        },
    }
}
"""As in the `eval.json` of an evaluation before 2026-11-25, which had no control."""

CONFIG = {"dim": 64, "num_layers": 4, "lora": False, "ttt_enabled": True, "ttt_chunk_size": 8, "mimi_name": "mine"}
TRAINING = {
    "training": {"batch_size": 2, "num_microbatches": 3, "duration_sec": 10.0, "param_dtype": "float32"},
    "lm_config": {},
    "step": 200,
    "world_size": 4,
    "versions": {"torch": "2.9.1"},
}


def card(results=None, training=TRAINING, config=CONFIG, adapters=False, base=None) -> str:
    saved = SavedCheckpoint(Path("consolidated.safetensors"), config, training)
    return model_card("My Moshi", saved, adapters=adapters, base=base, results=results)


def test_results_are_a_table_with_every_condition_and_its_difference():
    text = card(RESULTS)
    assert "| updates on | 2.5000 | 1.0000 | 1.5000 | 12.2000 |" in text
    assert "| updates off | 2.7500 | 1.1000 | 1.6500 | not finite |" in text
    assert "| reliance | -0.2500 [-0.3000, -0.2000] | -0.1000 |  |  |" in text
    assert (
        "12 recordings, 10.0 minutes. In brackets 95 % intervals over recordings. Of differences, negative is" in text
    )
    assert NO_CONTROL in text
    assert "updates on - updates off |" not in text


def test_a_control_says_who_won_before_the_table():
    measured = copy.deepcopy(RESULTS)
    measured["standard"]["recordings"] = 6
    measured["standard"]["notes"] = ["The control is of step 3, the checkpoint of step 4."]
    measured["standard"]["overall"]["trained without TTT"] = {"loss": 2.52}
    difference = {"loss": {"value": -0.02, "low": -0.03, "high": -0.01}}
    measured["standard"]["differences"] = {"reliance": difference, "with TTT - trained without": difference}
    text = card(measured)
    said = "TTT helped: with TTT the loss is 0.0200 nats per step lower than trained without"
    assert (
        text.index(said) < text.index("The control is of step 3") < text.index("| with TTT - trained without | -0.0200")
    )
    assert NO_CONTROL not in text


def test_settings_that_the_evaluation_replaced_are_named():
    rows = {key: {"value": value, "source": "command line"} for key, value in (("ttt.chunk_size", 3), ("seed", 1))}
    config = CONFIG | {"ttt_chunk_size": 16}
    assert "Measured with `ttt.chunk_size=3` in place of" in card(RESULTS | {"settings": rows}, config=config)
    for source, trained in (("command line", 3), ("config.json", 16)):
        rows["ttt.chunk_size"]["source"] = source
        assert "in place of the setting" not in card(
            RESULTS | {"settings": rows}, config=CONFIG | {"ttt_chunk_size": trained}
        )


def test_one_recording_has_no_interval():
    alone = copy.deepcopy(RESULTS)
    alone["standard"] |= {"streams": 1, "differences": {}}
    assert "1 recording, 10.0 minutes. There are too few recordings for an interval, which takes 5." in card(alone)
    few = copy.deepcopy(RESULTS)
    few["standard"]["streams"] = 4
    assert "| reliance | -0.2500 | -0.1000 |  |  |" in card(few)


def test_benchmarks_stand_beside_the_losses_or_alone():
    interval = {"value": 0.75, "low": 0.5, "high": 1.0}
    none = {"value": 0.0, "low": None, "high": None}
    meaning = {"length_normalisation": "nats per step", "codebooks": "the first codebook alone"}
    known = {"meaning": meaning, "skipped": []}
    pairs = {"pairs": 12, "updates on": interval, "updates off": interval, "updates on - updates off": none}
    bucket = {"from_seconds": 0, "to_seconds": 10, "files": 3, "updates on": interval, "updates off": interval}
    longform = known | {"buckets": [bucket], "skipped": ["cut.wav"]}
    paper = {"swuggy": known | pairs, "longform": longform}
    alone, both = card({"paper": paper}), card(RESULTS | {"paper": paper})
    assert "| set |  | number | updates on | updates off | reliance |" in alone
    assert "| swuggy | accuracy | 12 | 0.750 [0.500, 1.000] | 0.750 [0.500, 1.000] | +0.000 |" in alone
    assert "| longform | 0-10 s, nats per step | 3 | 0.7500 [0.5000, 1.0000] | 0.7500 [0.5000, 1.0000] |  |" in alone
    assert "Pairs, by nats per step. Chance is 0.5." in alone
    assert "longform: 1 skipped" in alone
    assert "losses in nats per step" not in alone
    assert both.index("| updates on | 2.5000") < both.index("| swuggy |")


def test_losses_that_are_not_finite_make_no_card():
    broken = copy.deepcopy(RESULTS)
    broken["standard"]["overall"]["updates off"]["loss"] = None
    with pytest.raises(ConfigError, match="not finite, which is no result"):
        card(broken)


def test_what_was_not_measured_or_recorded_is_not_made_up():
    for results in (None, {}, {"standard": None}, {"standard": {"overall": None}}, {"paper": {}}):
        assert "Not measured." in card(results)
    assert "Not recorded." in card(training=None)


def test_the_heading_is_what_the_hub_reads_and_leaves_the_license_to_the_user():
    heading = yaml.safe_load(card(adapters=True, base="owner/their-moshi").split("---\n")[1])
    assert heading["library_name"] == "moshi"
    assert (heading["base_model"], heading["base_model_relation"]) == ("owner/their-moshi", "adapter")
    assert "base_model" not in yaml.safe_load(card().split("---\n")[1])
    assert "license" not in heading


def test_the_settings_and_the_training_are_those_of_the_checkpoint():
    text = card()
    assert "# My Moshi" in text
    assert "| `ttt_chunk_size` | `8` |" in text
    assert "mimi_name" not in text
    assert "200 steps of 24 segments of 10.0 s, in float32" in text
    assert "keep learning from the conversation" in text
    assert "keep learning from the conversation" not in card(config=CONFIG | {"ttt_enabled": False})
