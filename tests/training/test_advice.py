"""Made-up series of evaluations: what is said of each, and when."""

import logging

import pytest

from finetune.training.advice import Advice


def evaluation(loss: float, reliance: float | None = None, error: float | None = None) -> dict[str, float]:
    given = {"loss": loss, "ttt_reliance": reliance, "ttt_reliance_error": error}
    return {name: value for name, value in given.items() if value is not None}


def findings(series: list[dict[str, float]]) -> list[str]:
    advice = Advice()
    return [advice.observe(10 * number, values) for number, values in enumerate(series, 1)]


@pytest.mark.parametrize(
    ("series", "expected"),
    {
        "a loss that falls": ([(3.2, -0.02, 1e-3), (3.1, -0.03, 1e-3), (3.0, -0.05, 1e-3)], ["falling"] * 3),
        "a loss that rises while updates seem to help": (
            [(2.96, -0.1, 1e-3), (2.97, -0.4, 1e-3), (3.2, -1.0, 1e-3), (3.39, -2.4, 1e-3)],
            ["falling", "plateau", "rising", "rising"],
        ),
        "a plateau": ([(3.0, -0.01, 1e-3), (3.0, -0.02, 1e-3), (2.99, -0.04, 1e-3)], ["falling", "plateau", "plateau"]),
        "dead": ([(3.0, 0.0, 0.0), (2.9, -1e-5, 1e-9), (2.9, -0.01, 0.005)], ["dead"] * 3),
        "harmed": ([(3.0, 0.02, 2e-3), (3.0, 0.02, 2e-3)], ["harmed"] * 2),
        "recovered": ([(3.0, -0.1, 1e-3), (3.2, -0.1, 1e-3), (2.9, -0.1, 1e-3)], ["falling", "rising", "falling"]),
        "without TTT": ([(3.0,), (2.9,), (3.3,)], ["", "", "rising"]),
        "too few recordings for an error": ([(3.0, -0.1), (2.9, -0.2), (3.3, -2.0)], ["", "", "rising"]),
        "a loss that is no number": ([(3.0, -0.1, 1e-3), (float("nan"), -0.1, 1e-3)], ["falling", "rising"]),
    }.values(),
    ids=lambda value: None,
)
def test_what_a_series_means(series, expected):
    assert findings([evaluation(*values) for values in series]) == expected


@pytest.mark.parametrize(("kind", "rate"), [("in_place", "ttt.learning_rate."), ("mlp", "ttt.base_lr.")])
def test_advice_names_the_rate_that_its_kind_of_memory_has(kind, rate, caplog):
    assert Advice(kind).observe(10, evaluation(3.0, 0.02, 2e-3)) == "harmed"
    assert caplog.messages[-1].endswith(rate)


def with_off(loss: float, off: float) -> dict[str, float]:
    return evaluation(loss, loss - off, 1e-3) | {"loss_updates_off": off}


def test_a_reliance_that_grows_as_the_weights_without_updates_get_worse_is_no_gain(caplog):
    series = [with_off(3.0, 3.1), with_off(3.0, 3.12), with_off(2.99, 3.4), with_off(2.9, 3.4)]
    with caplog.at_level(logging.INFO):
        assert findings(series) == ["falling", "plateau", "hollow", "falling"]
    [said] = [record for record in caplog.records if record.levelno == logging.WARNING]
    assert "the loss without updates rose from 3.1 (step 10) to 3.4, and with them it stays: no gain" in said.message


def test_a_resumed_run_remembers_what_its_weights_were_without_updates():
    advice = Advice()
    advice.remember(10, 3.0, 3.1)
    advice.remember(20, 3.0, None)
    assert advice.observe(30, with_off(3.0, 3.4)) == "hollow"


def test_a_rising_loss_is_told_with_its_best_step_and_never_go_on(caplog):
    with caplog.at_level(logging.INFO):
        findings([evaluation(2.96, -0.1, 1e-3), evaluation(3.39, -2.4, 1e-3)])
    last = caplog.records[-1]
    assert last.levelno == logging.WARNING
    assert "the held-out loss rose from 2.96 (step 10) to 3.39" in last.message
    assert "go on" not in last.message.lower()


def test_a_resumed_run_remembers_its_best(caplog):
    advice = Advice()
    for step, loss in ((10, 3.1), (20, 2.96), (30, 3.0)):
        advice.remember(step, loss)
    assert caplog.text == ""
    assert advice.observe(40, evaluation(3.39, -2.4, 1e-3)) == "rising"
    assert "rose from 2.96 (step 20) to 3.39" in caplog.text


def test_a_finding_is_told_when_it_changes_or_has_doubled(caplog):
    with caplog.at_level(logging.INFO):
        findings([evaluation(3.0, reliance, 1e-3) for reliance in (0.0, 0.0, -0.01, -0.015, -0.03, -0.04)])
    assert [record.message.split(":")[0] for record in caplog.records] == ["Step 10", "Step 30", "Step 50"]
    assert "change the loss of these weights by -0.01 ± 0.001 nats" in caplog.text
