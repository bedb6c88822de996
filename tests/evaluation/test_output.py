"""What an evaluation leaves on the disk and says at its end."""

import json
import math
import shutil

import numpy as np
import pytest

from finetune.checkpoint.best import Best, write_best
from finetune.common.errors import ConfigError, DiskError
from finetune.data.segments import Segment
from finetune.evaluation.output import write_results
from finetune.evaluation.result_store import ResultStore
from finetune.evaluation.run import evaluate
from finetune.evaluation.scoring import MINUTES, refuse_broken_loss
from finetune.evaluation.settings_in_force import parse_command_line
from finetune.evaluation.streams import Streams
from finetune.evaluation.summary import summarise
from finetune.model.stream import StepLosses, score_stream
from finetune.settings.evaluation import EvalArgs
from tests.support.disks import largest_file

pytestmark = pytest.mark.slow


def summarised(tmp_path, recordings: int) -> dict:
    """Of streams that never were: two per recording, losses drawn at random, with TTT a little better."""
    store, generator = ResultStore(tmp_path / "items", "a"), np.random.default_rng(0)
    segments = [Segment(tmp_path / f"{number}.wav", first) for number in range(recordings) for first in (0, 100)]
    kinds = {"updates on": "on", "updates off": "off", "trained without TTT": "control"}
    for segment in segments:
        nats = generator.gamma(3.0, 10.0, 3)
        for kind, shift in (("on", 0.0), ("off", 30.0), ("control", 1.0)):
            sums = [(nats + shift).tolist(), [10.0, 10.0, 10.0]]
            values = {"steps": 100, "sums": sums, "by_position": [sums] + [None] * (len(MINUTES) - 2)}
            pair = [[row[0], row[1] + row[2]] for row in sums]
            store.add(kind, f"{segment.path}#{segment.first_step}", values | {"curve": [pair] * 2})
    streams = Streams(segments, [8.0] * len(segments), 50, None)
    return summarise(streams, kinds, store, EvalArgs(bootstrap_samples=100), 24)


@pytest.mark.parametrize(("recordings", "has_interval"), [(4, False), (5, True)])
def test_an_interval_is_over_recordings_and_needs_five_of_them_also_cut_in_two(
    made, tmp_path, recordings, has_interval
):
    found = summarised(tmp_path, recordings)
    assert (found["recordings"], found["streams"]) == (recordings, 2 * recordings)
    stretch, line = found["by_position"][0], found["curve"]["lines"]["with TTT - trained without"]
    for place in (found, stretch):
        difference = place["differences"]["with TTT - trained without"]["loss"]
        assert difference["value"] == pytest.approx(-0.2)
        assert (difference["low"] is not None) == has_interval
    assert (line["low"][0] is not None) == has_interval
    page = write_results(tmp_path, {"standard": found, "step": 4}, settings_of(made).checkpoint)
    judged = "TTT helped" if has_interval else "Not told from chance"
    assert page.startswith(f"{judged}: with TTT the loss is 0.2000 nats per step lower than trained without")
    assert ("In brackets 95 % intervals" in page) == has_interval
    assert ("too few recordings" in page) != has_interval
    assert f"{recordings} recordings in {2 * recordings} streams" in page
    assert "Of differences, negative is better." in page


def settings_of(made, *options: str):
    return parse_command_line(
        [f"--checkpoint_dir={made / 'merged'}", f"--data.eval_data={made / 'eval.jsonl'}", *options]
    )


def test_a_full_disk_is_one_line_and_leaves_the_old_results(words, tmp_path):
    given = words("merged")
    evaluate(parse_command_line(given))
    before = {path: path.read_bytes() for path in sorted((tmp_path / "out").rglob("*")) if path.is_file()}
    with largest_file(4000), pytest.raises(DiskError) as error:
        evaluate(parse_command_line([*given, "--seed=3"]))
    assert "cannot be written (File too large); what was found before is intact. Make room" in str(error.value)
    assert "\n" not in str(error.value)
    assert {path: path.read_bytes() for path in sorted((tmp_path / "out").rglob("*")) if path.is_file()} == before


def test_items_that_do_not_fit_on_the_disk_are_one_line_and_those_before_are_kept(tmp_path):
    store = ResultStore(tmp_path, "a")
    store.add("kind", "first", {"loss": 1.0})
    with largest_file(100), pytest.raises(DiskError, match=r"-rank0\.jsonl: cannot be written"):
        store.add("kind", "second", {"loss": [2.0] * 100})
    again = ResultStore(tmp_path, "a")
    assert again.get("kind", "first") == {"loss": 1.0}
    assert again.get("kind", "second") is None


@pytest.mark.parametrize(("memory", "rate"), [("in_place", "ttt.learning_rate"), ("mlp", "ttt.base_lr")])
def test_a_loss_that_is_not_finite_names_the_rate_that_its_kind_of_memory_has(memory, rate, tmp_path):
    with pytest.raises(ConfigError, match=rf"a\.wav: its loss is not finite \(updates on\).*a lower --{rate} shows"):
        refuse_broken_loss({"sums": [[math.nan], [1.0]]}, "updates on", Segment(tmp_path / "a.wav", 0), memory)


def test_a_loss_that_is_not_finite_is_refused_and_never_stored_nor_read(words, tmp_path, monkeypatch):
    def overflowing(*args, **options):  # weights that could do this are refused before
        losses = score_stream(*args, **options)
        return StepLosses(losses.nats * math.inf, losses.weights)

    monkeypatch.setattr("finetune.evaluation.scoring.score_stream", overflowing)
    with pytest.raises(ConfigError, match=r"its loss is not finite \(updates on\).*a lower --ttt.learning_rate"):
        evaluate(parse_command_line(words("merged")))
    assert not (tmp_path / "out" / "eval.json").exists()
    assert list((tmp_path / "out" / "items").iterdir()) == []
    (tmp_path / "b-rank0.jsonl").write_text(
        json.dumps({"kind": "k", "item": "i", "values": {"sums": [math.nan]}}) + "\n"
    )
    assert ResultStore(tmp_path, "b").get("k", "i") is None


def test_the_best_step_is_named_when_another_was_evaluated_and_best_evaluates_it(made, words, tmp_path):
    shutil.copytree(made / "merged", tmp_path / "run")
    folder = tmp_path / "run" / "checkpoints"
    write_best(folder, Best(2, 3.5))
    run = f"--checkpoint_dir={tmp_path / 'run'}"
    shutil.copytree(folder / "checkpoint_000004", folder / "checkpoint_000002")
    page = evaluate(parse_command_line(words("merged", run)))
    assert "The best held-out loss of the run is that of step 2, not 4:" in page
    assert f"--checkpoint_dir {tmp_path / 'run'} --best" in page
    assert "checkpoint_000002" in str(parse_command_line(words("merged", run, "--best")).checkpoint.weights)
    shutil.rmtree(folder / "checkpoint_000002")
    with pytest.raises(ConfigError, match=r"which checkpoint of .* has the lowest held-out loss"):
        parse_command_line(words("merged", run, "--best"))
