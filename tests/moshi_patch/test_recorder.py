"""The recorder: what it writes while a model streams, that it changes nothing, and the picture drawn from it."""

import json
import subprocess
import sys

import pytest
import torch
from moshi.models import LMGen

import moshi_patch
from moshi_patch.recorder import Recorder, plot, read_records
from tests.support.models import TTT, random_codes, randomise_targets, tiny_model
from tests.support.tiny_repository import ENVIRONMENT, ROOT

pytestmark = pytest.mark.usefixtures("patched")
CHUNK = TTT["ttt_chunk_size"]


def stream(model, steps: int, rows: int = 2, reset_at: int | None = None, mask=None) -> torch.Tensor:
    codes = random_codes(model, rows, steps)
    logits = []
    with torch.no_grad(), model.streaming(rows):
        for t in range(steps):
            if t == reset_at:
                model.reset_streaming(mask)
            logits.append(model.forward_text(codes[:, :, t : t + 1])[1])
    return torch.cat(logits, 2)


def test_every_nth_step_is_read_and_says_what_the_state_says(tmp_path):
    model = randomise_targets(tiny_model(**TTT))
    codes = random_codes(model, 2, 12)
    with torch.no_grad(), model.streaming(2), Recorder(model, tmp_path / "log.jsonl", every=4) as recorder:
        for t in range(12):
            model.forward_text(codes[:, :, t : t + 1])
        stats = moshi_patch.ttt_stats(model)
        assert recorder.steps == 12
    start, *reads = read_records(tmp_path / "log.jsonl")
    assert start["chunk_size"] == dict.fromkeys(stats, CHUNK)
    assert [read["step"] for read in reads] == [4, 8, 12]
    for name, layer in reads[-1]["layers"].items():
        assert layer["position"] == [12, 12]
        assert layer["updates"] == stats[name]["updates"] == [2, 2]
        assert layer["delta_norm"] == stats[name]["delta_norm"]
        assert min(layer["relative_delta"]) > 0
    assert [read["layers"][name]["updates"][0] for read in reads] == [0, 1, 2]


def test_the_device_is_asked_at_every_nth_step_alone(tmp_path, monkeypatch):
    from moshi_patch import recorder as monitor

    asked = []
    stats = monitor.ttt_stats
    monkeypatch.setattr(monitor, "ttt_stats", lambda model: asked.append(1) or stats(model))
    model = tiny_model(**TTT)
    with Recorder(model, tmp_path / "log.jsonl", every=10):
        stream(model, 25)
    assert len(asked) == 2


def test_a_recorded_model_answers_bit_for_bit_as_before_and_is_left_as_it_was(tmp_path):
    model = randomise_targets(tiny_model(**TTT))
    plain = stream(model, 17)
    before = set(vars(model))
    with Recorder(model, tmp_path / "log.jsonl", every=3):
        assert torch.equal(stream(model, 17), plain)
    assert set(vars(model)) == before


def test_resets_are_marked_with_their_rows(tmp_path):
    model = randomise_targets(tiny_model(**TTT))
    with Recorder(model, tmp_path / "log.jsonl", every=5):
        stream(model, 10, reset_at=7, mask=torch.tensor([False, True]))
        stream(model, 10, reset_at=2)
    records = read_records(tmp_path / "log.jsonl")
    resets = [(record["step"], record["rows"]) for record in records if record["event"] == "reset"]
    assert (7, [1]) in resets
    assert (12, None) in resets
    second = next(record for record in records if record["step"] == 10)
    assert next(iter(second["layers"].values()))["position"] == [10, 3]


def test_it_counts_the_steps_of_lmgen(tmp_path):
    model = randomise_targets(tiny_model(**TTT))
    generation = LMGen(model, use_sampling=False)
    codes = random_codes(model, 1, 11)[:, -model.n_q + model.dep_q :]
    with Recorder(generation, tmp_path / "log.jsonl", every=5), generation.streaming(1):
        for t in range(11):
            generation.step(codes[:, :, t : t + 1])
    reads = [record for record in read_records(tmp_path / "log.jsonl") if record["event"] == "read"]
    assert [read["step"] for read in reads] == [5, 10]
    assert all(layer["updates"] == [2] for layer in reads[-1]["layers"].values())


def test_steps_are_counted_when_their_codes_are_given_by_name(tmp_path):
    model = tiny_model(**TTT)
    generation = LMGen(model, use_sampling=False)
    codes = random_codes(model, 1, 1)
    with Recorder(generation, tmp_path / "log.jsonl") as recorder, generation.streaming(1):
        generation.step(input_tokens=codes[:, -model.n_q + model.dep_q :])
        assert recorder.steps == 1
    with torch.no_grad(), Recorder(model, tmp_path / "log.jsonl") as recorder, model.streaming(1):
        model.forward_text(sequence=codes)
        assert recorder.steps == 1


