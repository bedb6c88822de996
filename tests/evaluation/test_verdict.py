"""The sentence that an evaluation begins with: who won, by how much, and whether that can be said."""

import pytest

from finetune.evaluation.conditions import BENEFIT
from finetune.evaluation.old_results import with_todays_names
from finetune.evaluation.verdict import NO_CONTROL, verdict


def found(value: float, low: float | None = None, high: float | None = None) -> dict:
    return {"loss": {"value": value, "low": low, "high": high}}


def result(*served: str, **differences) -> dict:
    return {"overall": {name: {"loss": 2.5} for name in served}, "differences": differences}


@pytest.mark.parametrize(
    ("difference", "sentence"),
    [
        (
            found(-0.03, -0.05, -0.01),
            "TTT helped: with TTT the loss is 0.0300 nats per step lower than trained without "
            "(95 % interval -0.0500 to -0.0100).",
        ),
        (
            found(0.03, 0.01, 0.05),
            "TTT harmed: with TTT the loss is 0.0300 nats per step higher than trained without "
            "(95 % interval +0.0100 to +0.0500).",
        ),
        (
            found(-0.03, -0.07, 0.01),
            "Not told from chance: with TTT the loss is 0.0300 nats per step lower than trained without "
            "(95 % interval -0.0700 to +0.0100).",
        ),
        (
            found(-2.4),
            "Not told from chance: with TTT the loss is 2.4000 nats per step lower than trained without "
            "(too few recordings for an interval, which takes 5).",
        ),
        (
            found(0.0, 0.0, 0.0),
            "Not told from chance: with TTT the loss is the same as trained without "
            "(95 % interval +0.0000 to +0.0000).",
        ),
    ],
    ids=["helped", "harmed", "chance", "few", "same"],
)
def test_the_control_decides_whether_ttt_helped(difference, sentence):
    others = {"reliance": found(-9, -9.5, -8.5)}
    assert verdict(result("updates on", "updates off", **{BENEFIT: difference}, **others)) == [sentence]


def test_a_reliance_alone_is_never_called_a_gain():
    sentences = verdict(result("updates on", "updates off", reliance=found(-2.4, -2.5, -2.3)))
    assert sentences[0] == NO_CONTROL
    assert sentences[1].startswith("These weights lean on updates: with them their loss is 2.4000 nats per step lower")
    assert "helped" not in " ".join(sentences)


def test_against_a_base_model_the_checkpoint_wins_and_ttt_is_left_open():
    differences = {"reliance": found(-1), "updates on - baseline": found(-0.5, -0.6, -0.4)}
    sentences = verdict(result("updates on", "updates off", "baseline", **differences))
    assert sentences[0].startswith("The checkpoint won: the checkpoint's loss is 0.5000 nats per step lower than the ")
    assert sentences[1] == NO_CONTROL


def test_a_checkpoint_without_ttt_says_its_loss_or_how_it_does_against_the_baseline():
    assert verdict(result("no TTT")) == ["The loss is 2.5000 nats per step; there is no TTT in it."]
    (sentence,) = verdict(result("no TTT", **{"no TTT - baseline": found(0.5, 0.4, 0.6)}))
    assert sentence.startswith("The checkpoint lost: ")


def test_an_old_result_is_read_with_todays_names_signs_and_intervals():
    old = {"updates on - updates off": {"loss": {"value": -0.25, "low": -0.3, "high": -0.2}}}
    few = with_todays_names({"standard": {"streams": 4, "overall": {}, "differences": old}})["standard"]
    assert few["differences"] == {"reliance": {"loss": {"value": -0.25, "low": None, "high": None}}}
    many = with_todays_names({"standard": {"streams": 5, "overall": {}, "differences": old}})["standard"]
    assert many["differences"] == {"reliance": old["updates on - updates off"]}
    assert with_todays_names({"standard": many, "step": 3}) == {"standard": many, "step": 3}


def test_an_old_difference_of_accuracies_becomes_one_of_errors_once():
    accuracy = {"value": 0.75, "low": 0.5, "high": 1.0}
    pairs = {"meaning": {}, "pairs": 12, "updates on": accuracy}
    old = {"swuggy": pairs | {"updates on - updates off": {"value": 0.1, "low": -0.1, "high": 0.3}}}
    new = with_todays_names({"paper": old})["paper"]["swuggy"]
    assert new["reliance"] == {"value": -0.1, "low": -0.3, "high": 0.1}
    assert new["updates on"] == accuracy
    todays = {"swuggy": new | {"meaning": {"differences": "of errors"}}}
    assert with_todays_names({"paper": todays})["paper"] == todays
