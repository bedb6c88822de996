"""The recorder: what it writes while a model streams, and that it changes nothing."""

import pytest
import torch
from moshi.models import LMGen

import moshi_patch
from moshi_patch import recorder
from moshi_patch.recorder import Recorder, read_records
from tests.support.disks import largest_file
from tests.support.models import BY_KIND, TTT, random_codes, randomise_targets, tiny_model
from tests.support.recordings import stream

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("patched")]
CHUNK = TTT["ttt_chunk_size"]


@pytest.mark.parametrize("ttt", BY_KIND.values(), ids=BY_KIND)
def test_every_nth_step_is_read_and_says_what_the_state_says(tmp_path, ttt):
    model = randomise_targets(tiny_model(**ttt))
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
    asked = []
    stats = recorder.ttt_stats
    monkeypatch.setattr(recorder, "ttt_stats", lambda model: asked.append(1) or stats(model))
    model = tiny_model(**TTT)
    with Recorder(model, tmp_path / "log.jsonl", every=10):
        stream(model, 25)
    assert len(asked) == 2


@pytest.mark.parametrize("ttt", BY_KIND.values(), ids=BY_KIND)
def test_a_recorded_model_answers_bit_for_bit_as_before_and_is_left_as_it_was(tmp_path, ttt):
    model = randomise_targets(tiny_model(**ttt))
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


def test_without_with_it_records_at_once_until_it_is_closed(tmp_path):
    model, log = randomise_targets(tiny_model(**TTT)), tmp_path / "log.jsonl"
    before = set(vars(model))
    recorder = Recorder(model, log, every=5)
    stream(model, 7)
    assert [record["event"] for record in read_records(log)] == ["start", "read"]
    with torch.no_grad(), model.streaming(1):
        model.forward_text(random_codes(model, 1, 1))
        recorder.close()
    assert set(vars(model)) == before
    assert [record["step"] for record in read_records(log)] == [0, 5, 8]  # what was not read yet
    recorder.close()
    stream(model, 10)
    assert len(read_records(log)) == 3
    with pytest.raises(ValueError, match=rf"{log}: this recorder is closed"):
        recorder._write("reset", rows=None)


def test_recorders_may_be_closed_in_any_order(tmp_path):
    model = tiny_model(**TTT)
    before = set(vars(model))
    first, second = Recorder(model, tmp_path / "one.jsonl"), Recorder(model, tmp_path / "two.jsonl")
    stream(model, 2)
    first.close()
    stream(model, 3)
    second.close()
    stream(model, 4)
    assert (first.steps, second.steps) == (2, 5)
    assert set(vars(model)) - before <= {"forward_text", "reset_streaming"}
    assert torch.equal(stream(model, 6), stream(tiny_model(**TTT), 6))


def test_a_full_disk_ends_the_recording_and_not_the_stream(tmp_path, caplog):
    model, log = tiny_model(**TTT), tmp_path / "log.jsonl"
    expected = stream(model, 40)
    before = set(vars(model))
    recorder = Recorder(model, log, every=2)
    with largest_file(log.stat().st_size + 600):
        assert torch.equal(stream(model, 40), expected)
    assert len(caplog.records) == 1
    assert f"{log}: recording ends, as it cannot be written (File too large)" in caplog.text
    assert set(vars(model)) == before
    recorder.close()
    assert {record["event"] for record in read_records(log)[1:]} == {"read"}
    assert read_records(log)[-1]["step"] < 40