def test_a_second_recorder_and_a_servers_own_step_are_left_as_they_were(tmp_path):
    model, heard = tiny_model(**TTT), []
    stock = model.forward_text
    model.forward_text = served = lambda codes: heard.append(1) or stock(codes)
    with Recorder(model, tmp_path / "one.jsonl") as one:
        with Recorder(model, tmp_path / "two.jsonl") as two:
            stream(model, 3)
        stream(model, 4)
    assert (one.steps, two.steps, len(heard)) == (7, 3, 7)
    assert model.forward_text is served


@pytest.mark.parametrize("every", [0, -1, 2.5, True])
def test_a_bad_interval_is_refused(tmp_path, every):
    with pytest.raises(ValueError, match="every="):
        Recorder(tiny_model(**TTT), tmp_path / "log.jsonl", every=every)
    assert list(tmp_path.iterdir()) == []


def test_a_model_without_ttt_is_refused(tmp_path):
    with pytest.raises(ValueError, match="no TTT layer"):
        Recorder(tiny_model(), tmp_path / "log.jsonl")


def test_the_newest_recording_of_a_file_is_read_and_a_cut_last_line_left_out(tmp_path):
    model, log = randomise_targets(tiny_model(**TTT)), tmp_path / "log.jsonl"
    for steps in (5, 15):
        with Recorder(model, log, every=5):
            stream(model, steps)
    whole = read_records(log)
    assert [r["step"] for r in whole if r["event"] == "read"] == [5, 10, 15]
    log.write_text(log.read_text()[:-9])
    assert read_records(log) == whole[:-1]
    lines = log.read_text().splitlines()
    log.write_text("\n".join(["garbage", *lines]))
    with pytest.raises(ValueError, match=r"log\.jsonl:1: "):
        read_records(log)


def test_after_a_recording_that_was_cut_off_the_next_one_is_read(tmp_path):
    model, log = tiny_model(**TTT), tmp_path / "log.jsonl"
    for steps in (20, 10):
        with Recorder(model, log, every=5):
            stream(model, steps)
        if steps == 20:
            log.write_text(log.read_text()[:-9])  # as a full disk leaves it
    assert [r["step"] for r in read_records(log) if r["event"] == "read"] == [5, 10]


def test_a_row_that_was_not_recorded_is_refused_by_its_number(tmp_path):
    model = tiny_model(**TTT)
    with Recorder(model, tmp_path / "log.jsonl", every=5):
        stream(model, 5, rows=2)
    for row in (2, -1):
        with pytest.raises(ValueError, match=f"row={row}: the recording has rows 0 to 1"):
            plot(read_records(tmp_path / "log.jsonl"), tmp_path / "plot.png", row)


def test_the_plot_shows_both_norms_of_every_layer_resets_and_chunk_ends(tmp_path, monkeypatch):
    from matplotlib.figure import Figure

    drawn = []
    save = Figure.savefig
    monkeypatch.setattr(
        Figure, "savefig", lambda self, *args, **kwargs: drawn.append(self) or save(self, *args, **kwargs)
    )
    model = randomise_targets(tiny_model(**TTT))
    with Recorder(model, tmp_path / "log.jsonl", every=3):
        stream(model, 40, reset_at=23)
    plot(read_records(tmp_path / "log.jsonl"), tmp_path / "plot.png")
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")
    labels = drawn[0].axes[0].get_legend_handles_labels()[1]
    assert labels == [*moshi_patch.ttt_gatings(model), "reset", "chunk ends"]
    ends = drawn[0].axes[0].get_lines()[-1].get_xdata()
    assert list(ends) == [5, 10, 15, 20, 28, 33, 38]


def test_the_command_draws_and_a_wrong_file_is_one_line(tmp_path):
    model = randomise_targets(tiny_model(**TTT))
    with Recorder(model, tmp_path / "log.jsonl", every=5):
        stream(model, 20)
    command = [sys.executable, "-m", "moshi_patch.recorder"]
    options = {"cwd": ROOT, "env": ENVIRONMENT, "capture_output": True, "text": True}
    done = subprocess.run([*command, str(tmp_path / "log.jsonl")], **options)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "log.png").is_file()
    (tmp_path / "other.jsonl").write_text(json.dumps({"loss": 1}) + "\n")
    for name in ("other.jsonl", "none.jsonl"):
        done = subprocess.run([*command, str(tmp_path / name)], **options)
        assert done.returncode == 1
        assert name in done.stderr
        assert len(done.stderr.splitlines()) == 1
