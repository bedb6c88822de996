"""The hour of dialogue: what it tells and asks, what the model hears, and that the page says what was measured."""

import itertools
import json

import pytest
import torch

import moshi_patch
from benchmarks.evidence import dialogue as d
from benchmarks.evidence import hour
from benchmarks.evidence import model as models
from benchmarks.evidence.report import hour as hour_report
from benchmarks.evidence.settings import Settings

pytestmark = pytest.mark.usefixtures("patched")

SMALL = {"task": "dialogue", "card": d.CARD, "length": 160, "width": 32, "heads": 2, "batch": 2}


def generator(seed: int = 3) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_every_answer_of_a_training_dialogue_was_told_before():
    codes, marks = models.make(Settings(**SMALL), 4, generator())
    text = codes[:, 0]
    assert codes.shape == (4, 2, 160)
    assert marks["first"].any()
    assert marks["beyond"].any()
    for row, step in marks["beyond"].nonzero().tolist():
        key = text[row, step - 1]
        assert text[row, step - 2] == d.ASK
        before = [t for t in range(step - 2) if text[row, t] == key]
        assert step - (before[-1] + 1) > Settings(**SMALL).reach
        assert text[row, before[-1] + 1] == text[row, step]


def test_chat_holds_neither_facts_nor_what_the_table_does_not_allow():
    script = d.Script(8, 64, generator())
    script.chat(64, d.USER)
    words = script.text - d.FIRST_WORD
    assert ((words >= 0) & (words < d.WORDS)).all()
    assert all(b in d.FOLLOWS[a] for row in words.tolist() for a, b in itertools.pairwise(row))


def test_a_dialogue_that_is_full_leaves_out_what_does_not_fit():
    script = d.Script(1, 4, generator())
    script.chat(2, d.USER)
    assert script.tell(0) == 4
    script.pause(9)
    assert script.left == 0
    assert script.at == 4


def test_the_hour_asks_every_fact_once_at_its_age():
    script, questions = hour.write_script(2, 60, generator())
    assert script.at == 45_000
    assert {age: sum(q["age"] == age for q in questions) for age in hour.AGES} == {1: 12, 10: 12, 30: 8, 60: 2}
    for question in questions:
        minutes = (question["asked"] - question["told"]) / hour.MINUTE
        assert minutes == pytest.approx(question["age"], abs=0.15)
        for step in (question["told"], question["asked"]):
            assert (script.text[:, step] >= d.FIRST_VALUE).all()
        assert torch.equal(script.text[:, question["told"] - 1], script.text[:, question["asked"] - 1])
        assert torch.equal(script.text[:, question["told"]], script.text[:, question["asked"]])
    keys = (script.text >= d.FIRST_KEY) & (script.text < d.FIRST_VALUE)
    assert (keys.sum(1) == 2 * len(questions)).all(), "told once and asked once"


def test_without_talk_there_are_facts_and_silence():
    script, questions = hour.write_script(2, 10, generator(), talk=False)
    assert (script.speaker != d.NOBODY).sum() == 6 * len(questions)
    assert (script.text != d.SILENCE).sum() == 2 * 6 * len(questions)


def test_segments_follow_each_other_and_end_before_a_step_that_is_drawn():
    speaker = [d.USER] * 5 + [d.MODEL] * 3 + [d.NOBODY] * 20
    found = hour.segments(speaker, 8)
    assert [begin for begin, _ in found] == [0, *(end for _, end in found[:-1])]
    assert found[-1][1] == len(speaker) - 1
    assert all(end - begin <= 8 and d.MODEL not in speaker[begin + 1 : end] for begin, end in found)


@pytest.mark.slow
@pytest.mark.parametrize("update", ["hebbian", "residual"])
def test_segments_answer_as_single_steps_do(monkeypatch, update):
    monkeypatch.setattr(hour, "MINUTE", 100)
    monkeypatch.setattr(hour, "LAST_QUESTIONS", 20)
    model = models.build_model(Settings(**SMALL, rate=0.1, ttt={"update": update})).eval()
    with torch.no_grad():
        for parameter in moshi_patch.ttt_parameters(model).values():
            parameter.normal_(std=0.3)
    long, single = (hour.stream(model, True, 0, minutes=1, rows=2, segment=n)["questions"] for n in (16, 1))
    assert [q["nats"] for q in long] == pytest.approx([q["nats"] for q in single], abs=1e-3)
    assert next(layer.self_attn.context for layer in model.transformer.layers) == 16


@pytest.mark.slow
def test_a_stream_measures_every_minute_and_hears_its_own_samples(monkeypatch):
    monkeypatch.setattr(hour, "MINUTE", 100)
    monkeypatch.setattr(hour, "LAST_QUESTIONS", 20)
    torch.manual_seed(0)
    model = models.build_model(Settings(**SMALL)).eval()
    found = hour.stream(model, updates=True, seed=0, minutes=2, rows=2)
    assert [q["age"] for q in found["questions"]] == [1, 1]
    assert all(q["nats"] > 0 and 0 <= q["hits"] <= 1 for q in found["questions"])
    assert {len(values) for values in found["by_minute"].values()} == {2}
    stock = models.build_model(Settings(**SMALL, model="none")).eval()
    assert hour.stream(stock, updates=True, seed=0, minutes=1, rows=2)["by_minute"]["relative_delta"] == []


def test_the_page_says_what_the_committed_results_say():
    page = hour_report.PAGE.read_text()
    assert all(f"<!-- {name} -->" in page for name in hour_report.PARTS)
    assert hour_report.filled(page) == page, "run python -m benchmarks.evidence.hour --report-only"


def test_the_committed_results_hold_every_arm_and_can_be_drawn():
    data = json.loads(hour_report.DATA.read_text())
    assert {"command", "machine", "settings"} <= set(data)
    assert {run["arm"] for run in data["runs"] if run["seed"] == 0} == set(hour.ARMS)
    assert len(hour_report.draw(data).get_axes()) == 6
